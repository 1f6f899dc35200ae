"""How a cache stores its numbers: `CacheFormat`, the names of such formats, and the presets."""

import dataclasses
import re

from jquant.core.errors import FormatError
from jquant.core.formats import Format, parse_format

FLOATS = ("float32", "bfloat16", "float16")
CODEBOOKS = {"lloyd2": 2, "lloyd3": 3, "lloyd4": 4}


@dataclasses.dataclass(frozen=True)
class Coding:
    """How the keys, or the values, of a cache are stored.

    Attributes:
      format: a `Format`, whose rows are the channels of one token and head: "channel" is one scale for a token and
        head, `g` one for g of its channels, "tensor" a static one (8-bit floats only). Or "lloyd2" .. "lloyd4", the
        Lloyd-Max codebook of a normal distribution with a scale for a token and head (TurboQuant, arXiv 2504.19874).
        Or a float dtype.
      tokens: N > 1 lets every channel have a scale for N consecutive tokens instead (KIVI's keys, arXiv 2402.02750); a
        block of N is encoded when it is whole and stays in float until then. 1: a token is encoded as it comes.
      rotations: how often a vector is turned by random signs and a Hadamard matrix before it is encoded, 0 to 2.
      search: choose each block's range by its squared error, among ranges shrunk by 1, 0.95, ..., 0.75, and with float
        zero points among those moved by a part of a code too.

    Raises:
      FormatError: fields that are unknown or do not go together.
    """

    format: Format | str
    tokens: int = 1
    rotations: int = 0
    search: bool = False

    def __post_init__(self) -> None:
        fmt = self.format
        if isinstance(fmt, str) and fmt not in (*FLOATS, *CODEBOOKS):
            raise FormatError(f"Coding: {fmt!r} is no Format, float dtype ({', '.join(FLOATS)}) or codebook")
        if self.tokens < 1 or not 0 <= self.rotations <= 2:
            raise FormatError(f"Coding: needs tokens >= 1 and 0 <= rotations <= 2, got {self.tokens}, {self.rotations}")
        if isinstance(fmt, str):
            if self.tokens > 1 or self.search or (fmt in FLOATS and self.rotations):
                raise FormatError(f"Coding: {fmt} takes no blocks of tokens and no search, and floats no rotation")
        else:
            _check_format(fmt, self.tokens)

    @property
    def bits(self) -> int:
        """Bits of one code, scales not counted; of floats, those of the float."""
        if isinstance(self.format, Format):
            return self.format.bits
        return CODEBOOKS.get(self.format) or (32 if self.format == "float32" else 16)

    @property
    def is_float(self) -> bool:
        return self.format in FLOATS

    @property
    def static(self) -> bool:
        """Whether it has a scale that is given beforehand: of 8-bit floats with one scale, and above e4m3 scales."""
        fmt = self.format
        return isinstance(fmt, Format) and (fmt.block == "tensor" or fmt.outer_block == "tensor")

    def __str__(self) -> str:
        fmt, name = self.format, str(self.format)
        if isinstance(fmt, Format) and fmt.block == "channel" and fmt.scale_dtype in ("float32", "bfloat16"):
            # A scale for every token and head is bfloat16 unless another is said.
            name = f"{name}-f32" if fmt.scale_dtype == "float32" else name.replace("-bf16", "")
        words = [f"t{self.tokens}"] * (self.tokens > 1) + ["search"] * self.search
        return "-".join([name, *words, *{0: [], 1: ["rot"], 2: ["rot2"]}[self.rotations]])


def _check_format(fmt: Format, tokens: int) -> None:
    eight = fmt.element in ("fp8_e4m3", "fp8_e5m2")
    if fmt.block == "tensor" and not eight:
        raise FormatError(f"cache format {fmt}: one static scale is for fp8_e4m3 and fp8_e5m2; leave out -tensor")
    if isinstance(fmt.block, tuple) or fmt.element == "ternary" or fmt.scale_dtype == "uint8":
        raise FormatError(f"cache format {fmt}: tiles, ternary and uint8 scales are for weights; give groups, -g32")
    if tokens > 1 and (fmt.block != "channel" or fmt.outer_block is not None):
        raise FormatError(f"cache format {fmt}: blocks of tokens (-t{tokens}) have a scale for each channel, no groups")


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """How a cache is stored. Frozen and hashable: static data of a `KVCache`.

    Attributes:
      keys, values: their codings.
      sinks: so many first tokens stay in float.
      residual: so many last tokens stay in float (and those of a block of tokens that is not whole).
      seed: of the signs of rotations.
    """

    keys: Coding
    values: Coding
    sinks: int = 0
    residual: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.residual < 0:
            raise FormatError(f"CacheFormat: sinks {self.sinks} and residual {self.residual} must not be negative")

    @property
    def tokens(self) -> int:
        """How many tokens are encoded together."""
        blocks = {c.tokens for c in (self.keys, self.values)} - {1}
        return max(blocks, default=1)

    @property
    def window(self) -> int:
        """How many last tokens have a place in the float window: 0 without one."""
        if self.keys.is_float and self.values.is_float:
            return 0
        return self.residual + (self.tokens if self.tokens > 1 else 0)

    def __str__(self) -> str:
        same = self.keys == self.values
        parts = [str(self.keys)] if same else [f"keys={self.keys}", f"values={self.values}"]
        parts += [f"{n}={v}" for n in ("sinks", "residual", "seed") if (v := getattr(self, n))]
        return ",".join(parts)

    def replace(self, **changes: object) -> "CacheFormat":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def parse_coding(text: str) -> Coding:
    """The `Coding` of a name: a format's ("int4-g64-asym", "nvfp4"), "lloyd4" or a float dtype, and then any of -t64
    (blocks of tokens), -search, -rot, -rot2.

    Raises:
      FormatError: the name can't be read.
    """
    words, tokens, rotations, search = [], 1, 0, False
    for word in text.strip().lower().split("-"):
        if m := re.fullmatch(r"t([1-9]\d*)", word):
            tokens = int(m[1])
        elif word in ("rot", "rot2"):
            rotations = 2 if word == "rot2" else 1
        elif word == "search":
            search = True
        else:
            words.append(word)
    name = "-".join(words)
    if name in (*FLOATS, *CODEBOOKS):
        return Coding(name, tokens, rotations, search)
    try:
        fmt = parse_format(name)
    except FormatError as error:
        raise FormatError(
            f"{error}; a cache also takes {', '.join((*FLOATS, *CODEBOOKS))}, behind a format any of -t32 (blocks of "
            f"tokens), -search, -rot, -rot2, or alone one of {', '.join(PRESETS)}"
        ) from error
    if fmt.block == "channel" and not {"f32", "bf16", "f16"} & set(words) and fmt.scale_dtype == "float32":
        fmt = fmt.replace(scale_dtype="bfloat16")
    return Coding(fmt, tokens, rotations, search)


def parse(text: "str | CacheFormat") -> CacheFormat:
    """The `CacheFormat` of a name; the inverse of `str`. A CacheFormat is given back as it is.

    "int8", "int4-g64-asym-rot", "float32": keys and values alike. Or settings with commas between them:
    "keys=int4-t64-asym,values=int4-g64-asym,sinks=4,residual=64,seed=1". Or the name of a preset: fine4, fine2, kivi4,
    kivi2, turbo4, turbo2.

    Raises:
      FormatError: the name can't be read.
    """
    if isinstance(text, CacheFormat):
        return text
    fields: dict[str, object] = {}
    for part in text.strip().lower().split(","):
        name, equals, value = part.strip().partition("=")
        if not equals:
            known = PRESETS.get(name)
            coding = parse_coding(name) if known is None else None
            fields |= dataclasses.asdict(known) if known else {}
            fields |= {"keys": known.keys, "values": known.values} if known else {"keys": coding, "values": coding}
        elif name in ("keys", "values"):
            fields[name] = parse_coding(value)
        elif name in ("sinks", "residual", "seed") and value.isdecimal():
            fields[name] = int(value)
        else:
            raise FormatError(
                f"cache format {text!r}: {part.strip()!r} is not understood; write a format such as int8 or "
                "int4-g64-asym-rot, or keys=FORMAT,values=FORMAT, and then sinks=4, residual=64 (tokens in float)"
            )
    if not {"keys", "values"} <= fields.keys():
        raise FormatError(f"cache format {text!r}: it does not say how keys and values are stored; begin with a format")
    return CacheFormat(**fields)  # type: ignore[arg-type]


def _pair(keys: str, values: str, **fields: int) -> CacheFormat:
    return CacheFormat(parse_coding(keys), parse_coding(values), **fields)


PRESETS: dict[str, CacheFormat] = {
    # KIVI's groups of 32 and window of 128; with bfloat16 scales of values they would take 0.297 and 0.172 of bfloat16.
    "kivi4": _pair("int4-t32-asym", "int4-g32-asym-e4m3", residual=128),
    "kivi2": _pair("int2-t32-asym", "int2-g32-asym-e4m3", residual=128),
    # Of what was tried, the least divergence for these bytes. Rounded keys cost more of it than values: smaller groups.
    "fine4": _pair("int4-g16-asym-ze3m4-e4m3-search-rot", "int4-g64-asym-ze3m4-e4m3-search-rot", sinks=4),
    "fine2": _pair("int2-g16-asym-ze3m4-e4m3-search-rot", "int2-g64-asym-ze3m4-e4m3-search-rot", sinks=4),
    "turbo4": _pair("lloyd4-rot", "lloyd4-rot"),
    "turbo2": _pair("lloyd2-rot2", "lloyd2-rot2"),
}
