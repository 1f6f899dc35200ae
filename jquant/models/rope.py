"""Rotary position embedding (Su et al. 2021) and its scalings, computed once per forward pass, outside the layers."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jquant.models.config import Rope


def rope_table(
    rope: Rope, head_dim: int, positions: jax.Array, max_position: int, length: int | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each float32 [tokens, head_dim / 2], or [batch, tokens, head_dim / 2].

    `positions` is int [tokens] or [batch, tokens]. `length`, the number of tokens seen so far (one, or for each row its
    own), and `max_position`, the length trained on, matter to the dynamic scaling only.
    """
    if rope.type == "dynamic":
        frequencies: jax.Array | np.ndarray = _dynamic(rope, head_dim, max_position, length)
    else:
        frequencies = _FREQUENCIES[rope.type](rope, head_dim).astype(np.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    scale = _attention_factor(rope)
    if scale == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + head_dim / 2) of x [batch, tokens, heads, head_dim], in float32; keeps the dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., :, None, :], sin[..., :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _default(rope: Rope, head_dim: int) -> np.ndarray:
    return rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)


def _linear(rope: Rope, head_dim: int) -> np.ndarray:
    return _default(rope, head_dim) / rope.factor


def _freq_factors(rope: Rope, head_dim: int) -> np.ndarray:
    return _default(rope, head_dim) / np.asarray(rope.freq_factors)


def _llama3(rope: Rope, head_dim: int) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    frequencies = _default(rope, head_dim)
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)  # within the trained length
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    return frequencies * ((1 - smooth) / rope.factor + smooth)


def _yarn(rope: Rope, head_dim: int) -> np.ndarray:
    """YaRN (Peng et al. 2023), section 3.2: a ramp over the dimensions, from kept to interpolated."""

    def dimension(turns: float) -> float:
        length = rope.original_max_position_embeddings
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high  # as the reference does, against a division by zero
    interpolated = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return _default(rope, head_dim) * (interpolated / rope.factor + 1 - interpolated)


_FREQUENCIES = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "freq_factors": _freq_factors,
}


def _dynamic(rope: Rope, head_dim: int, max_position: int, length: int | jax.Array) -> jax.Array:
    """Dynamic NTK: the base grows with the length once it passes the trained one. `length` may be traced.

    With a cache, keys keep the base of the step that wrote them, as in every implementation that caches rotated keys.
    """
    ratio = jnp.maximum(jnp.asarray(length, jnp.float32) / max_position, 1.0)
    ratio = ratio[:, None, None] if ratio.ndim else ratio  # [B, 1, 1]
    base = rope.theta * (rope.factor * ratio - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
    return base ** -jnp.asarray(np.arange(0, head_dim, 2) / head_dim, jnp.float32)


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _attention_factor(rope: Rope) -> float:
    """What YaRN multiplies cos and sin with: it sharpens the softmax over the longer context."""
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor)
