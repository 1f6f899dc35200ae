"""Attention over quantized codes: where the kernel of `pallas_kernels` runs, and what it is told.

The kernel is chosen when a program is lowered, for the platform that it is lowered for: it is in the programs of NVIDIA
GPUs only.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax.custom_batching import custom_vmap

from jquant.core.formats import Format
from jquant.ops.platform import on_cuda
from jquant.ops.shards import on_shards
from pallas_kernels.decode_attention import Coded, Layout, Rules, State, decode_attention, why_not
from pallas_kernels.quantized_matmul.elements import Element, element

__all__ = ["Call", "Coded", "Layout", "Rules", "State", "layout", "on_gpus", "why_not"]


class Call(NamedTuple):
    """The arrays of one call: see `pallas_kernels.decode_attention.decode_attention`."""

    q: jax.Array
    keys: Coded
    values: Coded
    at: jax.Array
    end: jax.Array
    written: jax.Array | None
    shift: jax.Array | None
    table: jax.Array | None


def layout(format: Format | None, tokens: int = 1, codebook: tuple[float, ...] = ()) -> Layout:
    """What codes of a format stand for; without one, those of a codebook, or floats."""
    if format is not None:
        return Layout(element(format.element), format.group_size or 0, tokens)
    if codebook:
        return Layout(Element(len(codebook).bit_length() - 1, "table", table=codebook))
    return Layout()


def on_gpus(call: Call, layouts: tuple[Layout, Layout], rules: Rules) -> State:
    """The kernel. Each device of a mesh attends with its own sequences and heads, over its own part of the cache."""
    run = lambda call: _kernel(call, layouts, rules)
    leaves, tree = jax.tree.flatten(call)
    flat = partial(on_cuda, lambda *leaves: tuple(run(jax.tree.unflatten(tree, leaves))))
    # A program of one device, or one mapped by vmap, has nothing to part.
    sizes = {"b": call.q.shape[0], "k": call.q.shape[1]}
    parted = custom_vmap(on_shards(flat, leaves, _axes(call), ["bkr", "bkr", "bkrd"], sizes=sizes))

    def mapped(size: int, in_batched: Any, *leaves: jax.Array) -> Any:
        axes = [0 if is_mapped else None for is_mapped in in_batched]
        return jax.vmap(flat, axes, axis_size=size)(*leaves), (True, True, True)

    parted.def_vmap(mapped)
    return State(*parted(*leaves))


def _kernel(call: Call, layouts: tuple[Layout, Layout], rules: Rules) -> State:
    return decode_attention(
        call.q, call.keys, call.values, call.at, call.end, layouts=layouts, rules=rules, written=call.written,
        shift=call.shift, table=call.table,
    )  # fmt: skip


def _axes(call: Call) -> list[str]:
    """Which axes of each array are sequences (b), kv heads (k), queries (r) and channels (d); "-" for others."""
    row = "-" if call.table is not None else "b"  # the rows of a pool of pages are no sequences

    def coded(c: Coded) -> list[str]:
        rows = [*c.codes, *(a for a in (c.scale, c.zero_point) if a is not None)]
        return [f"{row}k--"] * len(rows) + ["k"] * (c.static is not None)

    rest = [(call.written, "b"), (call.shift, "bkr"), (call.table, "b-")]
    return ["bkrd", *coded(call.keys), *coded(call.values), "br", "b", *(axes for a, axes in rest if a is not None)]
