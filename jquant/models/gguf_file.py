"""GGUF files, the format of llama.cpp: metadata to `Config`, tensors of every type the `gguf` package dequantizes."""

from pathlib import Path
from typing import Any

import numpy as np

from jquant.models.config import Config, Rope
from jquant.models.decoder import Params
from jquant.models.errors import ModelError, require
from jquant.models.fill import fill

NAMES = {
    "embed": "token_embd",
    "layers": "blk",
    "norm": "output_norm",
    "lm_head": "output",
    "attention/q": "attn_q",
    "attention/k": "attn_k",
    "attention/v": "attn_v",
    "attention/o": "attn_output",
    "attention/q_norm": "attn_q_norm",
    "attention/k_norm": "attn_k_norm",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's files call themselves llama
_ROPE_FREQS = "rope_freqs.weight"


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader`; it maps the file, nothing is read yet but names. ModelError when it is no GGUF file."""
    gguf = require("gguf")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, OverflowError) as error:
        raise ModelError(f"{path} is damaged or no GGUF file: {error}") from error


def metadata(reader: Any) -> dict[str, Any]:
    """All keys and values as Python values."""
    return {key: field.contents() for key, field in reader.fields.items()}


def read_config(reader: Any, meta: dict[str, Any], path: Path) -> Config:
    """The `Config` of a file. ModelError names the key that is missing or not supported."""
    try:
        return _config({t.name: t for t in reader.tensors}, meta)
    except KeyError as error:
        raise ModelError(f"{path}: the metadata key or tensor {error} is missing") from error
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _config(tensors: dict[str, Any], meta: dict[str, Any]) -> Config:
    arch = meta["general.architecture"]
    if arch not in ARCHITECTURES:
        raise ModelError(f"architecture {arch!r} is not supported; supported: {', '.join(ARCHITECTURES)}")

    def get(key: str, default: Any = None) -> Any:
        return meta.get(f"{arch}.{key}", default)

    hidden, layers = meta[f"{arch}.embedding_length"], meta[f"{arch}.block_count"]
    heads = _uniform(meta[f"{arch}.attention.head_count"], "attention.head_count")
    dim = get("attention.key_length", hidden // heads)
    if get("rope.dimension_count", dim) != dim or get("attention.value_length", dim) != dim:
        raise ModelError(f"rope.dimension_count or attention.value_length differ from the head width {dim}")
    window = get("attention.sliding_window") or None
    return Config(
        family=arch,
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=hidden,
        intermediate_size=_uniform(meta[f"{arch}.feed_forward_length"], "feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_uniform(get("attention.head_count_kv", heads), "attention.head_count_kv"),
        head_dim=dim,
        rms_norm_eps=meta[f"{arch}.attention.layer_norm_rms_epsilon"],
        rope=_rope(tensors, get),
        max_position_embeddings=get("context_length", 2048),
        tied="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        sliding_window=window,
        sliding_layers=tuple(range(layers)) if window else (),
        bos_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_ids=_eos(meta),
    )


def _eos(meta: dict[str, Any]) -> tuple[int, ...]:
    ids = (meta.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _uniform(value: int | list[int], key: str) -> int:
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise ModelError(f"{key} differs between layers ({sorted(values)}), which this decoder does not support")
    return values.pop()


def _rope(tensors: dict[str, Any], get: Any) -> Rope:
    theta = get("rope.freq_base", 10000.0)
    if _ROPE_FREQS in tensors:
        return Rope("freq_factors", theta, freq_factors=tuple(map(float, tensors[_ROPE_FREQS].data)))
    kind, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor", get("rope.scale_linear", 1.0))
    if kind == "none" and factor == 1.0:
        return Rope(theta=theta)
    if kind in ("none", "linear"):
        return Rope("linear", theta, factor)
    if kind != "yarn":
        raise ModelError(f"rope.scaling.type {kind!r} is not supported; supported: none, linear, yarn")
    original = get("rope.scaling.original_context_length", get("context_length", 0))
    # llama.cpp multiplies the paper's factor by its own attn_factor.
    scale = get("rope.scaling.attn_factor", 1.0) * (0.1 * np.log(factor) + 1.0)
    beta = {b: get(f"rope.scaling.yarn_{b}", d) for b, d in (("beta_fast", 32.0), ("beta_slow", 1.0))}
    return Rope("yarn", theta, factor, original, attention_factor=float(scale), **beta)


def read_params(reader: Any, config: Config, arch: str, dtype: Any, path: Path) -> Params:
    """The parameters of a file, dequantized tensor by tensor."""
    tensors = {t.name: t for t in reader.tensors}
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if arch == "llama" else {}

    def read(name: str) -> np.ndarray:
        array = _dequantize(tensors[name], path)
        count = next((n for key, n in heads.items() if f".{key}." in name), None)
        return array if count is None else _halves(array, count)

    return fill(config, NAMES, set(tensors) - {_ROPE_FREQS}, read, dtype, str(path))


def _dequantize(tensor: Any, path: Path) -> np.ndarray:
    gguf = require("gguf")
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise ModelError(f"{path}: tensor {tensor.name} has type {kind}, which the gguf package can't read") from error


def _halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of q and k rows, which rotates neighbours (2i, 2i + 1), for pairs (i, i + half)."""
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
