"""Attention of one or a few queries over quantized codes, through Pallas' Triton backend: flash decoding.

A program has one sequence, one kv head with all its query heads, and one of `splits` parts of the slots that this
sequence reads (Flash-Decoding: parts are independent, each with a softmax of its own, added afterwards by `combine`).
It walks over blocks of slots. Codes go from memory to registers and become bfloat16 there, exactly, as the operand of
a tensor core; scales multiply what is left of the products:

    a scale of a token                 scores, and weights
    a scale of a group of channels     the sums of the group, and the weights for the group

Scales of groups too small for a tensor core, and of channels for a block of tokens (KIVI), are multiplied with the
elements, which rounds these to bfloat16 (not those of NVFP4 and MXFP4: their products are bfloat16 numbers), and a
codebook's values are rounded to bfloat16 (those of many codes come from a polynomial, to 2^-12, and are rounded then).

A word of codes holds several channels, one to a lane (see `quantized_matmul.triton`): queries are parted into lanes
beforehand, and the result is put together afterwards. Queries and weights are float32. A tensor core takes 16 rows, a
kv head has seldom more than 8 query heads: each row is two, bfloat16 numbers that add up to it (to 2^-17).

Slots outside of a sequence's range are masked: they are not read.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import compat
from pallas_kernels.decode_attention.layout import Coded, Layout, Rules, State
from pallas_kernels.decode_attention.tilings import Tiling
from pallas_kernels.gpus import gpu
from pallas_kernels.quantized_matmul import packed as two_at_a_time
from pallas_kernels.quantized_matmul import upcast
from pallas_kernels.quantized_matmul.elements import Element, plane_widths

ROWS = 8  # queries of a program: twice as many are the rows of a tensor core
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


# --- the call ---


def partial_states(
    q: jax.Array,
    keys: Coded,
    values: Coded,
    at: jax.Array,
    ranges: jax.Array,
    *,
    views: tuple[View, View],
    rules: Rules,
    t: Tiling,
    shift: jax.Array | None,
    table: jax.Array | None,
    device: str,
    interpret: bool,
) -> State:
    """The softmax of every part: `[B, K, splits, R]` and, of `out`, `[B, K, splits, R, D]`.

    Args:
      q: float32 `[B, K, R, D]`, multiplied with what the scores are: `rules.scale`, static scales, `View.unit`.
      keys, values: as stored.
      at: int32 `[B, R]`, positions of the queries.
      ranges: int32 `[B, 4]`: first slot to read, slot behind the last one, position behind the last one, and how many
        positions have been written (of a ring).
      shift: float32 `[B, K, R]`, added to the scores; or None.
      table: int32 `[B, pages]` or None.
    """
    batch, kv_heads, rows, dim = q.shape
    k, v = views
    padded = -(-rows // ROWS) * ROWS
    more = [(0, padded - rows)]
    at = jnp.pad(at, [(0, 0), *more], constant_values=-1)
    ins = [_part(jnp.pad(q, [(0, 0), (0, 0), *more, (0, 0)]), k), at, ranges]
    ins += [] if shift is None else [jnp.pad(shift, [(0, 0), (0, 0), *more])]
    ins += [] if table is None else [table]
    ins += [*_arrays(keys, k), *_arrays(values, v)]
    f32 = lambda *shape: jax.ShapeDtypeStruct((batch, kv_heads, t.splits, *shape), jnp.float32)
    kernel = partial(
        _kernel, views=views, rules=rules, t=t, rows=rows, has_shift=shift is not None, has_table=table is not None,
        packed=not interpret,
    )  # fmt: skip
    with compat.lowering_for(gpu(device).kind):
        top, total, out = pl.pallas_call(
            kernel,
            out_shape=[f32(rows), f32(rows), f32(v.lanes, rows, v.words)],
            grid=(t.splits * (padded // ROWS), kv_heads, batch),
            compiler_params=compat.CompilerParams(num_warps=t.warps, num_stages=t.stages),
            interpret=interpret,
            name="decode_attention",
        )(*ins)
    out = jnp.moveaxis(out, 3, -1).reshape(*out.shape[:3], rows, v.words * v.lanes)[..., :dim]
    return State(top, total, out)


def _part(q: jax.Array, k: View) -> jax.Array:
    """`[B, K, R, D]` as `[B, K, lanes, R, chunks * width]`: the channels of each lane, chunks filled up with zeros."""
    per = k.chunk_words * k.lanes
    q = jnp.pad(q, [(0, 0)] * 3 + [(0, k.chunks * per - q.shape[-1])])
    q = q.reshape(*q.shape[:3], k.chunks, k.chunk_words, k.lanes)
    q = jnp.pad(q, [(0, 0)] * 4 + [(0, k.width - k.chunk_words), (0, 0)])
    return jnp.moveaxis(q, -1, 2).reshape(*q.shape[:2], k.lanes, q.shape[2], k.chunks * k.width)


def _arrays(coded: Coded, view: View) -> list[jax.Array]:
    """Codes as words, then scales and zero points as they are read."""
    if view.layout.element is None:
        return list(coded.codes)
    out = upcast.as_words(coded.codes, view.layout.element.bits, view.lanes)
    if coded.scale is not None:
        out.append(upcast.stored_scale(coded.scale))
    if coded.zero_point is not None:
        out.append(upcast.stored_zero(coded.zero_point))
    return out


def combine(s: State) -> State:
    """The parts of `partial_states` as one softmax."""
    top = jnp.max(s.top, axis=2)
    share = jnp.exp(s.top - jnp.where(top == -jnp.inf, 0, top)[:, :, None])
    total, out = jnp.sum(s.total * share, axis=2), jnp.sum(s.out * share[..., None], axis=2)
    return State(top, total, out)


# --- the kernel ---


def _kernel(
    *refs: Any,
    views: tuple[View, View],
    rules: Rules,
    t: Tiling,
    rows: int,
    has_shift: bool,
    has_table: bool,
    packed: bool,
) -> None:
    q_ref, at_ref, range_ref, *ins = refs[:-3]
    top_ref, total_ref, out_ref = refs[-3:]
    shift_ref = ins.pop(0) if has_shift else None
    table_ref = ins.pop(0) if has_table else None
    k_view, v_view = views
    # Programs that run at a time share the L2 cache: the rows of one split, if there are more than a program takes.
    row_blocks = q_ref.shape[3] // ROWS
    split, head, row = pl.program_id(0) // row_blocks, pl.program_id(1), pl.program_id(2)
    mine = pl.ds(pl.program_id(0) % row_blocks * ROWS, ROWS)
    low, high = range_ref[row, 0], range_ref[row, 1]
    end, written = range_ref[row, 2], range_ref[row, 3]
    first = low // t.block
    blocks = (high + (t.block - 1)) // t.block - first
    part = (jnp.maximum(blocks, 0) + (t.splits - 1)) // t.splits
    begin = first + split * part
    count = jnp.minimum(jnp.maximum(first + blocks - begin, 0), part)
    where = lambda i: _Block(i, t.block, low, high, row, head, table_ref, rules.page_size)
    k_read, v_read = _reader(ins, k_view, packed), _reader(ins, v_view, packed)
    at = at_ref[row, mine]
    part_of_q = lambda lane, chunk: q_ref[row, head, np.int32(lane), mine, pl.ds(chunk * k_view.width, k_view.width)]
    q = [[_two(part_of_q(lane, chunk)) for chunk in range(k_view.chunks)] for lane in range(k_view.lanes)]

    def step(i: Any, carry: Any, whole: bool = False) -> Any:
        """One block of slots; of a `whole` one, all are read and every query sees them."""
        (top, total, acc), (k_small, v_small) = carry
        block = where(begin + i)._replace(whole=whole)
        after = where(begin + i + 1)
        following = (k_read.small(after), v_read.small(after))
        scores = _scores(q, k_read, block, k_small)
        if shift_ref is not None:
            scores = scores + shift_ref[row, head, mine][:, None]
        if rules.soft_cap is not None:
            scores = np.float32(rules.soft_cap) * _tanh(scores * np.float32(1 / rules.soft_cap))
        if not whole:
            position = slots = block.slots()
            if rules.ring:
                position = written - 1 - lax.rem(written - 1 - slots, np.int32(k_read.words[0].shape[2]))
            seen = _sees(position, block.inside(), at, end, rules)
            scores = jnp.where(seen, scores, -jnp.inf)
        new = jnp.maximum(top, jnp.max(scores, axis=1))
        base = jnp.where(new == -jnp.inf, jnp.zeros_like(new), new)
        weights, kept = jnp.exp(scores - base[:, None]), jnp.exp(top - base)
        total = total * kept + jnp.sum(weights, axis=1)
        return (new, total, _outputs(acc, weights, kept, v_read, block, v_small)), following

    empty = jnp.zeros((ROWS,), jnp.float32)
    acc = tuple(jnp.zeros((2 * ROWS, v_view.width), jnp.float32) for _ in range(v_view.lanes * v_view.chunks))
    start = where(begin)
    carry = ((empty - jnp.inf, empty, acc), (k_read.small(start), v_read.small(start)))
    done = jnp.int32(0)
    if not rules.ring and rules.window is None and rules.first == 0:
        every = jnp.minimum(high, jnp.min(jnp.where(at < 0, np.int32(2**31 - 1), at)) + 1)
        done = jnp.clip(every // t.block - begin, 0, count)
        carry = lax.fori_loop(0, done, partial(step, whole=True), carry)
    (top, total, acc), _ = lax.fori_loop(done, count, step, carry)
    inside = mine.start + jnp.arange(ROWS) < rows if rows % ROWS else None
    plt.store(top_ref.at[row, head, split, mine], top, mask=inside)
    plt.store(total_ref.at[row, head, split, mine], total, mask=inside)
    for n, part_of in enumerate(acc):
        lane, chunk = n // v_view.chunks, n % v_view.chunks
        columns = chunk * v_view.chunk_words + jnp.arange(v_view.width)
        limit = min(v_view.words, (chunk + 1) * v_view.chunk_words)
        both = _mask(inside, columns < limit if chunk * v_view.chunk_words + v_view.width > limit else None)
        where_to = _columns(chunk * v_view.chunk_words, v_view.width, v_view.words)
        to = out_ref.at[row, head, split, np.int32(lane), mine, where_to]
        plt.store(to, _sum_two(part_of), mask=both)


def _or_nan(values: jax.Array, codes: jax.Array) -> jax.Array:
    """The values of codes of e4m3, NaN where a code is."""
    return jnp.where((codes & np.uint16(0x7F)) == np.uint16(0x7F), jnp.asarray(jnp.nan, values.dtype), values)


def _columns(first: int, size: int, end: int) -> Any:
    """A slice that may reach over the end (what lies there is masked): Pallas refuses one whose ends it knows."""
    return pl.ds(first if first + size <= end else jnp.int32(first), size)


def _mask(rows: jax.Array | None, columns: jax.Array | None) -> jax.Array | None:
    if rows is None or columns is None:
        return None if rows is columns else rows[:, None] if rows is not None else columns[None, :]  # type: ignore
    return rows[:, None] & columns[None, :]


def _two(x: jax.Array) -> jax.Array:
    """float32 `[R, n]` as bfloat16 `[2 R, n]`: two rows that add up to each."""
    high, low = _halves(x)
    first = lax.broadcasted_iota(jnp.int32, (2, 1, 1), 0) == 0
    return jnp.where(first, high[None], low[None]).reshape(2 * x.shape[0], x.shape[1]).astype(BFLOAT16)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 as two numbers: the first has the bits of a bfloat16, the second is the rest."""
    high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFF0000), jnp.float32)
    return high, x - high


def _sum_two(x: jax.Array) -> jax.Array:
    """`[2 R, n]` -> `[R, n]`: the inverse of `_two`, of products."""
    return jnp.sum(x.reshape(2, x.shape[0] // 2, x.shape[1]), axis=0)


def _tanh(x: jax.Array) -> jax.Array:
    """By exp, which a GPU has; to 1e-7."""
    return 1 - 2 / (jnp.exp(2 * x) + 1)


def _sees(position: jax.Array, inside: jax.Array, at: jax.Array, end: jax.Array, rules: Rules) -> jax.Array:
    """bool `[R, n]`: whether the queries at `at` see the positions."""
    keys, queries = position[None, :], at[:, None]
    seen = (inside & (position >= rules.first) & (position < end))[None, :] & (keys <= queries)
    if rules.window is None:
        return seen
    return seen & ((keys > queries - rules.window) | (keys < rules.sink_tokens))


def _scores(q: list[list[jax.Array]], read: "_Reader", block: "_Block", small: Any) -> jax.Array:
    """float32 `[R, n]`."""
    view, total = read.view, None
    for chunk in range(view.chunks):
        words, sums = read.codes(block, chunk), None
        for lane, parts in enumerate(read.values(words, chunk, small)):
            for part in parts:
                product = compat.dot(q[lane][chunk], part.T)
                sums = product if sums is None else sums + product
        assert sums is not None
        part_of = _sum_two(sums)
        if view.scales in ("token", "group"):
            part_of = part_of * read.numbers(small[0][chunk])[None, :]
        total = part_of if total is None else total + part_of
    assert total is not None
    return total


def _outputs(
    acc: tuple[jax.Array, ...], weights: jax.Array, kept: jax.Array, read: "_Reader", block: "_Block", small: Any
) -> tuple[jax.Array, ...]:
    """The accumulators, `[2 R, width]` of every lane and chunk, with one more block of values."""
    view, out = read.view, list(acc)
    fade = jnp.broadcast_to(kept[None, :], (2, kept.shape[0])).reshape(-1)[:, None]
    for chunk in range(view.chunks):
        words = read.codes(block, chunk)
        w = weights
        if view.scales in ("token", "group"):
            w = w * read.numbers(small[0][chunk])[None, :]
        w = _two(w)
        for lane, parts in enumerate(read.values(words, chunk, small)):
            n = lane * view.chunks + chunk
            out[n] = out[n] * fade
            for part in parts:
                out[n] = out[n] + compat.dot(w, part)
    return tuple(out)


class _Block(NamedTuple):
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


class _Reader(NamedTuple):
    """Reads keys, or values, of a block."""

    view: View
    words: tuple[Any, ...]
    scale: Any
    zero: Any
    packed: bool

    def codes(self, block: _Block, chunk: int) -> tuple[jax.Array, ...]:
        """`[n, width]`: words of each plane, or floats."""
        view = self.view
        row, start = block.place()
        first = chunk * view.chunk_words
        limit = min(view.words, first + view.chunk_words)
        columns = first + jnp.arange(view.width) < limit if first + view.width > limit else None
        inside = _mask(None if block.whole else block.inside(), columns)
        if inside is not None:
            inside = jnp.broadcast_to(inside, (block.size, view.width))
        at = (row, block.head, pl.ds(start, block.size), _columns(first, view.width, view.words))
        other = lambda r: None if inside is None else np.zeros((), r.dtype)
        return tuple(plt.load(r.at[at], mask=inside, other=other(r)) for r in self.words)

    def small(self, block: _Block) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Scales and zero points of a block, as stored: of each chunk, or of each lane."""
        return tuple(() if r is None else self._small(r, block) for r in (self.scale, self.zero))  # type: ignore

    def _small(self, ref: Any, block: _Block) -> tuple[jax.Array, ...]:
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
            return (plt.load(ref.at[row, block.head, slots, _columns(0, count, view.groups)], mask=both, other=zero),)
        return tuple(
            plt.load(ref.at[row, block.head, slots, np.int32(chunk)], mask=inside, other=zero)
            for chunk in range(view.chunks)
        )

    def _of_channels(self, ref: Any, block: _Block) -> jax.Array:
        """`[blocks of tokens, lanes * width]`, in the order of the channels."""
        tokens, (row, start) = self.view.layout.tokens, block.place()
        count, size = max(1, block.size // tokens), self.view.lanes * self.view.width
        channels = jnp.arange(size) < self.view.dim
        blocks = block.index * block.size + tokens * jnp.arange(count) < block.high
        at = ref.at[row, block.head, pl.ds(start // tokens, count), _columns(0, size, self.view.dim)]
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
            high, low = _halves(words[0].astype(jnp.float32))
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


def _reader(ins: list[Any], view: View, packed: bool) -> _Reader:
    """Takes the arrays of `_arrays` from the front of `ins`."""
    e = view.layout.element
    planes = 1 if e is None else len(plane_widths(e.bits))
    words = tuple(ins.pop(0) for _ in range(planes))
    scale = ins.pop(0) if e is not None and view.scales != "none" else None
    return _Reader(view, words, scale, ins.pop(0) if view.zeros else None, packed)
