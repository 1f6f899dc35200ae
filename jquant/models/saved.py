"""A quantized model in one folder: a jquant checkpoint with the config and the tokenizer, and where it came from."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jquant import checkpoint
from jquant.core.errors import CheckpointError
from jquant.models.config import Config, param_shapes
from jquant.models.decoder import Apply, Params, build
from jquant.models.errors import ModelError
from jquant.models.tokenizer import Tokenizer, load_tokenizer
from jquant.trace.execute import quantized

_CONFIG = "model_config"


def save(
    path: str | os.PathLike[str],
    params: Params,
    config: Config,
    tokenizer: Tokenizer | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes everything that is needed to run a (quantized) model; `jquant.models.load(path)` reads it.

    Args:
      path: the folder, see `jquant.save`.
      params: float or quantized parameters.
      config, tokenizer: the model's.
      metadata: what else to note, JSON-able: `jquant.checkpoint.read_metadata` gives it back.
      overwrite: replace a checkpoint that is there.

    Raises:
      CheckpointError: the path is taken, or can't be written.
    """
    files = {} if tokenizer is None else {"tokenizer.json": tokenizer.backend.to_str().encode()}
    noted = {**(metadata or {}), _CONFIG: config.to_dict()}
    checkpoint.save(path, params, metadata=noted, extra_files=files, overwrite=overwrite)


def read_config(path: str | os.PathLike[str]) -> Config:
    """The config of a saved model, without reading its parameters.

    Raises:
      ModelError: a checkpoint that holds no model of this family.
      CheckpointError: no checkpoint, a damaged or a newer one.
    """
    metadata = checkpoint.read_metadata(path)
    if _CONFIG not in metadata:
        raise ModelError(f"{path}: a checkpoint without a model's config; read it with jquant.load")
    return Config.from_dict(metadata[_CONFIG])


def read(path: Path, tokenizer: bool = True) -> tuple[Apply, Params, Tokenizer | None, Config]:
    """`apply` on quantized parameters, the parameters, the tokenizer and the config of a saved model."""
    config = read_config(path)
    has = tokenizer and "tokenizer.json" in checkpoint.read_manifest(path)["extra_files"]
    words = load_tokenizer(checkpoint.extra_file(path, "tokenizer.json").parent, config.eos_ids) if has else None
    params = checkpoint.load(path)
    _check(path, checkpoint.read_manifest(path)["leaves"], config)
    return quantized(build(config)), params, words, config


def _check(path: Path, leaves: Mapping[str, Any], config: Config) -> None:
    if missing := sorted(param_shapes(config).keys() - leaves.keys()):
        raise CheckpointError(f"{path}: {len(missing)} parameters are missing, such as {missing[0]}; quantize again")
