"""`Program`: what a fold reads of a function, and the proof that a change of its parameters changes nothing else."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core.errors import JQuantWarning
from jquant.core.paths import flatten_with_paths
from jquant.core.per_use import PerUse, held, holding, is_per_use
from jquant.fold import arrays
from jquant.fold.ahead import ahead
from jquant.fold.flow import Flow
from jquant.fold.info import Fold, Role
from jquant.fold.rotations import classes_of
from jquant.fold.wide import cut_leaf, made_in_parts, run_together
from jquant.trace.function import call_args, split_arrays, trace_call
from jquant.trace.line import Line
from jquant.trace.view import Ref

Cuts = Sequence[tuple[int, ...]]
TOLERANCE = 1e-9
_TOKENS = 16


class Program(NamedTuple):
    """A function and its parameters.

    Attributes:
      line: its equations, all calls inlined, at the shapes of a batch.
      leaves: the parameters by path.
      small, arrays: the same at a small part of the batch, and that part: what proofs run.
    """

    line: Line
    leaves: dict[str, Any]
    small: Line
    arrays: list[Any]


def read_program(apply: Callable[..., Any], params: Any, batch: Any) -> Program:
    """Traces a function for folds. `batch` may hold ShapeDtypeStructs; the proof then runs on numbers of its own."""
    args, kwargs = call_args(batch)
    traced = trace_call(apply, params, args, kwargs)
    leaves = dict(zip(traced.paths, traced.leaves, strict=True))
    small, some = traced, traced.arrays
    for rows, tokens in ((2, _TOKENS), (2, None)):
        found, rebuild = split_arrays((args, kwargs))
        part = [_part(a, rows, tokens) for a in found]
        if [a.shape for a in part] == [a.shape for a in some]:
            continue
        try:
            small_args, small_kwargs = rebuild(part)
            small, some = trace_call(apply, params, small_args, small_kwargs), part
            break
        except Exception:  # a function that wants all of it: whatever it raises, the whole batch will do
            continue
    return Program(Line(traced, inline=True), leaves, Line(small, inline=True), [_numbers(a) for a in some])


def _part(a: Any, rows: int, tokens: int | None) -> Any:
    shape = list(a.shape)
    if shape:
        shape[0] = min(rows, shape[0])
    if len(shape) > 1 and tokens is not None:
        shape[1] = min(tokens, shape[1])
    if isinstance(a, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(tuple(shape), a.dtype)
    return a[tuple(slice(0, n) for n in shape)]


def _numbers(a: Any) -> Any:
    if not isinstance(a, jax.ShapeDtypeStruct):
        return a
    if jnp.issubdtype(a.dtype, jnp.floating):
        return np.random.default_rng(0).normal(size=a.shape).astype(a.dtype)
    return (np.arange(int(np.prod(a.shape))) % 7).reshape(a.shape).astype(a.dtype)


def edit(folds: Sequence[Fold], path: str, leaf: Any, cuts: Cuts = ()) -> Any:
    """A leaf (float64, or a PerUse), or the part of it that `cuts` take, changed by folds, one after the other; the
    leaf itself where nothing is.

    A `jax.Array` stays one, in its dtype, and has a derivative if the change has; of a PerUse that may be the value,
    the maps are numbers.

    Raises:
      ValueError: it can't be changed so.
    """
    for fold in folds:
        leaf = _edit(fold, path, leaf, cuts)
    return leaf


def roles_of(flow: Flow, path: str) -> list[Role]:
    """The ways in which a leaf is read, if a fold may change it."""
    return [] if path in flow.fixed else [r for r in flow.outs if r.path == path]


def _edit(fold: Fold, path: str, leaf: Any, cuts: Cuts) -> Any:
    flow, roles = fold.flow, roles_of(fold.flow, path)
    if not roles:
        return leaf
    if is_per_use(leaf) or {r.kind for r in roles} == {"dot", "lookup"}:
        return _edit_uses(fold, leaf, {r.kind: r for r in roles})
    [role] = roles
    a, b = flow.affine.get(path, (1.0, 0.0)) if role.kind == "read" else (1.0, 0.0)
    before = _wide(leaf) if (a, b) == (1, 0) else _wide(leaf) * a + b
    after = fold.change(before, _cut(flow, role, "outs", cuts), _cut(flow, role, "ins", cuts))
    if role.kind == "read" and not isinstance(after, jax.Array):
        # a gain that was divided by itself is one, and not one and a rounding error
        after = np.where(np.abs(after - 1) < 1e-15, 1.0, after)
    if _same(after, before):
        return leaf
    return after if (a, b) == (1, 0) else (after - b) / a


def _wide(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf, np.float64)


def _same(after: Any, before: Any) -> bool:
    """Whether a change is none; one that is traced is one."""
    if after is before or isinstance(after, jax.Array):
        return after is before
    some = (..., slice(1))  # most changes show at once
    return np.array_equal(after[some], before[some]) and np.array_equal(after, before)


def _cut(flow: Flow, role: Role, side: str, cuts: Cuts) -> np.ndarray | None:
    classes = classes_of(flow, role, side)
    return None if classes is None else arrays.cut(classes, cuts)


def _edit_uses(fold: Fold, leaf: Any, roles: dict[str, Role]) -> Any:
    """A leaf that is looked up and multiplied: one array if both change alike, else a PerUse."""
    flow = fold.flow
    node = leaf if isinstance(leaf, PerUse) else PerUse(leaf)
    maps: dict[str, Any] = {}
    begun: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for kind, side, key in (("lookup", "outs", "lookup"), ("dot", "ins", "product")):
        maps[key] = getattr(node, key)
        if kind in roles:
            classes = _row_classes(flow, roles[kind], side)
            before = _map_rows(maps[key], fold.diagonal, classes.shape[-1])
            begun[key] = before, classes
            after = fold.change(before, *((classes, None) if side == "outs" else (None, classes)))
            if not _same(after, before):
                maps[key] = after[0] if len(after) == 1 else after
    if is_per_use(leaf) or not _alike(maps["lookup"], maps["product"], begun):
        return node.replace(**maps)
    if maps["lookup"] is None:
        return leaf
    axis = _row_axis(flow, roles["lookup"])
    by, xp = maps["lookup"], jnp if isinstance(leaf, jax.Array) else np
    rows = xp.moveaxis(_wide(leaf), axis, -1)
    return xp.moveaxis(rows * by if by.ndim == 1 else xp.matmul(rows, by), -1, axis)


def _row_axis(flow: Flow, role: Role) -> int:
    return next(d for d, n in enumerate(flow.outs[role].shape) if n > 1)


def _alike(a: Any, b: Any, begun: dict[str, tuple[np.ndarray, np.ndarray]]) -> bool:
    if a is None or b is None:
        return a is b
    if isinstance(a, jax.Array) or isinstance(b, jax.Array):  # no numbers; what was turned alike is alike
        return len(begun) == 2 and all(map(np.array_equal, *begun.values()))
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-12, atol=1e-12)


def _map_rows(by: Any, diagonal: bool, n: int) -> np.ndarray:
    """A map as rows `[rows, n]` that a change acts on."""
    if by is None:
        return np.ones((1, n)) if diagonal else np.eye(n)
    by = np.asarray(by, np.float64)
    if by.ndim == 2:
        return by
    return by[None] if diagonal else np.diag(by)


def _row_classes(flow: Flow, role: Role, side: str) -> np.ndarray:
    """The classes of the rows of a table, `[1, n]`."""
    classes = classes_of(flow, role, side)
    n = flow.line.params[role.path].shape[-1]
    if classes is None:
        return np.zeros((1, n), np.int64)
    other = classes_of(flow, role, "ins" if side == "outs" else "outs")
    if role.kind == "dot" and other is not None and other.any() or sum(s > 1 for s in classes.shape) > 1:
        raise ValueError(f"{role.path} is read in two ways, and along several axes")
    return classes.reshape(1, -1)


class Refused(NamedTuple):
    """What was not applied, and why."""

    item: Any
    why: str


class Proof(NamedTuple):
    """What was proven.

    Attributes:
      good: the items whose folds change no output.
      bad: the others.
      made: by path, leaves that the folds of `good` change, as `apply_fold` gives them, where the proof made them and
        making them takes products of matrices.
    """

    good: list[Any]
    bad: list[Refused]
    made: dict[str, Any]


def prove(program: Program, make: Callable[[list[Any]], Sequence[Fold]], items: list[Any], keep: bool = True) -> Proof:
    """The items whose folds leave the float64 outputs as they are, to 1e-9 of the largest, and the others.

    All at once where that holds; else halves, and so on. Costs two runs of a few tokens, more only where one fails.
    What it makes of leaves is given back if `keep`.
    """
    before: list[np.ndarray] | None = None
    good: list[Any] = []
    bad: list[Refused] = []
    made: dict[str, Any] = {}
    parts = [items] if items else []
    while parts:  # no function that calls itself: that would hold the parameters until the next garbage collection
        part = parts.pop(0)
        made.clear()
        before, why = _difference(program, make([*good, *part]), before, made if keep else None)
        if not why:
            good.extend(part)
        elif len(part) == 1:
            bad.append(Refused(part[0], why))
        else:
            parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
    return Proof(good, bad, {} if bad else made)


def _difference(
    program: Program, folds: Sequence[Fold], before: list[np.ndarray] | None, made: dict[str, Any] | None
) -> tuple[list[np.ndarray], str]:
    """The outputs without folds (`before`, if they are known), and why the folds change them, or "".

    Leaves that are changed as a whole, at a cost, are put into `made`, if there is one.
    """
    costly = not all(fold.diagonal for fold in folds)
    refs = (a for i in program.small.instrs for a in i.args if isinstance(a, Ref))
    keys = [(a.path, a.value.cuts) for a in refs if not made_in_parts(a)]

    def pair(path: str, cuts: Cuts) -> tuple[Any, Any]:
        wide = cut_leaf(program.leaves[path], cuts)
        try:
            return wide, edit(folds, path, wide, cuts)
        except ValueError as e:
            return wide, e

    with ahead(pair, keys, lambda key: math.prod(program.small.params[key[0]].shape)) as made_ahead:

        def changed(path: str, cuts: Cuts) -> Any:
            wide, done = made_ahead(path, cuts)
            if isinstance(done, ValueError):
                raise done
            if made is not None and costly and not cuts and done is not wide and path not in made:
                made[path] = _finished(program.leaves[path], wide, done)
            return done

        runs = [changed] if before is not None else [lambda path, cuts: made_ahead(path, cuts)[0], changed]
        *first, after = run_together(program.small, runs, program.arrays)
    found = first[0] if before is None else before
    if isinstance(found, ValueError):
        raise found
    return found, str(after) if isinstance(after, ValueError) else _first_change(found, after)


def _first_change(before: list[np.ndarray], after: list[np.ndarray]) -> str:
    """What is not the same in the outputs, or ""."""
    for a, b in zip(before, after, strict=True):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            if not np.array_equal(a, b):
                return "an output that is no float changes"
            continue
        top = np.max(np.abs(a), initial=0.0)
        error = np.max(np.abs(a - b), initial=0.0)
        if not error <= TOLERANCE * top:
            return f"the float64 outputs change by {error / max(top, 1e-300):.1e} of the largest"
    return ""


_NONE: Mapping[str, Any] = MappingProxyType({})


def apply_fold(folds: Sequence[Fold], params: Any, made: Mapping[str, Any] = _NONE, *, traced: Any = None) -> Any:
    """Parameters changed by folds, one after the other: computed in float64, in the dtypes that they had (the maps of a
    PerUse in float32).

    Args:
      made: what a proof made of them.
      traced: a float dtype, to compute in JAX and in it, with a derivative; the maps of a PerUse must be numbers.
    """
    flat, treedef = flatten_with_paths(params)
    paths, leaves = [p for p, _ in flat], [leaf for _, leaf in flat]
    del params, flat  # a leaf that nothing else holds is freed when its successor is there
    for i, path in enumerate(paths):
        leaves[i] = made[path] if path in made else _applied(folds, path, leaves[i], traced)
    return treedef.unflatten(leaves)


def _applied(folds: Sequence[Fold], path: str, leaf: Any, traced: Any) -> Any:
    if not any(roles_of(fold.flow, path) for fold in folds):
        return leaf
    inner = leaf if is_per_use(leaf) else np.asarray(leaf) if traced is None else jnp.asarray(leaf)
    if not jnp.issubdtype(inner.dtype, jnp.floating):
        return leaf
    return _finished(leaf, inner, edit(folds, path, inner)) if traced is None else edited(folds, path, leaf, traced)


def edited(folds: Sequence[Fold], path: str, leaf: Any, dtype: Any, cuts: Cuts = ()) -> Any:
    """`edit` in JAX, computed in `dtype`, of a float leaf as it is."""
    inner = holding(leaf, jnp.asarray(held(leaf)).astype(dtype))
    return _finished(leaf, inner, edit(folds, path, inner, cuts))


def _finished(leaf: Any, inner: Any, done: Any) -> Any:
    """What `edit` made of `inner`, which is `leaf` in float64, in the dtypes of the leaf."""
    if done is inner:
        return leaf
    value = held(leaf) if held(done) is held(inner) else _narrowed(held(done), leaf.dtype)
    if not isinstance(done, PerUse):
        return value
    dtype = jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32
    maps = {k: None if (m := getattr(done, k)) is None else jnp.asarray(m, dtype) for k in ("lookup", "product")}
    return done.replace(value=value, **maps)


def _narrowed(a: Any, dtype: Any) -> jax.Array:
    if isinstance(a, jax.Array):
        return jnp.asarray(a, dtype)
    a = np.asarray(a)
    return jnp.asarray(a.astype(dtype) if dtype == np.float32 else a, dtype)  # numpy is the faster one here


def warn_refused(name: str, refused: list[Refused], tell: Callable[[Any], str]) -> None:
    """One warning for each thing that was not applied."""
    for one in refused:
        warnings.warn(f"{name}: {tell(one.item)} is left as it is: {one.why}", JQuantWarning, stacklevel=4)
