"""Orthogonal changes of basis that a program does not notice, and how they change its parameters.

A block is a set of channels that everything which reads them treats alike, entry by entry: sums of two values with the
same channels, factors that are the same for all channels of a block, sums of squares (a norm's statistic), products
with a weight. Any orthogonal matrix may act on a block. A sum of the channels (a LayerNorm's mean) is unchanged if the
matrix maps the vector of ones to itself; then a number added to all channels is rotated by doing nothing.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core import kept
from jquant.fold.flow import Flow
from jquant.fold.hadamard import Factored, turn_rows
from jquant.fold.info import Info, Role, Rule, aligned, together, varies
from jquant.fold.scales import Shapes, contracted_product
from jquant.trace.line import Line
from jquant.trace.view import Ref


class _Rotations(Flow):
    """A Flow that takes a leaf of equal numbers (a norm's gain once it is folded) for that number."""

    def __init__(self, line: Line, leaves: dict[str, Any], rules: dict[str, Rule]):
        self.ones: list[np.ndarray] = []
        self.squared: list[np.ndarray] = []
        super().__init__(line, leaves, rules)

    def read_const(self, ref: Ref) -> float | None:
        leaf = self.leaves[ref.path]
        if not hasattr(leaf, "__array__"):
            return None
        values = np.asarray(kept.apply_cuts(leaf, ref.value.cuts))
        if not values.size:
            return None
        first = float(values.ravel()[0])  # g * (1 / g) may be a bit off 1 in float64
        return first if bool((np.abs(values - first) <= 1e-15 * abs(first)).all()) else None


def _flow(line: Line, leaves: dict[str, Any]) -> _Rotations:
    return _Rotations(line, leaves, RULES)


def _steady(info: Info, other: Info) -> bool:
    """Whether `other` is the same for all labels of `info`."""
    return not any(v and n > 1 for v, n in zip(other.vary, info.labels.shape, strict=True))


def _added(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info] | None:
    infos = aligned(infos, len(shapes[0]))
    some = [i for i in infos if not i.zero]
    if any(i.square for i in some):
        return None
    labelled = [i for i in some if i.labels.any()]
    if len(some) == 2 and len(labelled) == 1:
        [x] = labelled
        other = some[1] if some[0] is x else some[0]
        if not _steady(x, other):
            return None
        _needs_ones(flow, x.labels)
    for a, b in zip(labelled, labelled[1:], strict=False):
        flow.labels.union(a.labels, b.labels)
    return [Info(flow.labels.find(together(labelled or infos)), varies(infos))]


def _needs_ones(flow: Flow, labels: np.ndarray) -> None:
    assert isinstance(flow, _Rotations)
    flow.ones.append(labels)
    flow.labels.note(labels, np.ones((1,) * labels.ndim, np.int64), flow.here)


def _times(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info] | None:
    infos = aligned(infos, len(shapes[0]))
    x, y = infos if infos[0].labels.any() else infos[::-1]
    const = x.const * y.const if x.const is not None and y.const is not None else None
    if not x.labels.any():
        return [Info(x.labels, varies(infos), const)]
    if y.labels.any() or (x.square and not _steady(x, y)):
        return None
    return [_scaled(flow, x, y, varies(infos))]


def _scaled(flow: Flow, x: Info, y: Info, vary: tuple[bool, ...]) -> Info:
    """x * y: labels that meet different factors part."""
    if not _steady(x, y):
        flow.labels.note(x.labels, flow.place(x.labels, [d for d, v in enumerate(y.vary) if v]), flow.here)
    return Info(x.labels, vary, square=x.square)


def _divided(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info] | None:
    x, y = infos = aligned(infos, len(shapes[0]))
    if y.labels.any() or (x.square and not _steady(x, y)):
        return None
    return [_scaled(flow, x, y, varies(infos)) if x.labels.any() else Info(x.labels, varies(infos))]


def _negated(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info]:
    return [infos[0]._replace(const=None, param=None)]


def _squared(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info] | None:
    x = infos[0]
    power = eqn.params.get("y", 2)
    return None if power != 2 or x.square else [x._replace(square=bool(x.labels.any()), const=None, param=None)]


def _itself(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info] | None:
    """x * x, and the product of a value with itself along its channels."""
    if eqn.primitive.name == "mul":
        return _squared(flow, eqn, infos, shapes)
    contract, batch = eqn.params["dimension_numbers"]
    x = infos[0]
    outer = [d for d in range(x.labels.ndim) if d not in contract[0] and x.labels.shape[d] > 1]
    if tuple(contract[0]) != tuple(contract[1]) or x.square or not set(outer) <= set(batch[0]):
        return None
    _statistic(flow, x.labels, contract[0])
    return [Info(np.zeros((1,) * len(shapes[0]), np.int64), tuple(s > 1 for s in shapes[0]))]


def _statistic(flow: Flow, labels: np.ndarray, axes: Any) -> None:
    """A sum of squares along `axes`: the channels that are summed together stay a block, and are complete."""
    assert isinstance(flow, _Rotations)
    flow.squared.append(labels)
    flow.labels.note(labels, flow.place(labels, [d for d in range(labels.ndim) if d not in axes]), flow.here)


def _summed(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info] | None:
    axes, x = eqn.params["axes"], infos[0]
    vary = tuple(v for d, v in enumerate(x.vary) if d not in axes)
    bare = Info(np.zeros((1,) * len(shapes[0]), np.int64), vary)
    along = any(x.labels.shape[d] > 1 for d in axes)
    if not x.labels.any():
        return [bare]
    if x.square:
        if not along:
            return None
        _statistic(flow, x.labels, axes)
        return [bare]
    if along and _same_marks(flow, x.labels, axes):
        _needs_ones(flow, x.labels)
        outer = [d for d in range(x.labels.ndim) if d not in axes]
        flow.labels.note(x.labels, flow.place(x.labels, outer), flow.here + (1 << 40))
        return [bare]
    return [Info(flow.unify(x.labels, axes).squeeze(tuple(axes)), vary)]


def _same_marks(flow: Flow, labels: np.ndarray, axes: Any) -> bool:
    """Whether what is summed are the channels of a block, and no copies of it."""
    marks = flow.labels.mark[labels]
    first = marks
    for d in axes:
        first = np.take(first, [0], axis=d)
    return bool((marks == first).all() and labels.all())


def _selected(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info] | None:
    which, *cases = aligned(infos, len(shapes[0]))
    labelled = [i for i in cases if i.labels.any()]
    if (
        which.labels.any()
        or any(i.square for i in cases)
        or any(not i.zero and not i.labels.any() for i in cases)
        and labelled
    ):
        return None
    for a, b in zip(labelled, labelled[1:], strict=False):
        flow.labels.union(a.labels, b.labels)
    out = Info(flow.labels.find(together(cases)), varies([which, *cases]))
    return [_scaled(flow, out, which, out.vary)] if labelled else [out]


def _product(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info] | None:
    a, b = infos
    if (a.labels.any() and b.labels.any()) or a.square or b.square:
        return None
    which = 0 if a.labels.any() else 1
    x, batch = infos[which], eqn.params["dimension_numbers"][1][which]
    if any(x.labels.shape[d] > 1 for d in batch):
        flow.labels.note(x.labels, flow.place(x.labels, batch), flow.here)
    return [contracted_product(flow, eqn, x.labels, which, shapes[0])]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "add_any"), _added),
    "mul": _times,
    "div": _divided,
    "neg": _negated,
    "square": _squared,
    "integer_pow": _squared,
    "itself": _itself,
    "reduce_sum": _summed,
    "select_n": _selected,
    "dot_general": _product,
}


class Block(NamedTuple):
    """Channels that may be rotated.

    Attributes:
      labels: their classes, ascending; int64 `[size]`.
      ones: the matrix must map the vector of ones to itself.
      norm: a sum of squares reads them: they are a residual stream.
      producers, readers: the leaves that produce and contract them, in the program's order.
    """

    labels: np.ndarray
    ones: bool
    norm: bool
    producers: tuple[str, ...]
    readers: tuple[str, ...]


class Rotations(NamedTuple):
    """The blocks of a program, and the flow that found them."""

    flow: Flow
    blocks: list[Block]


def find_rotations(line: Line, leaves: dict[str, Any]) -> Rotations:
    """The blocks of at least two channels that some weight contracts and everything produces that may change."""
    flow = _flow(line, leaves)
    labels = flow.labels
    roots = np.unique(labels.root)[1:]
    if not len(roots):
        return Rotations(flow, [])
    _note_places(flow)
    order = np.argsort(labels.mark[roots], kind="stable")
    marks = labels.mark[roots][order]
    ends = [*np.flatnonzero(marks[1:] != marks[:-1]) + 1, len(marks)]
    sorted_roots = roots[order]
    groups = [sorted_roots[i:j] for i, j in pairwise([0, *ends]) if j - i > 1]
    member = np.zeros(len(labels.root), np.int64)  # the number of each class's block
    for number, group in enumerate(groups, 1):
        member[group] = number
    read: dict[int, list[str]] = {number: [] for number in range(len(groups) + 1)}
    made: dict[int, list[str]] = {number: [] for number in range(len(groups) + 1)}
    for table, found in ((made, flow.outs), (read, flow.ins)):
        for role, array in found.items():
            for number in np.unique(member[labels.find(np.maximum(array, 0))]):
                table[number].append(role.path)
    flagged = lambda arrays: {int(n) for a in arrays for n in np.unique(member[labels.find(a)])}
    ones, norm = flagged(flow.ones), flagged(flow.squared)
    blocks = [
        Block(np.sort(group), n in ones, n in norm, tuple(made[n]), tuple(read[n]))
        for n, group in enumerate(groups, 1)
        if read[n] and made[n]
    ]
    return Rotations(flow, sorted(blocks, key=lambda b: b.labels[0]))


def _note_places(flow: Flow) -> None:
    """Parts what is not produced, or contracted, together: channels of another leaf, or of another slice of a stack."""
    where = 1 << 60
    for table in (flow.outs, flow.ins):
        for array in table.values():
            where += 1
            flow.labels.note(np.maximum(array, 0), np.ones((1,) * array.ndim, np.int64), where)


class Places(NamedTuple):
    """Where the channels of blocks are in an array.

    Attributes:
      order: the array's axes, those that carry channels last.
      axes: how many carry channels; flattened, they are what `parts` count along.
      parts: the number of a block, and where its channels are, `[copies, size]`.
    """

    order: tuple[int, ...]
    axes: int
    parts: list[tuple[int, np.ndarray]]


def find_places(shape: tuple[int, ...], classes: np.ndarray, blocks: list[Block]) -> Places:
    """Where the channels of blocks are in an array of a shape.

    Args:
      shape: the array's.
      classes: the class of each entry's channel, of the array's rank, 1 along the axes that carry no channels.
      blocks: what is rotated.

    Raises:
      ValueError: some channels of a block are not there as often as the others.
    """
    number = np.zeros(int(classes.max(initial=0)) + 1, np.int64)
    for i, block in enumerate(blocks, 1):
        number[block.labels[block.labels < len(number)]] = i
    member = number[classes]
    axes = [d for d in range(len(shape)) if classes.shape[d] > 1]
    kept_axes = [d for d in range(len(shape)) if d not in axes]
    channels, member = (
        np.broadcast_to(x, [shape[d] if d in axes else 1 for d in range(len(shape))]) for x in (classes, member)
    )
    channels, member = (x.transpose([*kept_axes, *axes]).ravel() for x in (channels, member))
    parts = []
    for i in np.unique(member[member > 0]):
        at = np.flatnonzero(member == i)
        order = np.argsort(channels[at], kind="stable")
        size = len(blocks[i - 1].labels)
        if len(at) % size or not (channels[at][order].reshape(size, -1) == blocks[i - 1].labels[:, None]).all():
            raise ValueError("not all channels of a block are there")
        parts.append((int(i - 1), at[order].reshape(size, -1).T))
    return Places((*kept_axes, *axes), len(axes), parts)


def rotate_array(a: Any, classes: np.ndarray, blocks: list[Block], matrix: Callable[[int], Any]) -> Any:
    """Rotates the channels of an array.

    Args:
      a: float64; a `jax.Array` if the matrices are.
      classes, blocks: as for `find_places`.
      matrix: the number of a block -> its orthogonal matrix R, float64 or `Factored`; the channels, a row vector v,
        become v R. With matrices that are a `jax.Array` so is the result, in their dtype, with a derivative.

    Raises:
      ValueError: some channels of a block are not there as often as the others.
    """
    where = find_places(a.shape, classes, blocks)
    return rotate_places(a, where, matrix) if where.parts else a


def rotate_places(a: Any, where: Places, matrix: Callable[[int], Any]) -> Any:
    """`rotate_array` at places that are known, at least one."""
    moved = a.transpose(where.order)
    flat = moved.reshape(*moved.shape[: a.ndim - where.axes], -1)
    matrices = [matrix(i) for i, _ in where.parts]
    turn = _turned if isinstance(matrices[0], jax.Array) else _turned_here
    flat = turn(flat, [index for _, index in where.parts], matrices)
    return flat.reshape(moved.shape).transpose([int(i) for i in np.argsort(where.order)])


def _turned_here(flat: np.ndarray, parts: list[np.ndarray], matrices: list[np.ndarray | Factored]) -> np.ndarray:
    rows = flat.reshape(-1, flat.shape[-1])
    out = np.empty_like(rows) if sum(index.size for index in parts) == rows.shape[1] else rows.copy()
    for index, matrix in zip(parts, matrices, strict=True):
        for at in map(_run, index):  # one product of matrices for each copy: many small ones are slow
            if isinstance(matrix, Factored):
                turn_rows(rows[:, at], matrix, turned := out[:, at])
                if not isinstance(at, slice):
                    out[:, at] = turned
            else:
                out[:, at] = rows[:, at] @ matrix
    return out.reshape(flat.shape)


def _run(index: np.ndarray) -> Any:
    """An index as a slice, where it is one: what it takes is not copied."""
    first = int(index[0])
    return slice(first, first + len(index)) if np.array_equal(index, np.arange(first, first + len(index))) else index


def _turned(flat: Any, parts: list[np.ndarray], matrices: list[jax.Array]) -> jax.Array:
    """The same in JAX: blocks of one size in one product, entries that stay put where they are."""
    flat = jnp.asarray(flat, matrices[0].dtype)
    n = flat.shape[-1]
    together: dict[tuple[int, ...], list[int]] = {}
    for i, index in enumerate(parts):
        together.setdefault(index.shape, []).append(i)
    order, out = [], []
    for numbers in together.values():
        index = np.stack([parts[i] for i in numbers])
        stack = jnp.stack([matrices[i] for i in numbers])
        x = _take(flat, index.ravel()).reshape(*flat.shape[:-1], *index.shape)
        y = jnp.einsum("...kcn,knm->...kcm", x, stack, precision=jax.lax.Precision.HIGHEST)
        order.append(index.ravel())
        out.append(y.reshape(*flat.shape[:-1], index.size))
    rest = np.setdiff1d(np.arange(n), np.concatenate(order))
    if len(rest):
        order.append(rest)
        out.append(_take(flat, rest))
    joined = out[0] if len(out) == 1 else jnp.concatenate(out, axis=-1)
    return _take(joined, np.argsort(np.concatenate(order), kind="stable"))


def _take(flat: jax.Array, index: np.ndarray) -> jax.Array:
    """The entries of the last axis at an index that names each once; none is moved where it is all of them in order."""
    return flat if np.array_equal(index, np.arange(flat.shape[-1])) else jnp.take(flat, index, axis=-1)


def classes_of(flow: Flow, role: Role, side: str) -> np.ndarray | None:
    """The classes that a leaf's entries produce ("outs") or contract ("ins"), 0 where nothing reads them."""
    table = flow.outs if side == "outs" else flow.ins
    return flow.labels.find(np.maximum(table[role], 0)) if role in table else None
