"""How numbers are stored: `Format`, its presets, and the pure functions that encode and decode by it.

Everything here works on rows: arrays `[..., n]` whose last axis is the flattened contracted axes of a weight. A block
of the format is a run of `block` elements of a row (the last may be shorter), a whole row ("channel"), or everything
but `stacked` leading axes ("tensor"). Arithmetic is in float32:

    symmetric, floats, codebooks   value = element(code) * scale
    with a zero point              value = (code - zero_point) * scale

Rounding multiplies by the reciprocal of the scale, and scales by the reciprocal of the top: XLA turns a division by a
broadcast into that anyway, but in some programs only, and the same weight must get the same bits in all of them.
"""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jquant.core.errors import FormatError

# Table 3 of QLoRA (arXiv 2305.14314, appendix E): the quantiles of a normal distribution, zero exact.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Element(NamedTuple):
    """One element type.

    Attributes:
      bits: bits of a code.
      kind: "int", "float" or "codebook".
      top: the magnitude that a symmetric scale maps the largest absolute value to.
      storage: for floats, the name of the dtype whose bits the codes are.
      values: for codebooks, the value of every code, ascending.
    """

    bits: int
    kind: str
    top: float
    storage: str = ""
    values: tuple[float, ...] = ()


# A symmetric b-bit integer has codes -2**(b-1) .. 2**(b-1)-1; the scale spreads the block over half the number of steps
# on each side, absmax / ((2**b - 1) / 2), as GPTQ's code and compressed-tensors do.
ELEMENTS: dict[str, Element] = {
    **{f"int{b}": Element(b, "int", (2**b - 1) / 2) for b in range(2, 9)},
    "nf4": Element(4, "codebook", 1.0, values=NF4_VALUES),
    "fp8_e4m3": Element(8, "float", 448.0, storage="float8_e4m3fn"),
    "fp8_e5m2": Element(8, "float", 57344.0, storage="float8_e5m2"),
}

SCALE_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Format:
    """How the numbers of a tensor are stored. Frozen and hashable: static data of a `QTensor`.

    Attributes:
      element: "int2" .. "int8", "nf4", "fp8_e4m3", "fp8_e5m2".
      block: what shares one scale: `g` (an int), groups of g along the contracted axes, the last one perhaps shorter;
        "channel", everything along the contracted axes (for activations: per token); "tensor", the whole tensor.
      symmetric: no zero point. Only integers may be asymmetric.
      scale_dtype: dtype of the scales, "float32", "bfloat16" or "float16".

    Raises:
      FormatError: a field is not one of the above.
    """

    element: str
    block: int | str = "channel"
    symmetric: bool = True
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise FormatError(f"Format: element {self.element!r} does not exist; choose one of {', '.join(ELEMENTS)}")
        is_group = isinstance(self.block, int) and not isinstance(self.block, bool) and self.block >= 1
        if not is_group and self.block not in ("channel", "tensor"):
            raise FormatError(f"Format: block {self.block!r} must be a group size >= 1, 'channel' or 'tensor'")
        if not self.symmetric and ELEMENTS[self.element].kind != "int":
            raise FormatError(f"Format: {self.element} has no zero point; only int2 to int8 can be asymmetric")
        if self.scale_dtype not in SCALE_DTYPES:
            raise FormatError(f"Format: scale_dtype {self.scale_dtype!r} must be one of {', '.join(SCALE_DTYPES)}")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return ELEMENTS[self.element].bits

    @property
    def group_size(self) -> int | None:
        """Elements in a group, or None where a block is a whole channel or tensor."""
        return self.block if isinstance(self.block, int) else None

    def blocks(self, n: int) -> int:
        """Number of blocks in a row of `n` elements."""
        return -(-n // self.block) if isinstance(self.block, int) else 1

    def __str__(self) -> str:
        block = f"-g{self.block}" if isinstance(self.block, int) else "-tensor" * (self.block == "tensor")
        scale = {"float32": "-f32", "bfloat16": "-bf16", "float16": "-f16"}[self.scale_dtype]
        if self.scale_dtype == _default_scale_dtype(self.block):
            scale = ""
        return f"{self.element}{block}{'' if self.symmetric else '-asym'}{scale}"

    def replace(self, **changes: object) -> "Format":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _default_scale_dtype(block: int | str) -> str:
    # Groups pay for their scale again and again; a channel's scale costs nothing.
    return "bfloat16" if isinstance(block, int) else "float32"


def parse_format(text: str) -> Format:
    """The `Format` that a name such as "int4-g64", "int3-g64-asym", "int8", "nf4-g64-f32" or "fp8_e4m3" stands for.

    The inverse of `str(format)`. Groups have bfloat16 scales unless "-f32" or "-f16" is said.

    Raises:
      FormatError: the name can't be read.
    """
    element, *rest = text.strip().lower().split("-")
    block: int | str = "channel"
    symmetric, scale_dtype = True, None
    for word in rest:
        if re.fullmatch(r"g[1-9]\d*", word):
            block = int(word[1:])
        elif word in ("channel", "tensor"):
            block = word
        elif word in ("asym", "sym"):
            symmetric = word == "sym"
        elif word in ("f32", "bf16", "f16"):
            scale_dtype = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[word]
        else:
            raise FormatError(
                f"format {text!r}: {word!r} is not understood; write an element ({', '.join(ELEMENTS)}) and then any "
                "of -g64 (group size), -tensor, -asym, -f32/-bf16/-f16 (dtype of the scales), as in int4-g64-asym"
            )
    return Format(element, block, symmetric, scale_dtype or _default_scale_dtype(block))


INT8 = Format("int8")
INT8_G128 = Format("int8", 128, scale_dtype="bfloat16")
INT8_TENSOR = Format("int8", "tensor")
INT6_G64 = Format("int6", 64, scale_dtype="bfloat16")
INT5_G64 = Format("int5", 64, scale_dtype="bfloat16")
INT4 = Format("int4")
INT4_G128 = Format("int4", 128, scale_dtype="bfloat16")
INT4_G64 = Format("int4", 64, scale_dtype="bfloat16")
INT4_G32 = Format("int4", 32, scale_dtype="bfloat16")
INT4_G128_ASYM = Format("int4", 128, symmetric=False, scale_dtype="bfloat16")
INT4_G64_ASYM = Format("int4", 64, symmetric=False, scale_dtype="bfloat16")
INT3_G64 = Format("int3", 64, scale_dtype="bfloat16")
INT3_G64_ASYM = Format("int3", 64, symmetric=False, scale_dtype="bfloat16")
INT2_G32_ASYM = Format("int2", 32, symmetric=False, scale_dtype="bfloat16")
NF4 = Format("nf4", 64, scale_dtype="bfloat16")
FP8_E4M3 = Format("fp8_e4m3")
FP8_E5M2 = Format("fp8_e5m2")

PRESETS: dict[str, Format] = {name: value for name, value in list(globals().items()) if isinstance(value, Format)}


class BlockParams(NamedTuple):
    """What a block stores beside its codes.

    Attributes:
      scale: `[..., blocks]`, in the format's scale dtype. ("tensor": `[*stacked, 1, ..., 1]`.)
      zero_point: uint8, the same shape, or None for symmetric formats.
    """

    scale: jax.Array
    zero_point: jax.Array | None


def to_blocks(rows: jax.Array, fmt: Format) -> jax.Array:
    """`[..., n]` -> `[..., blocks, block]`, zeros behind the last, shorter group (no extreme changes by them)."""
    n = rows.shape[-1]
    if not isinstance(fmt.block, int):
        return rows[..., None, :]
    pad = -n % fmt.block
    if pad:
        rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, pad)])
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // fmt.block, fmt.block)


def block_extremes(rows: jax.Array, fmt: Format, stacked: int = 0) -> tuple[jax.Array, jax.Array]:
    """Minimum and maximum of every block, zero always included, float32 `[..., blocks]`."""
    blocked = to_blocks(rows.astype(jnp.float32), fmt)
    axes: tuple[int, ...] = (-1,)
    if fmt.block == "tensor":
        axes = tuple(range(stacked, blocked.ndim))
    low = jnp.min(blocked, axis=axes, keepdims=True, initial=0.0)
    high = jnp.max(blocked, axis=axes, keepdims=True, initial=0.0)
    return low[..., 0], high[..., 0]


def _safe(scale: jax.Array) -> jax.Array:
    # A zero block has scale 0: it decodes to zeros, and must not divide by them.
    return jnp.where(scale == 0, jnp.ones_like(scale), scale)


def _cast_scale(scale: jax.Array, fmt: Format) -> jax.Array:
    # Beyond the largest number of the dtype, that number: an infinite scale would decode a zero code to NaN.
    largest = jnp.finfo(fmt.scale_dtype).max.astype(jnp.float32)
    return jnp.where(jnp.isinf(scale), scale, jnp.minimum(scale, largest)).astype(fmt.scale_dtype)


def block_params(low: jax.Array, high: jax.Array, fmt: Format) -> BlockParams:
    """Scale and zero point that spread the codes of `fmt` over the range `low <= 0 <= high` of each block."""
    element = ELEMENTS[fmt.element]
    if fmt.symmetric:
        absmax = jnp.maximum(-low, high)
        return BlockParams(_cast_scale(absmax * (1 / element.top), fmt), None)
    top = 2**element.bits - 1
    scale = _cast_scale((high * 0.5 - low * 0.5) * (2 / top), fmt)  # halves: high - low may overflow
    zero = jnp.clip(jnp.round(-low / _safe(scale.astype(jnp.float32))), 0, top)
    return BlockParams(scale, zero.astype(jnp.uint8))


def compute_params(rows: jax.Array, fmt: Format, stacked: int = 0) -> BlockParams:
    """Scales and zero points from the extremes of the blocks of `rows` (`[..., n]`), round-to-nearest's choice.

    Args:
      rows: `[..., n]`, any float dtype.
      fmt: the format.
      stacked: for "tensor" blocks, how many leading axes hold separate tensors (layers, experts).
    """
    return block_params(*block_extremes(rows, fmt, stacked), fmt)


def spread(per_block: jax.Array, fmt: Format, n: int) -> jax.Array:
    """Repeats a per-block value for the elements of its block: `[..., blocks]` -> `[..., n]` (or `[..., 1]`)."""
    if not isinstance(fmt.block, int):
        return per_block
    blocks = per_block.shape[-1]
    out = jnp.broadcast_to(per_block[..., None], (*per_block.shape, fmt.block))
    return out.reshape(*per_block.shape[:-1], blocks * fmt.block)[..., :n]


def encode_scaled(values: jax.Array, zero: jax.Array | float, fmt: Format) -> jax.Array:
    """Codes (uint8) of `values` already divided by their scale; `zero` is the zero point, where the format has one."""
    element = ELEMENTS[fmt.element]
    if element.kind == "int" and fmt.symmetric:
        half = 2 ** (element.bits - 1)
        q = jnp.clip(jnp.round(values), -half, half - 1).astype(jnp.int32)
        return (q & (2**element.bits - 1)).astype(jnp.uint8)
    if element.kind == "int":
        return jnp.clip(jnp.round(values) + zero, 0, 2**element.bits - 1).astype(jnp.uint8)
    if element.kind == "float":
        q = jnp.clip(values, -element.top, element.top).astype(element.storage)
        return jax.lax.bitcast_convert_type(q, jnp.uint8)
    return jnp.sum(values[..., None] > _thresholds(element.values), axis=-1, dtype=jnp.uint8)


def _thresholds(values: tuple[float, ...]) -> np.ndarray:
    """The midpoints of a codebook, rounded down: a float32 is above one of them just when it is above the midpoint."""
    table = np.asarray(values, np.float32).astype(np.float64)
    exact = (table[1:] + table[:-1]) / 2
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


def decode_codes(codes: jax.Array, fmt: Format) -> jax.Array:
    """The element that each code stands for, before scale and zero point: float32, the shape of `codes`."""
    element = ELEMENTS[fmt.element]
    if element.kind == "int" and fmt.symmetric:
        half = 2 ** (element.bits - 1)
        return ((codes.astype(jnp.int32) ^ half) - half).astype(jnp.float32)
    if element.kind == "int":
        return codes.astype(jnp.float32)
    if element.kind == "float":
        return jax.lax.bitcast_convert_type(codes, jnp.dtype(element.storage)).astype(jnp.float32)
    return jnp.asarray(element.values, jnp.float32)[codes]


def encode(rows: jax.Array, params: BlockParams, fmt: Format) -> jax.Array:
    """Rounds `rows` (`[..., n]`) to codes (uint8 `[..., n]`) under the given scales."""
    n = rows.shape[-1]
    inverse = spread(1 / _safe(params.scale.astype(jnp.float32)), fmt, n)
    zero = 0.0 if params.zero_point is None else spread(params.zero_point.astype(jnp.float32), fmt, n)
    return encode_scaled(rows.astype(jnp.float32) * inverse, zero, fmt)


def decode(codes: jax.Array, params: BlockParams, fmt: Format) -> jax.Array:
    """The float32 values `[..., n]` that `codes` (uint8 `[..., n]`) stand for."""
    n = codes.shape[-1]
    values = decode_codes(codes, fmt)
    if params.zero_point is not None:
        values = values - spread(params.zero_point.astype(jnp.float32), fmt, n)
    return values * spread(params.scale.astype(jnp.float32), fmt, n)


def code_table(fmt: Format) -> np.ndarray:
    """The element value of every code, float32 `[2**bits]`, computed without JAX: what the specification says."""
    element = ELEMENTS[fmt.element]
    codes = np.arange(2**element.bits)
    if element.kind == "int" and fmt.symmetric:
        return np.where(codes >= 2 ** (element.bits - 1), codes - 2**element.bits, codes).astype(np.float32)
    if element.kind == "int":
        return codes.astype(np.float32)
    if element.kind == "float":
        return codes.astype(np.uint8).view(getattr(ml_dtypes, element.storage)).astype(np.float32)
    return np.asarray(element.values, np.float32)
