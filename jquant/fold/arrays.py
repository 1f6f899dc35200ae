"""Label arrays: one entry for each element of a value, but of length 1 along every dimension that they don't depend on.

They go through the rearrangements of a program as the value itself does.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from jquant.trace import view
from jquant.trace.view import Ref


def reshape_groups(a: Sequence[int], b: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """The runs of dimensions of `a` and of `b` that a reshape from `a` to `b` turns into each other."""
    i = j = 0
    while i < len(a) or j < len(b):
        first, p, q = (i, j), 1, 1
        if i < len(a):
            p, i = a[i], i + 1
        if j < len(b):
            q, j = b[j], j + 1
        while p != q:
            if p < q:
                p, i = p * a[i], i + 1
            else:
                q, j = q * b[j], j + 1
        yield slice(first[0], i), slice(first[1], j)


def reshape(labels: np.ndarray, a: Sequence[int], b: Sequence[int]) -> np.ndarray:
    """The labels of a value reshaped from `a` to `b`."""
    if 0 in a:
        return np.zeros((1,) * len(b), np.int64)
    full, out = list(labels.shape), []
    for left, right in reshape_groups(a, b):
        if math.prod(full[left]) == 1:
            out += [1] * len(b[right])
        else:
            full[left] = a[left]
            out += b[right]
    return np.broadcast_to(labels, full).reshape(out)


def reshape_flags(flags: Sequence[bool], a: Sequence[int], b: Sequence[int]) -> tuple[bool, ...]:
    """For each dimension after a reshape whether the value varies along it."""
    if 0 in a:
        return (False,) * len(b)
    out: list[bool] = []
    for left, right in reshape_groups(a, b):
        out += [any(flags[left]) and size > 1 for size in b[right]]
    return tuple(out)


def cut(labels: np.ndarray, cuts: Sequence[tuple[int, ...]]) -> np.ndarray:
    """The cuts of a `kept.Later`, made in the labels of the whole leaf; a numpy view."""
    for axis, *size in cuts:
        if not size:
            labels = labels.squeeze(axis)
        elif labels.shape[axis] > 1:
            at: list[slice] = [slice(None)] * labels.ndim
            at[axis] = slice(size[0], size[0] + size[1])
            labels = labels[tuple(at)]
    return labels


def arrange(ref: Ref, labels: np.ndarray) -> np.ndarray:
    """The labels of a leaf (already cut) in the order of a view of it."""
    atoms = view.axis_order(a for dim in ref.dims for a in dim)
    size = lambda a: a.size if labels.shape[a.axis] > 1 else 1
    w = labels.reshape([size(a) for a in atoms])
    w = w.transpose([atoms.index(a) for dim in ref.dims for a in dim])
    full, out = [], []
    for dim in ref.dims:
        some = any(labels.shape[a.axis] > 1 for a in dim)
        full += [a.size if some else 1 for a in dim]
        out.append(math.prod(a.size for a in dim) if some else 1)
    return np.broadcast_to(w, full).reshape(out)


def leaf_shaped(rows: np.ndarray, axes: Sequence[int], sizes: Sequence[int], ndim: int) -> np.ndarray:
    """`[*axes]`, flat or not, as an array of `ndim` dimensions, of length 1 along all other axes."""
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    a = rows.reshape(sizes).transpose(order)
    where = {axes[i]: sizes[i] for i in order}
    return a.reshape([where.get(axis, 1) for axis in range(-ndim, 0)])


def expand(labels: np.ndarray, shape: Sequence[int], dims: Sequence[int]) -> np.ndarray:
    """The labels in full along some dimensions of the value's shape."""
    full = [shape[d] if d in dims else n for d, n in enumerate(labels.shape)]
    return np.broadcast_to(labels, full)
