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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import compat
from pallas_kernels.decode_attention import reading
from pallas_kernels.decode_attention.layout import Coded, Rules, State
from pallas_kernels.decode_attention.reading import BFLOAT16, Block, Reader, View, arrays_of, both_of, columns_of
from pallas_kernels.decode_attention.tilings import Tiling
from pallas_kernels.gpus import gpu

ROWS = 8  # queries of a program: twice as many are the rows of a tensor core


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
    ins += [*arrays_of(keys, k), *arrays_of(values, v)]
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
    where = lambda i: Block(i, t.block, low, high, row, head, table_ref, rules.page_size)
    k_read, v_read = reading.reader_of(ins, k_view, packed), reading.reader_of(ins, v_view, packed)
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
        both = both_of(inside, columns < limit if chunk * v_view.chunk_words + v_view.width > limit else None)
        where_to = columns_of(chunk * v_view.chunk_words, v_view.width, v_view.words)
        to = out_ref.at[row, head, split, np.int32(lane), mine, where_to]
        plt.store(to, _sum_two(part_of), mask=both)


def _two(x: jax.Array) -> jax.Array:
    """float32 `[R, n]` as bfloat16 `[2 R, n]`: two rows that add up to each."""
    high, low = reading.halves(x)
    first = lax.broadcasted_iota(jnp.int32, (2, 1, 1), 0) == 0
    return jnp.where(first, high[None], low[None]).reshape(2 * x.shape[0], x.shape[1]).astype(BFLOAT16)


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


def _scores(q: list[list[jax.Array]], read: Reader, block: Block, small: Any) -> jax.Array:
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
    acc: tuple[jax.Array, ...], weights: jax.Array, kept: jax.Array, read: Reader, block: Block, small: Any
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
