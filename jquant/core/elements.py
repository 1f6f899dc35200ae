"""Element types: the codes of a number without its scale, and the number nearest to a value.

Integers and 8-bit floats are converted by XLA itself. The floats of 4 and 6 bits are not (XLA:CPU has no 6-bit types),
so they are made from the exponent and the rounded mantissa of a float32. Codebooks are searched.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from jquant.core.format_type import Format

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
      mantissa, bias: for floats, the explicit bits of the mantissa, and the bias of the exponent.
    """

    bits: int
    kind: str
    top: float
    storage: str = ""
    values: tuple[float, ...] = ()
    mantissa: int = 0
    bias: int = 0

    @property
    def top_exponent(self) -> int:
        """Of the largest power of two that is no larger than `top`: emax of the OCP MX specification."""
        return math.floor(math.log2(self.top))


# A symmetric b-bit integer has codes -2**(b-1) .. 2**(b-1)-1; the scale spreads the block over half the number of steps
# on each side, absmax / ((2**b - 1) / 2), as GPTQ's code and compressed-tensors do. The 4- and 6-bit floats are those
# of the OCP MX specification v1.0, sections 5.3.2 and 5.3.3; ternary is BitNet b1.58's (arXiv 2402.17764).
ELEMENTS: dict[str, Element] = {
    **{f"int{b}": Element(b, "int", (2**b - 1) / 2) for b in range(2, 9)},
    "nf4": Element(4, "codebook", 1.0, values=NF4_VALUES),
    "ternary": Element(2, "codebook", 1.0, values=(-1.0, 0.0, 1.0)),
    "fp8_e4m3": Element(8, "float", 448.0, storage="float8_e4m3fn", mantissa=3, bias=7),
    "fp8_e5m2": Element(8, "float", 57344.0, storage="float8_e5m2", mantissa=2, bias=15),
    "fp6_e2m3": Element(6, "float", 7.5, storage="float6_e2m3fn", mantissa=3, bias=1),
    "fp6_e3m2": Element(6, "float", 28.0, storage="float6_e3m2fn", mantissa=2, bias=3),
    "fp4_e2m1": Element(4, "float", 6.0, storage="float4_e2m1fn", mantissa=1, bias=1),
}


def encode_scaled(values: jax.Array, zero: jax.Array | float, fmt: "Format") -> jax.Array:
    """Codes (uint8) of `values` already divided by their scale; `zero` is the zero point, where the format has one."""
    element = ELEMENTS[fmt.element]
    if element.kind == "int" and fmt.symmetric:
        half = 2 ** (element.bits - 1)
        q = jnp.clip(jnp.round(values), -half, half - 1).astype(jnp.int32)
        return (q & (2**element.bits - 1)).astype(jnp.uint8)
    if element.kind == "int":
        shifted = jnp.round(values) + zero if fmt.zero_dtype == "uint8" else jnp.round(values + zero)
        return jnp.clip(shifted, 0, 2**element.bits - 1).astype(jnp.uint8)
    if element.kind == "codebook":
        return search(values, element.values)
    if element.bits == 8:
        q = jnp.clip(values, -element.top, element.top).astype(element.storage)
        return jax.lax.bitcast_convert_type(q, jnp.uint8)
    return _to_minifloat(values, element)


def decode_codes(codes: jax.Array, fmt: "Format") -> jax.Array:
    """The element that each code stands for, before scale and zero point: float32, the shape of `codes`."""
    element = ELEMENTS[fmt.element]
    if element.kind == "int" and fmt.symmetric:
        half = 2 ** (element.bits - 1)
        return ((codes.astype(jnp.int32) ^ half) - half).astype(jnp.float32)
    if element.kind == "int":
        return codes.astype(jnp.float32)
    if element.kind == "codebook":
        return jnp.asarray(_whole_table(element), jnp.float32)[codes]
    if element.bits == 8:
        return jax.lax.bitcast_convert_type(codes, jnp.dtype(element.storage)).astype(jnp.float32)
    return _from_minifloat(codes, element)


def code_table(fmt: "Format") -> np.ndarray:
    """The element value of every code, float32 `[2**bits]`, computed without JAX: what the specification says.

    NaN where a code stands for no number.
    """
    element = ELEMENTS[fmt.element]
    codes = np.arange(2**element.bits)
    if element.kind == "int" and fmt.symmetric:
        return np.where(codes >= 2 ** (element.bits - 1), codes - 2**element.bits, codes).astype(np.float32)
    if element.kind == "int":
        return codes.astype(np.float32)
    if element.kind == "float":
        return codes.astype(np.uint8).view(getattr(ml_dtypes, element.storage)).astype(np.float32)
    return _whole_table(element)


def _whole_table(element: Element) -> np.ndarray:
    table = np.full(2**element.bits, np.nan, np.float32)
    table[: len(element.values)] = element.values
    return table


# --- codebooks ---


def search(values: jax.Array, table: tuple[float, ...]) -> jax.Array:
    """By halves, with `select`: as many compares for a number as its code has bits."""
    thresholds = _thresholds(table)

    def between(low: int, high: int) -> jax.Array:
        if low == high:
            return jnp.full((), low, jnp.uint8)
        middle = (low + high) // 2
        return jnp.where(values > thresholds[middle], between(middle + 1, high), between(low, middle))

    return between(0, len(table) - 1)


def _thresholds(values: tuple[float, ...]) -> np.ndarray:
    """The midpoints of a codebook, rounded down: a float32 is above one of them just when it is above the midpoint."""
    table = np.asarray(values, np.float32).astype(np.float64)
    exact = (table[1:] + table[:-1]) / 2
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


# --- floats of 4 and 6 bits ---
#
# With e the exponent of a value, no smaller than that of the smallest normal number, a code without its sign is
#
#     round(|value| / 2**(e - mantissa)) + (e - smallest e) * 2**mantissa
#
# subnormal numbers included, and a carry of the rounding goes where it belongs.


def _to_minifloat(values: jax.Array, element: Element) -> jax.Array:
    first = 128 - element.bias  # the float32 exponent field of the smallest normal number
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    size = jnp.minimum(jnp.abs(values), element.top)
    exponent = jnp.maximum(jax.lax.bitcast_convert_type(size, jnp.int32) >> 23, first)
    per_step = jax.lax.bitcast_convert_type((254 + element.mantissa - exponent) << 23, jnp.float32)
    code = jnp.round(size * per_step).astype(jnp.int32) + ((exponent - first) << element.mantissa)
    sign = jnp.where(bits < 0, 1 << (element.bits - 1), 0)
    return (code | sign).astype(jnp.uint8)


def _from_minifloat(codes: jax.Array, element: Element) -> jax.Array:
    wide = codes.astype(jnp.int32)
    size = wide & (2 ** (element.bits - 1) - 1)
    exponent = jnp.maximum(size >> element.mantissa, 1)
    steps = (size - ((exponent - 1) << element.mantissa)).astype(jnp.float32)
    step = jax.lax.bitcast_convert_type((exponent + (127 - element.bias - element.mantissa)) << 23, jnp.float32)
    sign = (wide >> (element.bits - 1)) << 31
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(steps * step, jnp.int32) | sign, jnp.float32)
