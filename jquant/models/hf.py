"""Hugging Face folders: config.json, safetensors in one file or in shards, tokenizer.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jquant.models.config import Config, Rope
from jquant.models.decoder import Params
from jquant.models.errors import ModelError, require
from jquant.models.fill import fill

NAMES = {
    "embed": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_ROPE_FIELDS: tuple[str, ...] = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
)
_ROPE_FIELDS += ("mscale", "mscale_all_dim", "truncate")


def read_config(folder: Path) -> Config:
    """The `Config` of a folder's config.json (and the stop tokens of its generation_config.json)."""
    path = folder / "config.json"
    values = _read_json(path)
    if (generation := folder / "generation_config.json").exists():
        values["eos_token_id"] = _ids(values.get("eos_token_id")) + _ids(_read_json(generation).get("eos_token_id"))
    try:
        return config_from_hf(values)
    except KeyError as error:
        raise ModelError(f"{path}: the key {error} is missing") from error
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def config_from_hf(values: dict[str, Any]) -> Config:
    """A Hugging Face config (a dict, of transformers 4 or 5) as a `Config`. ModelError for what is not supported."""
    family = values.get("model_type")
    if family not in FAMILIES:
        raise ModelError(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    if values.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act {values['hidden_act']!r} is not supported; this decoder computes silu")
    if method := (values.get("quantization_config") or {}).get("quant_method"):
        raise ModelError(f"the weights are stored quantized ({method}); this loader reads float weights only")
    heads = values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads") or (8 if family == "mistral" else heads)
    default_dim = 128 if family == "qwen3" else values["hidden_size"] // heads
    max_length = values.get("max_position_embeddings") or 2048
    bias = bool(values.get("attention_bias", False)) and family in ("llama", "qwen3")
    window, sliding_layers = _sliding(family, values)
    return Config(
        family=family,
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=values.get("head_dim") or default_dim,
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        rope=_rope(values, max_length),
        max_position_embeddings=max_length,
        tied=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=bool(values.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        sliding_window=window,
        sliding_layers=sliding_layers,
        bos_id=values.get("bos_token_id"),
        eos_ids=tuple(dict.fromkeys(_ids(values.get("eos_token_id")))),
    )


def read_params(folder: Path, config: Config, dtype: Any) -> Params:
    """The parameters of a folder, read tensor by tensor."""
    where = _tensor_files(folder)
    ignored = {n for n in where if n.endswith("rotary_emb.inv_freq")}
    if config.tied:
        ignored.add("lm_head.weight")  # some writers store the tied head a second time
    read = lambda name: _read_tensor(where[name], name)
    return fill(config, NAMES, set(where) - ignored, read, dtype, str(folder))


def _sliding(family: str, values: dict[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """The window and the layers it holds for: all of Mistral's, Qwen's by layer_types or from max_window_layers on."""
    window, layers = values.get("sliding_window"), range(values["num_hidden_layers"])
    if family == "llama" or not window or (family != "mistral" and not values.get("use_sliding_window", False)):
        return None, ()
    if family == "mistral":
        return window, tuple(layers)
    if types := values.get("layer_types"):
        return window, tuple(i for i in layers if types[i] == "sliding_attention")
    return window, tuple(i for i in layers if i >= values.get("max_window_layers", 28))


def _rope(values: dict[str, Any], max_length: int) -> Rope:
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise ModelError(f"rope type {kind!r} is not supported; supported: {', '.join(_ROPE_TYPES)}")
    if (given.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError("partial_rotary_factor is not supported; this decoder rotates whole heads")
    original = values.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    fields = {k: given[k] for k in _ROPE_FIELDS if given.get(k) is not None}
    if kind == "yarn" and original and "factor" not in fields:
        fields["factor"] = max_length / original
    if kind != "default" and "factor" not in fields:
        raise ModelError(f"rope type {kind!r} needs a factor")
    theta = given.get("rope_theta") or values.get("rope_theta") or 10000.0
    return Rope(type=kind, theta=theta, original_max_position_embeddings=original or max_length, **fields)


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ModelError(f"{path} does not exist; a model folder holds config.json and safetensors files")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it, from the index where there is one, else from the files themselves."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted({folder / name for name in _read_json(index)["weight_map"].values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no safetensors file; convert other weights (.bin, .pth) to safetensors first")
    if missing := [f.name for f in files if not f.exists()]:
        raise ModelError(f"{folder}: {index.name} names {', '.join(missing)}, which does not exist")
    return {name: file for file in files for name in _open(file, lambda f: list(f.keys()))}


def _read_tensor(file: Path, name: str) -> np.ndarray:
    # Opened for each tensor: a mapped file's pages count as ours for as long as it stays open.
    return _open(file, lambda f: f.get_tensor(name))


def _open(file: Path, use: Any) -> Any:
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(file, framework="numpy") as f:
            return use(f)
    except safetensors.SafetensorError as error:
        raise ModelError(f"{file} is damaged or no safetensors file: {error}") from error
