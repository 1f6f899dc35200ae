"""Slicing, moving and looking up the kept axes of a leaf (a QTensor or a float array): the codes stay packed.

Axes are the leaf's own, negative. Only axes that the leaf's format does not pack may be named. Where rows share scales
along the axis that is named (2-D tiles, second-level scales), they get their own first.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jquant.core.qtensor import QTensor, is_qtensor


def renamed(axis: int, gone: int) -> int:
    """The name of `axis` once axis `gone` is taken away: those in front move one place towards the end."""
    return axis + 1 if axis < gone else axis


def _renamed_contracted(q: QTensor, gone: int) -> tuple[int, ...]:
    return tuple(renamed(a, gone) for a in q.contracted)


def _cuttable(q: QTensor, axis: int) -> QTensor:
    """The same numbers in a format that can be cut anywhere along a kept axis."""
    return q.untiled() if axis == q.kept[-1] else q


def _map_axis(q: QTensor, axis: int, fn: Callable[[jax.Array, int], jax.Array]) -> QTensor:
    # A "tensor" scale has one entry for a whole axis: it is shared by every slice.
    q = _cuttable(q, axis)
    at, size = q.kept.index(axis), q.shape[axis]
    return jax.tree.map(lambda a: fn(a, at) if a.shape[at] == size else a, q)


def _slice(a: jax.Array, axis: int, start: Any, size: int) -> jax.Array:
    if isinstance(start, int):
        return jax.lax.slice_in_dim(a, start, start + size, axis=axis % a.ndim)
    return jax.lax.dynamic_slice_in_dim(a, start, size, axis=axis % a.ndim)


@dataclasses.dataclass(frozen=True)
class Later:
    """A leaf that is not at hand yet: its shape and dtype, and the cuts to be made once it is.

    Attributes:
      shape, dtype: after the cuts.
      cuts: `(axis, start, size)` slices, and `(axis,)` removals of an axis of size 1, in order.
    """

    shape: tuple[int, ...]
    dtype: Any
    cuts: tuple[tuple[int, ...], ...] = ()

    def _cut(self, axis: int, sizes: list[int], *cut: int) -> "Later":
        at = axis % len(self.shape)
        shape = (*self.shape[:at], *sizes, *self.shape[at + 1 :])
        return dataclasses.replace(self, shape=shape, cuts=(*self.cuts, (axis, *cut)))


def apply_cuts(leaf: Any, cuts: tuple[tuple[int, ...], ...]) -> Any:
    """Makes the cuts that a `Later` noted."""
    for cut in cuts:
        leaf = slice_axis(leaf, *cut) if len(cut) == 3 else remove_axis(leaf, *cut)
    return leaf


def slice_axis(leaf: Any, axis: int, start: Any, size: int) -> Any:
    """Entries `start` .. `start + size` along one axis; `start` may be traced."""
    if isinstance(leaf, Later):
        return leaf._cut(axis, [size], start, size)
    if not is_qtensor(leaf):
        return _slice(leaf, axis, start, size)
    return _map_axis(leaf, axis, lambda a, at: _slice(a, at, start, size))


def remove_axis(leaf: Any, axis: int) -> Any:
    """Takes away an axis of size 1."""
    if isinstance(leaf, Later):
        return leaf._cut(axis, [])
    if not is_qtensor(leaf):
        return jnp.squeeze(leaf, axis)
    leaf = _cuttable(leaf, axis)
    at = leaf.kept.index(axis)
    return jax.tree.map(lambda a: jnp.squeeze(a, at), leaf).replace(contracted=_renamed_contracted(leaf, axis))


def move_to_front(leaf: Any, axis: int) -> Any:
    """The leaf with one axis moved to the front."""
    if not is_qtensor(leaf):
        return jnp.moveaxis(leaf, axis, 0)
    leaf = _cuttable(leaf, axis)
    at = leaf.kept.index(axis)
    return jax.tree.map(lambda a: jnp.moveaxis(a, at, 0), leaf).replace(contracted=_renamed_contracted(leaf, axis))


def map_taken(fn: Callable[[QTensor], jax.Array], q: QTensor, axis: int, indices: jax.Array) -> jax.Array:
    """`fn` of the slices at `indices` `[k]` (inside bounds) of a kept axis, stacked in front.

    What all slices share (the scale of a whole tensor, a factor of a side) is not copied for each.
    """
    q, size = move_to_front(q, axis), q.shape[axis]
    arrays, treedef = jax.tree.flatten(q)
    own = [a.shape[0] == size for a in arrays]
    taken = [a.at[indices].get(mode="promise_in_bounds") if o else a[0] for a, o in zip(arrays, own)]
    slices = lambda *arrays: fn(jax.tree.unflatten(treedef, arrays))
    return jax.vmap(slices, in_axes=tuple(0 if o else None for o in own))(*taken)
