"""`quantize`: a recipe and a method turn a float tree into a quantized one."""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.calibrate import calibrate
from jquant.core import kept, memory
from jquant.core.activation import Policy
from jquant.core.errors import JQuantError, JQuantWarning, NonFiniteError
from jquant.core.formats import Format
from jquant.core.method import Folding, Method, Rounding
from jquant.core.paths import flatten_with_paths
from jquant.core.per_use import held, holding
from jquant.core.problem import as_problem, finish
from jquant.core.qtensor import QTensor
from jquant.core.recipe import Recipe, as_recipe
from jquant.core.side import Side, zeros_beside
from jquant.core.stats import Stats
from jquant.ranges import add_activations
from jquant.resume import Store, fingerprint
from jquant.solvers.rtn import rtn
from jquant.trace.function import call_args, tracing_once
from jquant.trace.observe import Observed, stats_shapes
from jquant.trace.program import Unit
from jquant.trace.sites import find_sites
from jquant.trace.targets import Target, plan_targets
from jquant.walk import Axes, Gathered, Job, Walk, observe, unit_axes, unit_name


def quantize(
    apply: Callable[..., Any],
    params: Any,
    recipe: Recipe | Mapping[str, Format | Policy | None] | Format | Policy,
    method: Method | None = None,
    batches: Iterable[Any] = (),
    *,
    resume: Any = None,
) -> Any:
    """Quantizes the leaves of `params` that the recipe names and a matmul or lookup of `apply` reads.

    A method that needs data walks the model: each weight is solved on the inputs that the already quantized part of
    the model produces for it. A leaf that is read twice is solved when the last of its reads has been observed, and
    stays in float for the reads before that. A leaf that is only looked up is rounded to nearest. On a terminal a line
    shows the progress.

    What a method does to the model before rounding (`rotate`, the scales of `awq` and `smoothquant`) comes first, and
    is proven in float64 to leave the function as it is; a warning names what was not found or not proven, and is left
    as it was. `find_folds` lists what a model allows. A table that is looked up and multiplied may come back as a leaf
    that only `quantized` reads, which holds a small map for each of its two uses.

    Where the recipe has a `Policy`, the inputs of the matmuls are rounded too when `quantized` runs them, and in the
    walk, so that weights are solved for rounded inputs. Not rounded in the walk are those of convolutions and ragged
    products, those with a static range: that is calibrated at its end, on what the quantized weights produce; and those
    out of which a method takes something first (`lowrank_inputs`).

    Args:
      apply: `apply(params, *args)`, pure.
      params: a pytree of arrays. Leaves that are QTensors already stay as they are.
      recipe: what: a Recipe, a mapping from patterns to formats or policies, or one Format or Policy for all.
      method: how: `rtn()` (the default), `gptq()`, or a `chain` of several.
      batches: calibration data: what `apply` takes after the parameters, arrays or tuples or dicts of arguments.
        Methods without data need one for its shapes (`jax.ShapeDtypeStruct`s do), unless an input has a static range.
      resume: a folder in which the work is kept; a second call with the same arguments goes on where the first was
        stopped, and ends in the same bits.

    Returns:
      A tree of the structure of `params` with `QTensor` leaves.

    Raises:
      RecipeError: a pattern matches nothing that can be quantized, or no token reached an input with a static range.
      NonFiniteError: a weight or an activation is NaN or infinite.
      CheckpointError: `resume` holds other work.
      JQuantError: no batches, or shapes where the method needs data.
    """
    method, recipe, batches = method or rtn(), as_recipe(recipe), list(batches)
    if not batches:
        raise JQuantError("quantize: give at least one batch in `batches`; without data, one with the shapes is enough")
    if method.needs_data and any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(batches)):
        raise JQuantError(f"quantize: {method.name} looks at calibration data, and the batches are shapes; give arrays")
    box = [params]
    del params  # if the caller kept no reference either, what is replaced is freed
    args, kwargs = call_args(batches[0])
    with tracing_once(), ThreadPoolExecutor() as pool:
        targets = plan_targets(find_sites(apply, box[0], *args, **kwargs), box[0], recipe)
        programs = [] if method.needs else _compiling(pool, method, targets, box[0])
        _check_weights({p: v for p, v in flatten_with_paths(box[0])[0] if p in targets})
        box.append(folded(apply, box, targets, method, batches))
        more = (batches, recipe, resume)
        tree = _walk(apply, box, targets, method, *more) if method.needs else _each(box, targets, method, programs)
        return add_activations(apply, tree, targets, batches)


def _each(box: list[Any], targets: dict[str, Target], method: Method, programs: list[Future[Any]]) -> Any:
    """The parameters in `box`, each solved for itself by `programs`; one that nothing else holds is freed once it is
    solved."""
    flat, treedef = flatten_with_paths(box.pop())
    paths, leaves = [p for p, _ in flat], [leaf for _, leaf in flat]
    del flat
    for program in programs:
        program.result()
    for i, path in enumerate(paths):
        if path in targets:
            leaves[i] = holding(leaves[i], _solve_whole(leaves[i], targets[path], method))
    return treedef.unflatten(leaves)


def folded(apply: Any, box: list[Any], targets: dict[str, Target], method: Method, batches: list[Any]) -> Any:
    """The parameters in `box` after what the method does to the model before it rounds."""
    formats = {p: t.format for p, t in targets.items()}
    activations = {p: t.activation for p, t in targets.items() if t.activation is not None}

    def statistics(params: Any, paths: Iterable[str], gram: bool = False) -> dict[str, Stats]:
        return calibrate(apply, params, batches, paths=paths, gram=gram)

    def observed(params: Any, paths: Iterable[str], needs: frozenset[str], take: Callable[..., None]) -> None:
        observe(apply, params, batches, _axes_of(targets), paths, needs, take)

    for fold in method.folds:
        box.append(fold(Folding(apply, [box.pop()], batches, formats, statistics, observed, activations)))
        memory.give_back()
    return box.pop()


def _axes_of(targets: Mapping[str, Target]) -> dict[str, Axes]:
    return {p: (t.contracted, t.batch) for p, t in targets.items()}


# --- one weight ---


def _check_weights(leaves: dict[str, Any]) -> None:
    for path, leaf in leaves.items():
        if bad := _count_not_finite(held(leaf)):
            raise NonFiniteError(f"{path}: {bad} of {leaf.size} weights are NaN or infinite; nothing was quantized")


def _count_not_finite(leaf: Any) -> int:
    """How many entries are NaN or infinite: none if a sum of squares, at the speed of memory, is finite."""
    if leaf.dtype not in (np.float32, np.float64) or not memory.in_host_memory(leaf):
        return int(_not_finite(leaf))
    flat = np.asarray(leaf).ravel()
    with np.errstate(all="ignore"):
        return 0 if np.isfinite(np.dot(flat, flat)) else int(np.sum(~np.isfinite(flat)))


@jax.jit
def _not_finite(leaf: Any) -> jax.Array:
    return jnp.sum(~jnp.isfinite(leaf))


_ROUND = rtn()  # for what no activations reach


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _solved(
    method: Method, fmt: Format, axes: tuple[Axes, ...], weights: list[jax.Array], stats: Stats | None
) -> tuple[list[QTensor], dict[str, jax.Array]]:
    """Weights that share their statistics, solved as the rows of one matrix; and the solver's notes."""
    problems = [as_problem(w, *a) for w, a in zip(weights, axes, strict=True)]
    rows = jnp.concatenate([p.rows.astype(jnp.float32) for p in problems], axis=1)
    flat = None if stats is None else _flat_stats(stats, rows.shape[0])
    parts = tuple(p.rows.shape[1] for p in problems)
    done = None if method.solve is None else method.solve(Rounding(rows, parts=parts), flat, fmt)
    if done is None or done.codes is None:
        raise JQuantError(f"quantize: {method.name} chooses no codes; chain it with rtn() or gptq()")
    return [finish(p, _part(done, i), fmt) for i, p in enumerate(problems)], done.notes


def _part(done: Rounding, i: int) -> Rounding:
    """The answer for one of the weights."""
    if len(done.parts) == 1:
        return done
    start, stop = done.spans[i]
    params, codes = jax.tree.map(lambda a: a[:, start:stop], (done.params, done.codes))
    return Rounding(done.rows[:, start:stop], params, codes, sides=done.sides[i : i + 1])


def _flat_stats(stats: Stats, batch: int) -> Stats:
    """Statistics with one leading batch axis."""
    lead = stats.tokens.ndim
    return jax.tree.map(lambda a: a.reshape(batch, *a.shape[lead:]), stats)


def _axes_alone(target: Target) -> tuple[Axes]:
    return ((target.contracted, target.batch),)


def _compiling(
    pool: ThreadPoolExecutor, method: Method, targets: dict[str, Target], params: Any
) -> list[Future[Any]]:
    """The programs that `_solve_whole` will run; other threads compile them while the next is traced here."""
    first = {}
    for path, leaf in flatten_with_paths(params)[0]:
        if path in targets:
            w, target = held(leaf), targets[path]
            first[target.format, _axes_alone(target), w.shape, str(w.dtype)] = w
    return [pool.submit(_solved.lower(method, *key[:2], [w], None).compile) for key, w in first.items()]


def _solve_whole(w: Any, target: Target, method: Method) -> QTensor:
    """A leaf without statistics."""
    (q,), notes = _solved(method, target.format, _axes_alone(target), [jnp.asarray(held(w))], None)
    _warn(target.path, notes)
    return q


# What a solver notes, in words; notes that are not here are no reason to warn.
_NOTES = {
    "dead_channels": "{:.0f} input channels are zero in all calibration data; their weights are rounded to nearest",
    "no_tokens": "no calibration token reached {:.0f} of its matrices (experts, layers); those are rounded to nearest",
    "no_side": "the budget is less than a side of rank 1 takes for {:.0f} of its matrices; those have none",
    "damping_added": "its Gram matrix is singular; damping was raised by {:.3g} of its mean diagonal",
}


def _warn(name: str, notes: dict[str, jax.Array]) -> None:
    values = jax.device_get({note: notes[note] for note in _NOTES if note in notes})
    if "no_tokens" in values:  # of a matrix that saw no token all channels are dead
        values["dead_channels"] = np.where(values["no_tokens"], 0, values["dead_channels"])
    for note, value in values.items():
        text = _NOTES[note]
        if total := float(np.sum(value)):
            warnings.warn(f"{name}: {text.format(total)}", JQuantWarning, stacklevel=2)


# --- the walk ---


def _walk(
    apply: Any, box: list[Any], targets: dict[str, Target], method: Method, batches: list[Any], recipe: Recipe,
    resume: Any,
) -> Any:  # fmt: skip
    """The parameters in `box`, the leaves of `targets` solved on the walk."""
    wanted = {p for p, t in targets.items() if t.observable}
    rounds = {p: t.activation for p, t in targets.items() if t.activation is not None and not t.activation.static}
    if method.first:  # what is rounded is what is left of an input when the walk has seen it
        rounds = {}
    walk = Walk(apply, box[0], batches, wanted, method.needs, rounds)
    treedef = flatten_with_paths(box.pop())[1]
    store, start, solved = None, 0, {}
    if resume is not None:
        names = (repr(recipe), method.name, jax.__version__)
        store = Store(resume, fingerprint(list(walk.leaves), list(walk.leaves.values()), batches, *names))
    solver = _Solver(walk, targets, method)
    solver.prepare()
    if store is not None and (state := store.state(len(batches))) is not None:
        start, values = state
        walk.restore(start, values)
        done = {u for stop in walk.stops[:start] for u in stop}
        solved = {u: q for u, q in store.units().items() if u in done}

    def after(stop: int, new: dict[Unit, QTensor]) -> None:
        if store is not None:
            store.save(stop, new, walk.live_values, stop + 1 == len(walk))

    units = walk.run(solver, start, solved, after)
    leaves = walk.leaves
    for path, target in targets.items():
        leaves[path] = holding(leaves[path], _assemble(path, target, walk, units))
    return treedef.unflatten(leaves.values())


class _Solver:
    """Solves the jobs of a stop."""

    def __init__(self, walk: Walk, targets: dict[str, Target], method: Method):
        self.walk, self.targets, self.method = walk, targets, method
        self.gathered = Gathered(walk, _axes_of(targets))

    def __call__(self, jobs: list[Job], seen: dict[int, Observed]) -> dict[Unit, QTensor]:
        ready: dict[Any, list[Unit]] = {}
        stats: dict[Any, Observed] = {}
        for unit, mine in self.gathered.ready(jobs, seen).items():
            key = self._key(unit, mine)
            ready.setdefault(key, []).append(unit)
            if mine is not None:
                stats[key] = mine
        out: dict[Unit, QTensor] = {}
        for key, units in ready.items():
            out.update(self._solve(units, stats.get(key)))
        return out

    def _key(self, unit: Unit, stats: Observed | None) -> Any:
        """Units that can be solved as the rows of one matrix: the same statistics, the same format."""
        return (id(stats), *self._together(unit)) if stats is not None else (None, unit)

    def _together(self, unit: Unit) -> Any:
        """Of units with the same statistics, equal for those that are solved together."""
        fmt = self._format(unit)
        return (fmt, None if fmt.rows_apart else unit)

    def _solve(self, units: list[Unit], seen: Observed | None) -> dict[Unit, QTensor]:
        name = unit_name(units[0]) + (f" and {len(units) - 1} more" if len(units) > 1 else "")
        self._warn_skipped(name, units, seen)
        method, stats = (_ROUND, None) if seen is None else (self.method, seen.stats)
        weights = [jnp.asarray(held(self.walk.unit_value(u))) for u in units]
        out, notes = _solved(method, self._format(units[0]), tuple(map(self._axes, units)), weights, stats)
        _warn(name, notes)
        return dict(zip(units, out, strict=True))

    def _warn_skipped(self, name: str, units: list[Unit], seen: Observed | None) -> None:
        skipped = self.gathered.skipped
        reasons = sorted({skipped[u] for u in units if u in skipped})
        if seen is None:
            why = ", ".join(reasons) or "no activations reach it"
            warnings.warn(f"{name}: {why}; rounded to nearest", JQuantWarning, stacklevel=2)
        elif reasons:
            why = ", ".join(reasons)
            warnings.warn(f"{name}: solved without what one of its uses reads: {why}", JQuantWarning, stacklevel=2)

    def _format(self, unit: Unit) -> Format:
        return self.targets[unit.path].format

    def _axes(self, unit: Unit) -> Axes:
        target = self.targets[unit.path]
        return unit_axes(target.contracted, unit.at), unit_axes(target.batch, unit.at)

    def prepare(self) -> None:
        """Compiles the solvers that the walk will ask for, as far as its stops tell.

        Compiling takes memory; here there are no activations yet.
        """
        expected = [key for units in self.walk.ready() for key in self._expected(units)]
        for fmt, axes, shapes, lead, n in dict.fromkeys(expected):
            weights = [jax.ShapeDtypeStruct(*s) for s in shapes]
            _solved.lower(self.method, fmt, axes, weights, stats_shapes(self.method.needs, lead, n)).compile()
        memory.give_back()

    def _expected(self, units: list[Unit]) -> list[Any]:
        """What `_solved` will be called with: the units of a stop read one array, most often in one way."""
        groups: dict[Any, list[Unit]] = {}
        for unit in units:
            (contracted, batch), shape = self._axes(unit), self._shape(unit)
            sizes = tuple(shape[a] for a in batch), math.prod(shape[a] for a in contracted)
            groups.setdefault((*sizes, *self._together(unit)), []).append(unit)
        dtype = lambda u: jnp.result_type(held(self.walk.leaves[u.path]))
        return [
            (fmt, tuple(map(self._axes, group)), tuple((self._shape(u), dtype(u)) for u in group), lead, n)
            for (lead, n, fmt, _), group in groups.items()
        ]

    def _shape(self, unit: Unit) -> tuple[int, ...]:
        return tuple(jax.eval_shape(lambda w: kept.apply_cuts(w, unit.cuts), held(self.walk.leaves[unit.path])).shape)


def _assemble(path: str, target: Target, walk: Walk, units: dict[Unit, QTensor]) -> QTensor:
    """The leaf's QTensor from its units: one, or the slices of a stack. What no stop observed is rounded to nearest."""
    mine = {u: q for u, q in units.items() if u.path == path}
    if list(mine) == [Unit(path, (), ())]:
        return next(iter(mine.values()))
    leaf = jnp.asarray(held(walk.leaves[path]))
    if not mine:
        if target.observable:
            warnings.warn(f"{path}: no activations reach it; rounded to nearest", JQuantWarning, stacklevel=2)
        return _solve_whole(leaf, target, _ROUND)
    base = _solve_whole(leaf, target, _ROUND)
    like = next((q.side for q in mine.values() if q.side is not None), None)
    walked = {axis for u in mine for axis, _ in u.at}
    base = _with_zero_side(base, tuple({*target.batch, *walked}), like)
    for unit, q in mine.items():
        base = _put(base, unit, _with_zero_side(q, unit_axes(target.batch, unit.at), like))
    return base


def _with_zero_side(q: QTensor, batch: tuple[int, ...], like: Side | None) -> QTensor:
    """A QTensor with a side where its neighbours in the stack have one: its own, or one of zeros."""
    if q.side is not None or like is None:
        return q
    own = [q.kept.index(a) for a in batch]
    return q.replace(side=zeros_beside(q.codes[0].shape[:-1], own, like))


def _put(whole: QTensor, unit: Unit, q: QTensor) -> QTensor:
    """Writes a unit's arrays at its place in those of the full leaf."""
    kept = whole.kept
    where: list[Any] = [slice(None)] * len(kept)
    for axis, i in unit.at:
        where[kept.index(axis)] = i
    return jax.tree.map(lambda a, b: a.at[tuple(where)].set(b), whole, q.replace(contracted=whole.contracted))
