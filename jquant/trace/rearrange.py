"""What a rearrangement of a parameter does to its `Ref`: the view changes, nothing runs.

`REARRANGE[primitive](ref, eqn, other operands)` gives the outputs, or None where the view can't express it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jquant.trace import view
from jquant.trace.view import Ref


def is_ref(x: Any) -> bool:
    return isinstance(x, Ref)


def row_of(stack: Ref, i: int, axis: int = 0) -> Ref:
    """Slice `i` of a stacked view."""
    out = view.cut(stack, axis, i, 1)
    assert out is not None
    return out.replace(dims=(*out.dims[:axis], *out.dims[axis + 1 :]))


def _one(ref: Ref | None) -> list[Ref] | None:
    return None if ref is None else [ref]


def _broadcast(ref: Ref, eqn: Any, _: Any) -> list[Ref] | None:
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    dims: list[view.Dim] = [()] * len(shape)
    for source, target in enumerate(where):
        if ref.shape[source] != shape[target]:
            return None
        dims[target] = ref.dims[source]
    if any(size != 1 for i, size in enumerate(shape) if i not in where):
        return None
    return [ref.replace(dims=tuple(dims))]


def _squeeze(ref: Ref, eqn: Any, _: Any) -> list[Ref]:
    gone = eqn.params["dimensions"]
    return [ref.replace(dims=tuple(d for i, d in enumerate(ref.dims) if i not in gone))]


def _cuts(ref: Ref, starts: Sequence[Any], sizes: Sequence[int]) -> list[Ref] | None:
    out: Ref | None = ref
    for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        out = out and view.cut(out, dim, start, size)
    return _one(out)


def _slice(ref: Ref, eqn: Any, _: Any) -> list[Ref] | None:
    p = eqn.params
    if p["strides"] is not None and any(s != 1 for s in p["strides"]):
        return None
    starts = p["start_indices"]
    return _cuts(ref, starts, [b - a for a, b in zip(starts, p["limit_indices"], strict=True)])


def _dynamic_slice(ref: Ref, eqn: Any, starts: Sequence[Any]) -> list[Ref] | None:
    sizes = eqn.params["slice_sizes"]
    if sum(size != full for size, full in zip(sizes, ref.shape, strict=True)) > 1:
        return None
    room = [full - size for size, full in zip(sizes, ref.shape, strict=True)]
    return _cuts(ref, [_clamped(s, r) for s, r in zip(starts, room, strict=True)], sizes)


def _clamped(start: Any, top: int) -> Any:
    """A start as XLA takes it: moved inside bounds, never counted from the end."""
    if not isinstance(start, jax.Array):
        return min(max(int(start), 0), top)
    # int8 can't hold every bound
    return jnp.clip(start.astype(jnp.int32) if start.dtype.itemsize < 4 else start, 0, top)


def _split(ref: Ref, eqn: Any, _: Any) -> list[Ref] | None:
    axis, start, out = eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        out.append(view.cut(ref, axis, start, size))
        start += size
    return None if any(r is None for r in out) else [r for r in out if r is not None]


def _unstack(ref: Ref, eqn: Any, _: Any) -> list[Ref] | None:
    axis = eqn.params["axis"] % len(ref.shape)
    if any(view.cut(ref, axis, i, 1) is None for i in range(ref.shape[axis])):
        return None
    return [row_of(ref, i, axis) for i in range(ref.shape[axis])]


REARRANGE: dict[str, Callable[[Ref, Any, list[Any]], list[Ref] | None]] = {
    "reshape": lambda ref, eqn, _: (
        None if eqn.params.get("dimensions") else _one(view.reshape(ref, eqn.params["new_sizes"]))
    ),
    "transpose": lambda ref, eqn, _: [view.transpose(ref, eqn.params["permutation"])],
    "convert_element_type": lambda ref, eqn, _: _one(view.cast(ref, eqn.params["new_dtype"])),
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "unstack": _unstack,
    "copy": lambda ref, eqn, _: [ref],
    "copy_p": lambda ref, eqn, _: [ref],
    "sharding_constraint": lambda ref, eqn, _: [ref],
    "stop_gradient": lambda ref, eqn, _: [ref],
}

# Primitives that give the same numbers again: of an array they are made once, so that sites share inputs.
SAME_DATA = frozenset(
    ("reshape", "transpose", "convert_element_type", "squeeze", "expand_dims", "broadcast_in_dim", "copy", "slice")
)
