"""`Format`, the names of formats, and the presets."""

import dataclasses
import math
import re

from jquant.core.elements import ELEMENTS
from jquant.core.errors import FormatError

# The words for dtypes of scales in the names of formats.
_SCALE_WORDS = {
    "f32": "float32", "bf16": "bfloat16", "f16": "float16", "e8m0": "float8_e8m0fnu", "e4m3": "float8_e4m3fn",
    "u8": "uint8",
}  # fmt: skip
_ZERO_WORDS = {"zf32": "float32", "zbf16": "bfloat16", "zf16": "float16", "ze3m4": "float8_e3m4"}
SCALE_DTYPES = tuple(_SCALE_WORDS.values())
ZERO_DTYPES = ("uint8", *_ZERO_WORDS.values())
SCALE_RULES = ("floor", "even", "ceil")
DOUBLE_QUANT_BLOCK = 256  # QLoRA's


@dataclasses.dataclass(frozen=True)
class Format:
    """How the numbers of a tensor are stored. Frozen and hashable: static data of a `QTensor`.

    Attributes:
      element: "int2" .. "int8", "nf4", "ternary", "fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1".
      block: what shares one scale: `g` (an int), groups of g along the contracted axes, the last one perhaps shorter;
        `(r, g)`, tiles of r rows by g, r counted along the last axis that is not contracted (tiles at the ends are
        perhaps smaller); "channel", everything along the contracted axes (for activations: per token); "tensor", the
        whole tensor.
      symmetric: no zero point. Only integers may be asymmetric.
      scale_dtype: dtype of the scales. "float32", "bfloat16", "float16"; "float8_e8m0fnu", powers of two;
        "float8_e4m3fn"; "uint8", integers that only a second level of scales makes numbers.
      outer_block: the second level: what shares one float32 scale of the scales. None, there is none; "tensor", the
        whole tensor (NVFP4); "channel", the scales of a row; `b` (an int), b scales of a row, or where a row has
        fewer, those of as many whole rows as fit (double quantization).
      scale_rule: how "float8_e8m0fnu" scales are rounded to powers of two. "floor", as the OCP MX specification: the
        exponent of absmax less that of the element's largest power of two (up to a quarter or so of a block's largest
        numbers may be clipped); "even", the same with absmax first rounded to the element's mantissa; "ceil", the
        smallest scale that clips nothing.
      four_over_six: each block of fp4_e2m1 takes the better (by squared error) of two e4m3 scales, that which maps its
        absmax to 6, and that which maps it to 4 (arXiv 2512.02010).
      zero_dtype: dtype of the zero points of an asymmetric format. "uint8" is a code; a float may lie between codes;
        "float8_e3m4" takes one byte too (it ends at 15.5, so it is for at most 4 bits).

    Raises:
      FormatError: a field is not one of the above, or two do not fit together.
    """

    element: str
    block: int | str | tuple[int, int] = "channel"
    symmetric: bool = True
    scale_dtype: str = "float32"
    outer_block: int | str | None = None
    scale_rule: str = "floor"
    four_over_six: bool = False
    zero_dtype: str = "uint8"

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_scales(self)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return ELEMENTS[self.element].bits

    @property
    def group_size(self) -> int | None:
        """Elements of a row that share a scale, or None where that is the whole row."""
        if isinstance(self.block, tuple):
            return self.block[1]
        return self.block if isinstance(self.block, int) else None

    @property
    def tile_rows(self) -> int:
        """Rows of a 2-D tile, 1 without tiles."""
        return self.block[0] if isinstance(self.block, tuple) else 1

    @property
    def rows_apart(self) -> bool:
        """Whether a row is encoded the same whatever the other rows are."""
        return self.block != "tensor" and self.tile_rows == 1 and self.outer_block in (None, "channel")

    def blocks(self, n: int) -> int:
        """Number of blocks in a row of `n` elements."""
        return 1 if self.group_size is None else -(-n // self.group_size)

    def outer_rows(self, blocks: int) -> int:
        """How many rows of scales, each of `blocks`, share those of the second level."""
        return max(1, self.outer_block // max(blocks, 1)) if isinstance(self.outer_block, int) else 1

    def outer_blocks(self, blocks: int) -> int:
        """Number of second-level scales for a row of `blocks` scales."""
        return max(1, -(-blocks // self.outer_block)) if isinstance(self.outer_block, int) else 1

    def __str__(self) -> str:
        plain = self.replace(scale_rule="floor", four_over_six=False)
        name = next((name for name, known in ALIASES.items() if known == plain), None)
        return "-".join(_words(self) if name is None else [name, *_rules(self)])

    def replace(self, **changes: object) -> "Format":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def fitted(fmt: Format, shape: tuple[int, ...], contracted: tuple[int, ...], batch: tuple[int, ...]) -> Format:
    """The format with as many rows to a tile, and to a second-level scale, as the axes of a leaf allow.

    They lie along the last kept axis. Where that is one of several axes of rows (heads and their channels), the rows of
    a tile must divide it, and a second-level scale is for one row. Where it is solved apart (experts), rows share
    neither.

    Args:
      fmt: the format asked for.
      shape: of the leaf.
      contracted, batch: negative axes: those summed over, and those solved apart.
    """
    kept = [a for a in range(-len(shape), 0) if a not in contracted]
    rest = [a for a in kept if a not in batch]
    last = bool(rest) and rest[-1] == kept[-1]
    if fmt.rows_apart or (last and len(rest) == 1):
        return fmt
    if fmt.outer_rows(fmt.blocks(math.prod(shape[a] for a in contracted))) > 1:
        fmt = fmt.replace(outer_block="channel")
    if isinstance(fmt.block, tuple):
        rows = max(r for r in range(1, fmt.tile_rows + 1) if shape[kept[-1]] % r == 0) if last else 1
        fmt = fmt.replace(block=(rows, fmt.block[1]) if rows > 1 else fmt.block[1])
    return fmt


def _is_size(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _check_fields(fmt: Format) -> None:
    if fmt.element not in ELEMENTS:
        raise FormatError(f"Format: element {fmt.element!r} does not exist; choose one of {', '.join(ELEMENTS)}")
    tile = isinstance(fmt.block, tuple) and len(fmt.block) == 2 and all(map(_is_size, fmt.block))
    if not (_is_size(fmt.block) or tile or fmt.block in ("channel", "tensor")):
        raise FormatError(
            f"Format: block {fmt.block!r} must be a group size >= 1, 'channel' or 'tensor', or (rows, size) of a tile"
        )
    if tile and fmt.tile_rows == 1:
        raise FormatError(f"Format: a tile of one row, {fmt.block!r}, is written block={fmt.group_size}")
    if not fmt.symmetric and ELEMENTS[fmt.element].kind != "int":
        raise FormatError(f"Format: {fmt.element} has no zero point; only int2 to int8 can be asymmetric")
    for name, value, known in (
        ("scale_dtype", fmt.scale_dtype, SCALE_DTYPES),
        ("scale_rule", fmt.scale_rule, SCALE_RULES),
        ("zero_dtype", fmt.zero_dtype, ZERO_DTYPES),
    ):
        if value not in known:
            raise FormatError(f"Format: {name} {value!r} must be one of {', '.join(known)}")
    if not (fmt.outer_block in (None, "tensor", "channel") or _is_size(fmt.outer_block)):
        raise FormatError(f"Format: outer_block {fmt.outer_block!r} must be None, 'tensor', 'channel' or a size >= 1")


def _check_scales(fmt: Format) -> None:
    element, powers = ELEMENTS[fmt.element], fmt.scale_dtype == "float8_e8m0fnu"
    if fmt.outer_block is None and fmt.scale_dtype == "uint8":
        raise FormatError("Format: uint8 scales are numbers by a second level only; give an outer_block, such as 256")
    if fmt.outer_block is not None and fmt.scale_dtype not in ("uint8", "float8_e4m3fn"):
        raise FormatError(f"Format: a second level (outer_block) is for uint8 and e4m3 scales, not {fmt.scale_dtype}")
    if powers and not fmt.symmetric:
        raise FormatError("Format: e8m0 scales are for symmetric formats; choose a float scale_dtype")
    if fmt.scale_rule != "floor" and not powers:
        raise FormatError(f"Format: scale_rule={fmt.scale_rule!r} is for scale_dtype='float8_e8m0fnu'")
    if fmt.scale_rule == "even" and element.kind != "float":
        raise FormatError(f"Format: scale_rule='even' is for floats, {fmt.element} has no mantissa")
    if fmt.four_over_six and (fmt.element, fmt.scale_dtype) != ("fp4_e2m1", "float8_e4m3fn"):
        raise FormatError("Format: four_over_six is for fp4_e2m1 with scale_dtype='float8_e4m3fn'")
    if fmt.zero_dtype == "float8_e3m4" and element.bits > 4:
        raise FormatError(f"Format: float8_e3m4 zero points end at 15.5, the codes of {fmt.element} do not; give zbf16")
    if fmt.zero_dtype != "uint8" and fmt.symmetric:
        raise FormatError(f"Format: zero_dtype={fmt.zero_dtype!r} is for asymmetric formats; give symmetric=False")


def _default_scale_dtype(block: int | str | tuple[int, int]) -> str:
    # Groups pay for their scale again and again; a channel's or a tile's scale costs nothing.
    return "bfloat16" if isinstance(block, int) else "float32"


def _words(fmt: Format) -> list[str]:
    """The words of a format's name."""
    block = f"g{fmt.block}" if isinstance(fmt.block, int) else "tensor" if fmt.block == "tensor" else ""
    block = f"{fmt.tile_rows}x{fmt.group_size}" if isinstance(fmt.block, tuple) else block
    scale = next(w for w, dtype in _SCALE_WORDS.items() if dtype == fmt.scale_dtype)
    outer = {None: "", "tensor": "global"}.get(fmt.outer_block, f"outer{fmt.outer_block}")  # type: ignore[arg-type]
    if (scale, fmt.outer_block) == ("u8", DOUBLE_QUANT_BLOCK):
        scale, outer = "dq", ""
    if fmt.scale_dtype == _default_scale_dtype(fmt.block):
        scale = ""
    zero = next((w for w, dtype in _ZERO_WORDS.items() if dtype == fmt.zero_dtype), "")
    words = [fmt.element, block, "" if fmt.symmetric else "asym", zero, scale, outer]
    return [w for w in words if w] + _rules(fmt)


def _rules(fmt: Format) -> list[str]:
    return [fmt.scale_rule] * (fmt.scale_rule != "floor") + ["4o6"] * fmt.four_over_six


def parse_format(text: str) -> Format:
    """The `Format` that a name such as "int4-g64", "int3-g64-asym", "nf4-dq", "mxfp4" or "fp8_e4m3-128x128" stands for.

    The inverse of `str(format)`. Groups have bfloat16 scales unless another dtype is said. The words: a group size g64,
    a tile 128x128, tensor; asym, with float zero points zbf16, ze3m4; the dtype of the scales f32, bf16, f16, e8m0,
    e4m3, u8; a second level: dq (u8 scales in blocks of 256), global (one for the tensor), outer256, outerchannel;
    rules for e8m0 even, ceil; 4o6 (four over six). mxfp8, mxfp8_e5m2, mxfp6, mxfp6_e3m2, mxfp4 and nvfp4 are whole
    formats, more words change them.

    Raises:
      FormatError: the name can't be read.
    """
    first, *rest = text.strip().lower().split("-")
    known = ALIASES.get(first)
    fields: dict[str, object] = {} if known is None else dataclasses.asdict(known)
    fields.setdefault("element", first)
    for word in rest:
        fields |= _read_word(text, word)
    if fields.get("scale_dtype") == "uint8" and fields["element"] == "nf4":
        fields.setdefault("block", 64)  # QLoRA's
    fields.setdefault("scale_dtype", _default_scale_dtype(fields.get("block", "channel")))  # type: ignore[arg-type]
    return Format(**fields)  # type: ignore[arg-type]


def _read_word(text: str, word: str) -> dict[str, object]:
    """The fields that a word of a name sets."""
    if word in _WORDS:
        return _WORDS[word]
    if m := re.fullmatch(r"g([1-9]\d*)", word):
        return {"block": int(m[1])}
    if m := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word):
        return {"block": (int(m[1]), int(m[2]))}
    if m := re.fullmatch(r"outer([1-9]\d*)", word):
        return {"outer_block": int(m[1])}
    raise FormatError(
        f"format {text!r}: {word!r} is not understood; write an element ({', '.join(ELEMENTS)}) and then any of -g64 "
        "(group size), -128x128 (tiles), -tensor, -asym, -f32/-bf16/-f16 (dtype of the scales), -dq (double "
        f"quantization), as in int4-g64-asym; or one of {', '.join(ALIASES)}"
    )


_WORDS: dict[str, dict[str, object]] = {
    "channel": {"block": "channel"},
    "tensor": {"block": "tensor"},
    "sym": {"symmetric": True},
    "asym": {"symmetric": False},
    **{word: {"scale_dtype": dtype} for word, dtype in _SCALE_WORDS.items()},
    **{word: {"zero_dtype": dtype} for word, dtype in _ZERO_WORDS.items()},
    "dq": {"scale_dtype": "uint8", "outer_block": DOUBLE_QUANT_BLOCK},
    "global": {"outer_block": "tensor"},
    "outerchannel": {"outer_block": "channel"},
    **{rule: {"scale_rule": rule} for rule in SCALE_RULES},
    "4o6": {"four_over_six": True},
}

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
NF4_DQ = Format("nf4", 64, scale_dtype="uint8", outer_block=DOUBLE_QUANT_BLOCK)
TERNARY = Format("ternary", "tensor")
FP8_E4M3 = Format("fp8_e4m3")
FP8_E5M2 = Format("fp8_e5m2")
FP8_E4M3_TENSOR = Format("fp8_e4m3", "tensor")
FP8_E4M3_BLOCK128 = Format("fp8_e4m3", (128, 128))
MXFP8 = Format("fp8_e4m3", 32, scale_dtype="float8_e8m0fnu")
MXFP8_E5M2 = Format("fp8_e5m2", 32, scale_dtype="float8_e8m0fnu")
MXFP6 = Format("fp6_e2m3", 32, scale_dtype="float8_e8m0fnu")
MXFP6_E3M2 = Format("fp6_e3m2", 32, scale_dtype="float8_e8m0fnu")
MXFP4 = Format("fp4_e2m1", 32, scale_dtype="float8_e8m0fnu")
NVFP4 = Format("fp4_e2m1", 16, scale_dtype="float8_e4m3fn", outer_block="tensor")
NVFP4_FOUR_OVER_SIX = NVFP4.replace(four_over_six=True)

# Formats that have a name of their own, which more words may follow.
ALIASES: dict[str, Format] = {
    "mxfp8": MXFP8, "mxfp8_e5m2": MXFP8_E5M2, "mxfp6": MXFP6, "mxfp6_e3m2": MXFP6_E3M2, "mxfp4": MXFP4,
    "nvfp4": NVFP4,
}  # fmt: skip

PRESETS: dict[str, Format] = {name: value for name, value in list(globals().items()) if isinstance(value, Format)}
