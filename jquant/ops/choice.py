"""Which implementation multiplies with a QTensor on an NVIDIA GPU: one table, changed where a measurement says so.

"weights": the weight-only kernel (`pallas_kernels.quantized_matmul`), which reads the packed codes. It also takes a
    rounded input, as its codes in bfloat16: codes of at most eight bits, their zero point taken away, are numbers of
    bfloat16, and products of two of them are exact in its float32 sums.
"codes": the kernel of two 8-bit operands (`pallas_kernels.low_precision_matmul`). Codes of fewer bits are unpacked to
    bytes in front of it.
"xla": what XLA makes of the product.
"""

from collections.abc import Callable
from typing import NamedTuple

KERNELS = ("auto", "never", "require")

# How the numbers of each kernel have been proven. Kernels that are missing here are never chosen.
PROVEN = {
    "weights": "quantized_matmul, proven in Pallas' interpreters and on an H100",
    "codes": "low_precision_matmul, proven in Pallas' interpreter and on an H100",
    "attention": "decode_attention, proven in Pallas' interpreter and on an H100",
}

# Up to so many rows of the input (None: however many), what is taken, in this order, if it can do the product.
TABLE: dict[str, tuple[tuple[int | None, tuple[str, ...]], ...]] = {
    "float input": ((None, ("weights",)),),
    # Of 4096 rows XLA's is 1.66 times as fast as one of bfloat16 on an H200, the kernel 1.36 times.
    "int8 x int8": ((64, ("codes", "weights")), (None, ("xla",))),
    # Unpacked codes are 2.5 times the bytes of packed ones and more: few rows wait for bytes.
    "int8 x fewer bits": ((64, ("weights", "codes")), (None, ("xla",))),
    # XLA has none whose groups have scales of their own: it would run one product for each group.
    "int8 in groups": ((64, ("weights", "codes")), (None, ("codes", "weights"))),
    # XLA takes the products of fp8 that tensor cores have, the kernel does not (not timed); few rows wait for bytes.
    "fp8": ((64, ("weights",)), (None, ("xla",))),
    "fp8 in groups": ((64, ("weights", "codes")), (None, ("codes",))),
}
# The kernels of a kind, for a user who wants one in any case.
_ANY = {kind: ("weights",) if kind == "float input" else ("codes", "weights") for kind in TABLE}


class How(NamedTuple):
    """How a product runs.

    Attributes:
      text: for `explain`.
      kernel: the kernel in a program lowered for an NVIDIA GPU, and how its numbers have been proven; or "".
      reason: why that is none, or "".
    """

    text: str
    kernel: str = ""
    reason: str = ""


def order(kind: str, rows: int, force: bool = False) -> tuple[str, ...]:
    """What is tried, in this order, for a product of a kind of `TABLE` with `rows` rows of inputs (of each of a batch).

    With `force` a kernel is, even where the table prefers XLA.
    """
    best = next(names for most, names in TABLE[kind] if most is None or rows <= most)
    if force:
        best = (*(name for name in best if name != "xla"), *_ANY[kind])
    return tuple(dict.fromkeys(best))


def pick(kind: str, rows: int, kernels: str, why_not: Callable[[str], str | None]) -> tuple[str, str]:
    """What multiplies, and why that is no kernel ("" where it is one).

    Args:
      kind, rows: as for `order`.
      kernels: "auto", what the table says; "never", XLA; "require", a kernel wherever one can.
      why_not: why a kernel can't do the product.
    """
    if kernels == "never" or not rows:
        return "xla", "none is wanted" if rows else ""
    reasons = []
    for name in order(kind, rows, kernels == "require"):
        if name == "xla":
            break
        reason = why_not(name) if name in PROVEN else "its numbers are not proven"
        if reason is None:
            return name, ""
        reasons.append(reason)
    return "xla", "; ".join(dict.fromkeys(reasons)) or "XLA's own product is preferred"


def words(name: str, reason: str, written: bool = False, hopper: bool = False) -> str:
    """What `pick` found, for `explain`.

    `written`: the kernel of weights writes them out for XLA's product; `hopper`: on one it is another kernel.
    """
    how = "by XLA, the weight written out by a kernel" if written and name == "weights" else _WORDS[name]
    how += " (on a Hopper GPU the one through Mosaic)" if hopper and name == "weights" else ""
    return f"on an NVIDIA GPU {how}" + (f" (no kernel: {reason})" if reason else "")


_WORDS = {
    "weights": "by a kernel that reads codes",
    "attention": "by a kernel that reads codes",
    "codes": "by a kernel that multiplies codes",
    "xla": "by XLA",
}
