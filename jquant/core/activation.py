"""`Activation`: how a matmul's input is rounded; `Policy`: a weight's format and its input's, together.

A row of the input is quantized as a row of a weight is, by the functions of `core.formats`: "token" is one scale for
each row, found as it comes; "tensor" is one scale for all rows, found as they come or fixed by calibration.
"""

import dataclasses
import re

import jax

from jquant.core.errors import FormatError
from jquant.core.format_type import FP8_E4M3 as _FP8_E4M3
from jquant.core.format_type import INT4_G128 as _INT4_G128
from jquant.core.format_type import INT8 as _INT8
from jquant.core.formats import ELEMENTS, BlockParams, Format, compute_params, encode, parse_format

ACTIVATION_ELEMENTS = (*(name for name, e in ELEMENTS.items() if e.kind == "int"), "fp8_e4m3", "fp8_e5m2")
RANGES = ("dynamic", "max", "percentile", "mse")


@dataclasses.dataclass(frozen=True)
class Activation:
    """How the input of a matmul is rounded. Frozen and hashable: static data of a `QTensor`.

    Attributes:
      element: "int2" .. "int8", "fp8_e4m3" or "fp8_e5m2".
      block: "token", a scale for each row of the input; "tensor", one for the whole input (of each expert).
      symmetric: no zero point. Only integers may be asymmetric.
      range: "dynamic", from the input itself; or static, fixed by calibration ("tensor" only): "max", the extremes that
        were seen; "percentile"; "mse", the range with the least squared error.
      percentile: for the range "percentile": the share, in percent, of the |x| inside the range (asymmetric: of the
        numbers on each side of it).

    Raises:
      FormatError: a field is not one of the above.
    """

    element: str = "int8"
    block: str = "token"
    symmetric: bool = True
    range: str = "dynamic"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.element not in ACTIVATION_ELEMENTS:
            raise FormatError(
                f"Activation: element {self.element!r} must be one of {', '.join(ACTIVATION_ELEMENTS)}"
            )  # fmt: skip
        if self.block not in ("token", "tensor"):
            raise FormatError(f"Activation: block {self.block!r} must be 'token' or 'tensor'")
        if self.range not in RANGES:
            raise FormatError(f"Activation: range {self.range!r} must be one of {', '.join(RANGES)}")
        if self.static and self.block == "token":
            raise FormatError(
                f"Activation: a range per token can't be known before the token; range {self.range!r} needs "
                "block='tensor'"
            )
        if not 50 < self.percentile <= 100:
            raise FormatError(f"Activation: percentile {self.percentile} must be above 50 and at most 100")
        _ = self.format  # which refuses zero points that do not exist

    @property
    def static(self) -> bool:
        """Whether its range is fixed by calibration."""
        return self.range != "dynamic"

    @property
    def format(self) -> Format:
        """The format of a row of the input."""
        return Format(self.element, "channel" if self.block == "token" else "tensor", self.symmetric)

    def __str__(self) -> str:
        how = {"dynamic": "", "percentile": f"-p{self.percentile:g}"}.get(self.range, f"-{self.range}")
        block = "-tensor" if self.block == "tensor" and not self.static else ""
        return f"{self.element}{block}{how}{'' if self.symmetric else '-asym'}"

    def replace(self, **changes: object) -> "Activation":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Policy:
    """A weight's format and how the input of its matmuls is rounded. A Recipe takes it wherever it takes a Format.

    Attributes:
      weight: the weight's format.
      activation: the input's, or None to keep floats. A lookup has no input to round.
    """

    weight: Format
    activation: Activation | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Format) or not isinstance(self.activation, Activation | None):
            raise FormatError(f"Policy: needs a Format and an Activation or None, got {self.weight}, {self.activation}")

    def __str__(self) -> str:
        return str(self.weight) if self.activation is None else f"{self.weight}+{self.activation}"


W8A8 = Policy(_INT8, Activation("int8"))
W8A8_STATIC = Policy(_INT8, Activation("int8", "tensor", symmetric=False, range="max"))
W4A8 = Policy(_INT4_G128, Activation("int8"))
W4A16 = Policy(_INT4_G128)
FP8 = Policy(_FP8_E4M3, Activation("fp8_e4m3"))
FP8_STATIC = Policy(_FP8_E4M3, Activation("fp8_e4m3", "tensor", range="max"))

POLICIES: dict[str, Policy] = {name: value for name, value in list(globals().items()) if isinstance(value, Policy)}


def parse_activation(text: str) -> Activation:
    """The `Activation` that a name such as "int8", "fp8_e4m3-tensor", "int8-max-asym" or "int8-p99.9" stands for.

    The inverse of `str(activation)`.

    Raises:
      FormatError: the name can't be read.
    """
    element, *rest = text.strip().lower().split("-")
    block, symmetric, how, percentile = None, True, "dynamic", 99.99
    for word in rest:
        if word in ("token", "tensor"):
            block = word
        elif word in ("asym", "sym"):
            symmetric = word == "sym"
        elif word in RANGES:
            how = word
        elif re.fullmatch(r"p\d+(\.\d+)?", word):
            how, percentile = "percentile", float(word[1:])
        else:
            raise FormatError(
                f"activation {text!r}: {word!r} is not understood; write an element ({', '.join(ACTIVATION_ELEMENTS)}) "
                "and then any of -tensor, -asym, and for a static range -max, -mse or -p99.9, as in int8-max-asym"
            )
    return Activation(element, block or ("token" if how == "dynamic" else "tensor"), symmetric, how, percentile)


def parse_policy(text: str) -> Format | Policy:
    """What a name stands for: a preset ("w8a8", "fp8-static"), a format ("int4-g64"), or both ("int4-g64+int8").

    The inverse of `str` of a Format or a Policy.

    Raises:
      FormatError: the name can't be read.
    """
    preset = POLICIES.get(text.strip().upper().replace("-", "_"))
    if preset is not None:
        return preset
    weight, plus, activation = text.partition("+")
    return Policy(parse_format(weight), parse_activation(activation)) if plus else parse_format(weight)


def split_policy(value: Format | Policy) -> tuple[Format, Activation | None]:
    """The weight's format, and the activation or None."""
    return (value.weight, value.activation) if isinstance(value, Policy) else (value, None)


def encode_input(
    x: jax.Array, act: Activation, static: BlockParams | None = None
) -> tuple[jax.Array, BlockParams]:
    """Rounds the input of a matmul.

    Args:
      x: `[*batch, tokens, n]`, any float dtype.
      act: how.
      static: for a static range its scale and zero point, `[*batch, 1, 1]`; None finds them from `x`.

    Returns:
      Codes (uint8, the shape of `x`), and their scales and zero points, `[*batch, tokens or 1, 1]`.
    """
    fmt = act.format
    params = compute_params(x, fmt, stacked=x.ndim - 2) if static is None else static
    return encode(x, params, fmt), params
