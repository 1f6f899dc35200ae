"""How a kernel reads keys, or values: which words a block of slots has, and the numbers that they stand for.

A word of codes holds several channels, one to a lane (see `quantized_matmul.triton`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.decode_attention.layout import Coded, Layout
from pallas_kernels.quantized_matmul import packed as two_at_a_time
from pallas_kernels.quantized_matmul import upcast
from pallas_kernels.quantized_matmul.elements import Element, plane_widths

LEAST = 16  # elements that a tensor core contracts at once, and columns that it has at least
BFLOAT16 = jnp.bfloat16


class View(NamedTuple):
    """How a kernel reads keys, or values: what is known before the program runs.

    Attributes:
      layout: what the codes stand for.
      dim: channels.
      lanes: codes of a word.
      scales: where they are multiplied: "none", "token", "group", "element" or "channel".
      scale_dtype: as stored.
      zeros: whether there are zero points.
      least: columns of a block of words at least.
    """

    layout: Layout
    dim: int
    lanes: int = 1
    scales: str = "none"
    scale_dtype: str = ""
    zeros: bool = False
    least: int = LEAST

    @property
    def chunks(self) -> int:
        """Parts of the channels whose products are apart: groups, where scales multiply sums."""
        return -(-self.dim // self.layout.group) if self.scales == "group" else 1

    @property
    def words(self) -> int:
        """Words of a vector."""
        return -(-self.dim // self.lanes)

    @property
    def chunk_words(self) -> int:
        return self.layout.group // self.lanes if self.scales == "group" else self.words

    @property
    def width(self) -> int:
        """Columns of a block of words: a power of two, at least `least`."""
        return max(self.least, _power(self.chunk_words))

    @property
    def groups(self) -> int:
        """Scales of a token."""
        return -(-self.dim // self.layout.group) if self.layout.group else 1

    @property
    def two(self) -> bool:
        """Whether an element is the sum of two bfloat16 numbers."""
        return self.layout.element is None and self.scale_dtype != "bfloat16"

    @property
    def unit(self) -> float:
        """What the decoded elements are still to be multiplied with."""
        e = self.layout.element
        return 1 / upcast.small_float_unit(e) if e is not None and e.kind == "float" else 1.0


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def view_of(coded: Coded, layout: Layout, dim: int, least: int = LEAST) -> View:
    """How the arrays are read. `scale_dtype` of floats is their own dtype.

    `least` columns of a block: of keys those are contracted, `LEAST` at once; of values every warp has 8.
    """
    e, group = layout.element, layout.group if layout.group < dim else 0
    layout = layout._replace(group=group)
    if e is None:
        return View(layout, dim, scale_dtype=coded.codes[0].dtype.name, least=least)
    name = "" if coded.scale is None else coded.scale.dtype.name
    zeros = coded.zero_point is not None
    if layout.tokens > 1 or not group:
        kind = "channel" if layout.tokens > 1 else "none" if coded.scale is None else "token"
        return View(layout, dim, _lanes(e, dim, least), kind, name, zeros, least)
    lanes = _lanes(e, group, least)
    on_sums = group == _power(group) and group // lanes >= least
    if on_sums:
        return View(layout, dim, lanes, "group", name, zeros, least)
    return View(layout, dim, _lanes(e, dim, least), "element", name, zeros, least)


def _lanes(e: Element, channels: int, least: int) -> int:
    """Codes of a word of 2 bytes where that leaves enough words, else of one of 1."""
    if e.bits in (2, 4, 8) and channels % upcast.lanes(e.bits, 2) == 0 and channels // upcast.lanes(e.bits, 2) >= least:
        return upcast.lanes(e.bits, 2)
    return upcast.lanes(e.bits)


def why_not(layout: Layout, dim: int, rows: int = 1, page_size: int = 0, keys: bool = True) -> str | None:
    """Why this kernel can't read keys or values of a layout; None where it can."""
    e, group = layout.element, layout.group if layout.group < dim else 0
    if rows > 32:
        return f"{rows} queries of a kv head; it is for at most 32"
    if dim > 512:
        return f"head_dim {dim} is above 512"
    if page_size and page_size & -page_size < LEAST:
        return f"pages of {page_size} slots are cut at no power of two of {LEAST}"
    if e is None:
        return None
    if len(plane_widths(e.bits)) > 1 and dim % 8:
        return f"codes of {e.bits} bits lie in planes, whose words need a head_dim of a multiple of 8, not {dim}"
    if layout.tokens > 1:
        if not keys:
            return "values with a scale for a channel"
        if layout.tokens != _power(layout.tokens):
            return f"blocks of {layout.tokens} tokens are no power of two"
        return None
    if group and (group != _power(group) or group % upcast.lanes(e.bits)):
        return f"groups of {group} channels are no power of two, or end within a word"
    return None


def largest_block(page_size: int) -> int:
    """Slots of a block at most, so that it lies in one page: a power of two."""
    return page_size & -page_size if page_size else 1 << 20


def arrays_of(coded: Coded, view: View) -> list[jax.Array]:
    """Codes as words, then scales and zero points as they are read."""
    if view.layout.element is None:
        return list(coded.codes)
    out = upcast.as_words(coded.codes, view.layout.element.bits, view.lanes)
    if coded.scale is not None:
        out.append(upcast.stored_scale(coded.scale))
    if coded.zero_point is not None:
        out.append(upcast.stored_zero(coded.zero_point))
    return out


class Block(NamedTuple):
    """`size` slots from `index * size` on, of one sequence and head: those from `low` to `high` are read, or all."""

    index: Any
    size: int
    low: Any
    high: Any
    row: Any
    head: Any
    table_ref: Any
    page_size: int
    whole: bool = False

    def slots(self) -> jax.Array:
        return self.index * self.size + jnp.arange(self.size, dtype=jnp.int32)

    def inside(self) -> jax.Array:
        slots = self.slots()
        return (slots >= self.low) & (slots < self.high)

    def place(self) -> tuple[Any, Any]:
        """The row of the arrays, and the slot in it that the block begins with."""
        start = self.index * self.size
        if self.table_ref is None:
            return self.row, start
        page = jnp.minimum(start // self.page_size, self.table_ref.shape[1] - 1)
        return jnp.maximum(self.table_ref[self.row, page], 0), start % self.page_size


class Reader(NamedTuple):
    """Reads keys, or values, of a block."""

    view: View
    words: tuple[Any, ...]
    scale: Any
    zero: Any
    packed: bool

    def codes(self, block: Block, chunk: int) -> tuple[jax.Array, ...]:
        """`[n, width]`: words of each plane, or floats."""
        view = self.view
        row, start = block.place()
        first = chunk * view.chunk_words
        limit = min(view.words, first + view.chunk_words)
        columns = first + jnp.arange(view.width) < limit if first + view.width > limit else None
        inside = both_of(None if block.whole else block.inside(), columns)
        if inside is not None:
            inside = jnp.broadcast_to(inside, (block.size, view.width))
        at = (row, block.head, pl.ds(start, block.size), columns_of(first, view.width, view.words))
        other = lambda r: None if inside is None else np.zeros((), r.dtype)
        return tuple(plt.load(r.at[at], mask=inside, other=other(r)) for r in self.words)

    def small(self, block: Block) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Scales and zero points of a block, as stored: of each chunk, or of each lane."""
        return tuple(() if r is None else self._small(r, block) for r in (self.scale, self.zero))  # type: ignore

    def _small(self, ref: Any, block: Block) -> tuple[jax.Array, ...]:
        view = self.view
        row, start = block.place()
        zero = np.zeros((), ref.dtype)
        if view.scales == "channel":
            return (self._of_channels(ref, block),)
        slots, inside = pl.ds(start, block.size), block.inside()
        if view.scales == "element":
            count = view.width * view.lanes // view.layout.group
            groups = jnp.arange(count)
            both = jnp.broadcast_to(inside[:, None], (block.size, count)) & (groups < view.groups)[None, :]
            return (plt.load(ref.at[row, block.head, slots, columns_of(0, count, view.groups)], mask=both, other=zero),)
        return tuple(
            plt.load(ref.at[row, block.head, slots, np.int32(chunk)], mask=inside, other=zero)
            for chunk in range(view.chunks)
        )

    def _of_channels(self, ref: Any, block: Block) -> jax.Array:
        """`[blocks of tokens, lanes * width]`, in the order of the channels."""
        tokens, (row, start) = self.view.layout.tokens, block.place()
        count, size = max(1, block.size // tokens), self.view.lanes * self.view.width
        channels = jnp.arange(size) < self.view.dim
        blocks = block.index * block.size + tokens * jnp.arange(count) < block.high
        at = ref.at[row, block.head, pl.ds(start // tokens, count), columns_of(0, size, self.view.dim)]
        return plt.load(at, mask=blocks[:, None] & channels[None, :], other=np.zeros((), ref.dtype))

    def _lane(self, a: jax.Array, lane: int) -> jax.Array:
        """`[blocks of tokens, width]`: of the channels of a lane; Triton has no slices."""
        count, lanes = a.shape[0], self.view.lanes
        if lanes == 1:
            return a
        parts = a.astype(jnp.float32).reshape(count, self.view.width, lanes)
        mine = lax.broadcasted_iota(jnp.int32, (1, 1, lanes), 2) == lane
        return jnp.sum(jnp.where(mine, parts, jnp.float32(0)), axis=2).astype(BFLOAT16)

    def numbers(self, scale: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """Scales as numbers; NaN where a code of 8 bits stands for it."""
        stored = self.view.scale_dtype
        out = upcast.scale_numbers(scale, stored, dtype)
        bad = {"float8_e4m3fn": 0x7F, "float8_e8m0fnu": 0xFF}.get(stored)
        return out if bad is None else jnp.where(scale == np.uint8(bad), jnp.asarray(jnp.nan, out.dtype), out)

    def values(self, words: tuple[jax.Array, ...], chunk: int, small: Any) -> list[tuple[jax.Array, ...]]:
        """bfloat16 `[n, width]` for every lane: the elements, as a sum of one or two numbers."""
        view, e = self.view, self.view.layout.element
        if e is None:
            if not view.two:
                return [words]
            high, low = halves(words[0].astype(jnp.float32))
            return [(high.astype(BFLOAT16), low.astype(BFLOAT16))]
        lanes = range(view.lanes)
        zeros = [self._zero(small[1], lane, chunk, words[0].shape) for lane in lanes]
        if self.packed and two_at_a_time.can(words, e, zeros, BFLOAT16):
            out = two_at_a_time.values(words[0], e, zeros, BFLOAT16)
        else:
            out = [self._plain(upcast.lane_codes(words, e.bits, lane), e, zeros[lane]) for lane in lanes]
        if e.storage == "float8_e4m3fn" and view.scales == "none":  # elsewhere the scale says it
            out = [_or_nan(o, upcast.lane_codes(words, e.bits, lane)) for lane, o in enumerate(out)]
        if view.scales in ("element", "channel"):
            scale = self.numbers(small[0][0], BFLOAT16)
            out = [upcast.times(o, self._over(scale, lane, o.shape), BFLOAT16) for lane, o in enumerate(out)]
        return [(o,) for o in out]

    def _plain(self, codes: jax.Array, e: Element, zero: jax.Array | None) -> jax.Array:
        if e.kind == "int":
            return upcast.integers(codes, e.bits, zero, BFLOAT16)
        if e.kind == "float":
            return upcast.small_floats(codes, e, BFLOAT16)
        smooth = upcast.odd_polynomial(e.table)
        if smooth is None:
            return upcast.table(codes, e.table, BFLOAT16)
        return upcast.polynomial(codes, smooth, e.bits, BFLOAT16)

    def _zero(self, zeros: Any, lane: int, chunk: int, shape: tuple[int, ...]) -> jax.Array | None:
        """Zero points that broadcast against the elements of a lane."""
        if not self.view.zeros:
            return None
        zero = self._spread(zeros, lane, chunk, shape)
        return zero.astype(BFLOAT16) if zero.dtype == jnp.uint8 else zero

    def _spread(self, zeros: tuple[jax.Array, ...], lane: int, chunk: int, shape: tuple[int, ...]) -> jax.Array:
        """Zero points that broadcast against the elements."""
        if self.view.scales in ("element", "channel"):
            return self._over(zeros[0], lane, shape)
        return zeros[chunk][:, None]

    def _over(self, a: jax.Array, lane: int, shape: tuple[int, ...]) -> jax.Array:
        """What groups, or channels for a block of tokens, have for their elements `[n, width]`."""
        if self.view.scales == "channel":
            a = self._lane(a, lane)
            return jnp.broadcast_to(a[:, None], (a.shape[0], shape[0] // a.shape[0], shape[1])).reshape(shape)
        return jnp.broadcast_to(a[:, :, None], (*a.shape, shape[1] // a.shape[1])).reshape(shape)


def reader_of(ins: list[Any], view: View, packed: bool) -> Reader:
    """Takes the arrays of `arrays_of` from the front of `ins`."""
    e = view.layout.element
    planes = 1 if e is None else len(plane_widths(e.bits))
    words = tuple(ins.pop(0) for _ in range(planes))
    scale = ins.pop(0) if e is not None and view.scales != "none" else None
    return Reader(view, words, scale, ins.pop(0) if view.zeros else None, packed)


def _or_nan(values: jax.Array, codes: jax.Array) -> jax.Array:
    """The values of codes of e4m3, NaN where a code is."""
    return jnp.where((codes & np.uint16(0x7F)) == np.uint16(0x7F), jnp.asarray(jnp.nan, values.dtype), values)


def columns_of(first: int, size: int, end: int) -> Any:
    """A slice that may reach over the end (what lies there is masked): Pallas refuses one whose ends it knows."""
    return pl.ds(first if first + size <= end else jnp.int32(first), size)


def both_of(rows: jax.Array | None, columns: jax.Array | None) -> jax.Array | None:
    if rows is None or columns is None:
        return None if rows is columns else rows[:, None] if rows is not None else columns[None, :]  # type: ignore
    return rows[:, None] & columns[None, :]


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 as two numbers: the first has the bits of a bfloat16, the second is the rest."""
    high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFF0000), jnp.float32)
    return high, x - high
