"""Calibration statistics as functional outputs: what each weight's inputs were."""

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.core.activation import Activation
from jquant.core.histogram import histogram
from jquant.core.qtensor import is_qtensor
from jquant.core.stats import Stats, merge
from jquant.ops.dot import apart, fits, takes
from jquant.ops.low_precision import round_input
from jquant.trace import compat, interpreter
from jquant.trace.sites import full_axes, input_key
from jquant.trace.streams import both
from jquant.trace.uses import Use
from jquant.trace.view import Ref

_FULL = jax.lax.Precision.HIGHEST


# All statistics of one model, by the names a Method asks with; "cross" is of two (see `trace.streams`).
NEEDS = frozenset({"gram", "absmax", "mean_abs", "peak", "histogram"})


class Observed(NamedTuple):
    """Statistics of one array, and how many of its channels held a value that is not finite (int32 `[*batch]`); or of
    the keys and values of an attention (int32 `[*layers, 2]`).

    A Gram matrix is symmetric: here it is the blocks of rows of its lower triangle, `[*batch, b - a, b]` for the rows
    a to b, which takes 5/8 of the products. `gather_stats` makes it whole.
    """

    stats: Any  # Stats; or KVStats
    nonfinite: jax.Array

    def merge(self, other: "Observed") -> "Observed":
        """Both together."""
        return Observed(merge(self.stats, other.stats), self.nonfinite + other.nonfinite)


@jax.jit
def merge_all(a: dict[int, Observed], b: dict[int, Observed]) -> dict[int, Observed]:
    """What two batches gave, by group number, together."""
    return {k: a[k].merge(b[k]) for k in a}


def nothing(shapes: Any) -> Any:
    """Statistics of no batch, for shapes as `jax.eval_shape` gives them."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


class Member(NamedTuple):
    """Where the statistics of a leaf are to be found.

    Attributes:
      group: number of the observed array.
      axes: the full leaf's axes that the leading axes of the statistics are, in their order.
      at: static indices `(axis, index)` of the full leaf that these statistics are for.
      contracted: the full leaf's contracted axes.
    """

    group: int
    axes: tuple[int, ...]
    at: tuple[tuple[int, int], ...]
    contracted: tuple[int, ...]


class ObserveReader:
    """Emits statistics at every use of the wanted leaves; goes on with the float (or dequantized) array.

    Args:
      wanted: paths to observe, or None for all.
      needs: which statistics, a part of `NEEDS`.
      rounds: path -> how, for leaves whose input will be rounded as it comes: the statistics are then those of the
        rounded input.

    Attributes:
      members: for each path the observed arrays it reads. Complete once the function has been traced.
      skipped: uses that can't be observed, by path, with the reason.
    """

    inline, unroll = True, False

    def __init__(
        self,
        wanted: set[str] | None = None,
        needs: frozenset[str] = NEEDS - {"peak", "histogram"},
        rounds: Mapping[str, Activation] = MappingProxyType({}),
    ):
        self.wanted, self.needs, self.rounds = wanted, needs, rounds
        self.members: dict[str, dict[Member, None]] = {}
        self.skipped: dict[str, str] = {}
        self.groups: dict[Any, int] = {}

    def use(self, use: Use, frame: interpreter.Frame) -> list[Any]:
        if self.wanted is None or use.ref.path in self.wanted:
            self._observe(use, frame)
        return compat.bind(use.eqn, *[a.array() if isinstance(a, Ref) else a for a in use.args])

    def read(self, ref: Ref, eqn: Any, frame: interpreter.Frame) -> Any:
        return ref.array()

    def _observe(self, use: Use, frame: interpreter.Frame) -> None:
        if use.kind == "lookup":
            return
        reason = _unobservable(use)
        if reason:
            self.skipped[use.ref.path] = reason
            return
        act = self.rounds.get(use.ref.path)
        key = ("observed", act, _taking(use), *input_key(use))
        if key not in frame.known:
            name = (*frame.scope, id(use.eqn), act)
            scans = tuple(i.by for i in use.ref.stack if i.at == "scanned")
            interpreter.emit(frame, interpreter.Key(name, scans), _place(use, statistics(use, self.needs, act)))
            frame.known[key] = (list(use.args), [name])
        name = frame.known[key][1][0]
        group = self.groups.setdefault(name, len(self.groups))
        self.members.setdefault(use.ref.path, {})[_member(use, group)] = None

    def collect(self, frame: interpreter.Frame) -> dict[int, Observed]:
        """What the top frame emitted, by group number."""
        return {self.groups.setdefault(k.name, len(self.groups)): value for k, value in frame.emitted.items()}


def _unobservable(use: Use) -> str:
    ref = use.ref
    if any(a in ref.sliced for a in (*use.contracted, *use.batch)):
        return "a slice along an axis that its input shares"
    if sum(i.at == "traced" for i in ref.stack) > 1:
        return "indexed along two axes by traced numbers"
    if use.kind == "conv" and use.eqn.params["feature_group_count"] != 1:
        return "a grouped convolution"
    if use.kind == "conv" and use.eqn.params["batch_group_count"] != 1:
        return "a batch-grouped convolution"
    return ""


def _member(use: Use, group: int) -> Member:
    ref = use.ref
    moving = [i.axis for kind in ("scanned", "traced") for i in ref.stack if i.at == kind]
    at = tuple((i.axis, i.at) for i in ref.stack if isinstance(i.at, int))
    return Member(group, (*moving, *full_axes(ref, use.batch)), at, full_axes(ref, use.contracted))


def _place(use: Use, observed: Observed) -> Observed:
    """Statistics of a slice taken at a traced index, at their place among zeros."""
    index = next((i for i in use.ref.stack if i.at == "traced"), None)
    if index is None:
        return observed
    return jax.tree.map(
        lambda a: jnp.zeros((index.size, *a.shape), a.dtype).at[use.ref.position].set(a, mode="clip"), observed
    )


def statistics(use: Use, needs: frozenset[str], act: Activation | None = None) -> Observed:
    """The statistics of a use's input, its leading axes those of `use.batch`.

    Where a side of the weight takes something out of the input, they are of what is left.
    """
    x = other = _left_rows(use) if _taking(use) else _rows(use)
    cross = None
    if "cross" in needs:
        x, other = both(x)
    if act is not None and use.kind == "dot":
        x = round_input(x, act, clip=False)
    if "cross" in needs:
        cross = _cross(use, x.astype(jnp.float32), other.astype(jnp.float32))
    weight = None
    if use.kind == "ragged_dot":
        x, weight = x if x.ndim == 3 else x[None], _expert_mask(use)
    seen = observe_rows(x, needs, weight)
    seen = seen._replace(stats=seen.stats._replace(cross=cross))
    if "histogram" not in needs:
        return seen
    wide = x if weight is None else jnp.broadcast_to(x, (*weight.shape, x.shape[-1]))
    return seen._replace(stats=seen.stats._replace(histogram=histogram(wide, weight)))


def _cross(use: Use, x: jax.Array, other: jax.Array) -> jax.Array:
    """(other - x)^T x. Experts have none: the two streams may send a token to different ones, or in another order."""
    n = x.shape[-1]
    if use.kind == "ragged_dot":
        return jnp.zeros((use.args[2].shape[0], n, n), jnp.float32)
    if x.ndim > 2:
        return jnp.zeros((*x.shape[:-2], n, n), jnp.float32)
    return jnp.matmul((other - x).T, x, precision=_FULL)


def observe_rows(x: jax.Array, needs: frozenset[str], mask: jax.Array | None = None) -> Observed:
    """Statistics of rows `[*batch, tokens, n]`; with a mask `[groups, tokens]`, of the rows of each group."""
    x = x.astype(jnp.float32)
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
        tokens = jnp.sum(mask, axis=-1, dtype=jnp.float32)
    else:
        tokens = jnp.full(x.shape[:-2], x.shape[-2], jnp.float32)
    gram: Any = _gram(x) if "gram" in needs else None
    absmax = jnp.max(jnp.abs(x), axis=-2, initial=0.0) if "absmax" in needs else None
    size = jnp.sum(jnp.abs(x), axis=-2) if "mean_abs" in needs or gram is None else None
    abs_sum = size if "mean_abs" in needs else None
    peak = _peak(x) if "peak" in needs else None
    # A sum is finite only if all its terms are: nothing reads the input once more.
    sums = size if gram is None else _diagonal(gram)
    assert sums is not None
    stats = Stats(gram, abs_sum, absmax, tokens, peak=peak)
    return Observed(stats, jnp.sum(~jnp.isfinite(sums), axis=-1, dtype=jnp.int32))


def _peak(x: jax.Array) -> jax.Array:
    """The largest |x| of each channel of `[*batch, tokens, n]` where tokens have a root mean square of 1."""
    size = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))
    return jnp.max(jnp.abs(x) / jnp.where(size > 0, size, 1), axis=-2, initial=0.0)


def stats_shapes(needs: frozenset[str], lead: tuple[int, ...], n: int) -> Stats:
    """What `gather_stats` gives for n channels and the batch axes `lead`, as shapes."""

    def one() -> Stats:
        stats = observe_rows(jnp.zeros((*lead, 1, n)), needs).stats
        return stats._replace(
            gram=None if stats.gram is None else _whole(stats.gram),
            cross=jnp.zeros((*lead, n, n)) if "cross" in needs else None,
        )

    return jax.eval_shape(one)


def _gram(x: jax.Array) -> tuple[jax.Array, ...]:
    """The lower triangle of x^T x in blocks of rows, for x `[*batch, tokens, n]`."""
    n, axis = x.shape[-1], x.ndim - 2
    count = 4 if n >= 256 else 1
    cuts = [n * i // count for i in range(count + 1)]
    dims = (((axis,), (axis,)), (tuple(range(axis)),) * 2)
    product = partial(jax.lax.dot_general, dimension_numbers=dims, precision=_FULL, preferred_element_type=jnp.float32)
    return tuple(product(x[..., a:b], x[..., :b]) for a, b in pairwise(cuts))


def _diagonal(blocks: tuple[jax.Array, ...]) -> jax.Array:
    """Of the matrix whose lower triangle the blocks of rows hold, `[*batch, n]`."""
    return jnp.concatenate(
        [jnp.diagonal(b, b.shape[-1] - b.shape[-2], axis1=-2, axis2=-1) for b in blocks], axis=-1
    )  # fmt: skip


@jax.jit
def _whole(blocks: tuple[jax.Array, ...]) -> jax.Array:
    """The symmetric matrix whose lower triangle the blocks of rows hold."""
    n = blocks[-1].shape[-1]
    wide = [jnp.pad(b, [(0, 0)] * (b.ndim - 1) + [(0, n - b.shape[-1])]) for b in blocks]
    lower = jnp.tril(jnp.concatenate(wide, axis=-2))
    return lower + jnp.tril(lower, -1).swapaxes(-1, -2)


def _rows(use: Use) -> jax.Array:
    if use.kind == "dot":
        return use.how.operand(use.x)
    if use.kind == "conv":
        return _patches(use)
    return use.args[0]


def _taking(use: Use) -> int:
    """Which side takes something out of the input before the product; 0 for none."""
    q = use.ref.value
    fused = is_qtensor(q) and takes(q) and (use.kind == "ragged_dot" or use.kind == "dot" and fits(q, use.how.batch))
    return id(q.side.taken) if fused else 0


def _left_rows(use: Use) -> jax.Array:
    """What is left of the rows, `[*batch, tokens, n]`; of a ragged product for each expert."""
    q, x = use.ref.value, _rows(use)
    if use.kind == "dot":
        return apart(x, q, use.how.batch, _FULL)[0]
    return apart(jnp.broadcast_to(x, (q.shape[use.batch[0]], *x.shape)), q, use.batch, _FULL)[0]


def _expert_mask(use: Use) -> jax.Array:
    """Which rows of a ragged product each group takes: bool `[groups, tokens]`."""
    sizes, tokens = use.args[2], use.args[0].shape[0]
    ends = jnp.cumsum(sizes)
    row = jnp.arange(tokens)
    return (row >= (ends - sizes)[:, None]) & (row < ends[:, None])


def _patches(use: Use) -> jax.Array:
    """The inputs of a convolution as rows in the order of its kernel's contracted axes."""
    p = use.eqn.params
    spec = p["dimension_numbers"]
    patches = jax.lax.conv_general_dilated_patches(
        use.args[0], filter_shape=[use.ref.shape[d] for d in spec.rhs_spec[2:]], window_strides=p["window_strides"],
        padding=p["padding"], lhs_dilation=p["lhs_dilation"], rhs_dilation=p["rhs_dilation"], dimension_numbers=spec,
        precision=_FULL,
    )  # fmt: skip
    patches = jnp.moveaxis(patches, spec.out_spec[1], -1)
    # Patches come as (in feature, *window); the kernel holds its contracted axes in its own order.
    sizes = [use.ref.shape[d] for d in spec.rhs_spec[1:]]
    order = sorted(range(len(sizes)), key=lambda i: spec.rhs_spec[1:][i])
    patches = patches.reshape(-1, *sizes).transpose([0, *[1 + i for i in order]])
    return patches.reshape(patches.shape[0], -1)


def gather_stats(members: dict[Member, None], observed: dict[int, Observed], shape: tuple[int, ...]) -> Observed:
    """The statistics of one leaf from the arrays it reads.

    Its batch axes are brought into the leaf's order; static indices are put side by side, what was never seen is zero.
    """
    total: Observed | None = None
    for member in members:
        part = _spread(member, observed[member.group], shape)
        total = part if total is None else total.merge(part)
    assert total is not None
    gram = total.stats.gram
    return total if gram is None else total._replace(stats=total.stats._replace(gram=_whole(gram)))


def _spread(member: Member, seen: Observed, shape: tuple[int, ...]) -> Observed:
    axes = [a for a, _ in member.at] + list(member.axes)
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    lead = len(axes)

    def place(a: jax.Array) -> jax.Array:
        if member.at:
            sizes = [shape[axis] for axis, _ in member.at]
            a = jnp.zeros((*sizes, *a.shape), a.dtype).at[tuple(i for _, i in member.at)].set(a)
        return a.transpose([*order, *range(lead, a.ndim)])

    return jax.tree.map(place, seen)


def batch_axes_of(members: dict[Member, None]) -> tuple[int, ...]:
    """The leaf's axes that its statistics have in front, ascending."""
    return tuple(sorted({a for m in members for a in (*m.axes, *[axis for axis, _ in m.at])}))
