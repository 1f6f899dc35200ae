"""Element types: what a code stands for, and its planes. Data, no arithmetic of kernels.

The names and the numbers are those of the formats that the weights are stored in: integers in two's complement (with a
zero point: unsigned), the floats of OFP8 and of the OCP MX specification v1.0, the codebook of QLoRA (arXiv
2305.14314).
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

# QLoRA, appendix E.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Element(NamedTuple):
    """One element type.

    Attributes:
      bits: of a code.
      kind: "int", "float" or "table".
      storage: of floats, the name of the dtype whose bits the codes are.
      mantissa, bias: of floats, the explicit bits of the mantissa and the bias of the exponent.
      table: of tables, the value of each code.
    """

    bits: int
    kind: str
    storage: str = ""
    mantissa: int = 0
    bias: int = 0
    table: tuple[float, ...] = ()


ELEMENTS: dict[str, Element] = {
    **{f"int{b}": Element(b, "int") for b in range(2, 9)},
    "nf4": Element(4, "table", table=_NF4),
    "fp8_e4m3": Element(8, "float", "float8_e4m3fn", 3, 7),
    "fp8_e5m2": Element(8, "float", "float8_e5m2", 2, 15),
    "fp6_e2m3": Element(6, "float", "float6_e2m3fn", 3, 1),
    "fp6_e3m2": Element(6, "float", "float6_e3m2fn", 2, 3),
    "fp4_e2m1": Element(4, "float", "float4_e2m1fn", 1, 1),
}


def element(name: str | Element) -> Element:
    """The element of that name; itself, if it is one.

    Raises:
      ValueError: there is none.
    """
    if isinstance(name, Element):
        return name
    if name not in ELEMENTS:
        raise ValueError(f"element {name!r} is not known; choose one of {', '.join(ELEMENTS)}")
    return ELEMENTS[name]


def plane_widths(bits: int) -> tuple[int, ...]:
    """Codes are cut into planes of powers of two bits, high bits first: 3 = 2 + 1, 6 = 4 + 2."""
    return tuple(w for w in (8, 4, 2, 1) if bits & w)


def values(name: str | Element, signed: bool) -> np.ndarray:
    """The value of every code, float32 `[2**bits]`; `signed` says how integers count."""
    e = element(name)
    codes = np.arange(2**e.bits)
    if e.kind == "table":
        return np.asarray(e.table, np.float32)
    if e.kind == "float":
        return codes.astype(np.uint8).view(getattr(ml_dtypes, e.storage)).astype(np.float32)
    return np.where(signed & (codes >= 2 ** (e.bits - 1)), codes - 2**e.bits, codes).astype(np.float32)
