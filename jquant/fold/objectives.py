"""What rotations are learned by, and the objective "layers": the error of the layers' outputs, with derivatives.

`network` is the other one. Both round the turned weights to nearest, straight through the rounding and not through the
scales: what a rotation is for is that the range of each block gets smaller (`trace.fake_quant.scaled_error`).
"""

import glob
import math
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core.activation import Policy
from jquant.core.errors import JQuantError
from jquant.core.method import Folding, Rounding
from jquant.core.per_use import is_per_use
from jquant.core.problem import as_problem, bring_back
from jquant.core.qtensor import from_rows
from jquant.core.recipe import Recipe
from jquant.core.stats import Stats
from jquant.fold.info import Role
from jquant.fold.rotate import Ready
from jquant.fold.rotations import Block, Places, rotate_places
from jquant.fold.turning import find_sides, hashable, renumbered
from jquant.solvers.rtn import rtn
from jquant.trace.fake_quant import scaled_error
from jquant.trace.function import call_args
from jquant.trace.sites import find_sites
from jquant.trace.targets import Target, plan_targets

Stacks = list[jax.Array]
_solve: Any = rtn().solve


class Turns(NamedTuple):
    """The matrices of blocks, those of one size (that keep the vector of ones, or don't) in one array.

    Attributes:
      blocks: in the program's order.
      groups: for each block the number of its stack and its place there.
      ones: for each stack whether its matrices keep the vector of ones.
    """

    blocks: list[Block]
    groups: list[tuple[int, int]]
    ones: list[bool]

    def stack(self, matrix_of: Callable[[Block], np.ndarray], dtype: Any = jnp.float32) -> Stacks:
        """The matrices `[k, n, n]` of each stack."""
        parts: list[list[np.ndarray]] = [[] for _ in self.ones]
        for block, (g, _) in zip(self.blocks, self.groups, strict=True):
            parts[g].append(matrix_of(block))
        return [jnp.asarray(np.stack(p), dtype) for p in parts]

    def of(self, stacks: Stacks) -> Callable[[Block], jax.Array]:
        """The matrix of a block."""
        where = {int(b.labels[0]): group for b, group in zip(self.blocks, self.groups, strict=True)}

        def matrix(block: Block) -> jax.Array:
            g, i = where[int(block.labels[0])]
            return stacks[g][i]

        return matrix


def group_blocks(blocks: list[Block]) -> Turns:
    """Blocks in stacks."""
    kinds: dict[tuple[int, bool], int] = {}
    counts: list[int] = []
    groups = []
    for b in blocks:
        g = kinds.setdefault((len(b.labels), b.ones), len(kinds))
        counts += [0] * (g == len(counts))
        groups.append((g, counts[g]))
        counts[g] += 1
    return Turns(blocks, groups, [ones for _, ones in kinds])


class Objective(NamedTuple):
    """A mean over parts.

    Attributes:
      parts: how many.
      value: `(stacks, number of a part) -> loss`, a scalar.
      gradient: likewise, the loss and its derivatives by the stacks.
    """

    parts: int
    value: Callable[[Stacks, int], jax.Array]
    gradient: Callable[[Stacks, int], tuple[jax.Array, Stacks]]


def policies(job: Folding) -> Recipe:
    """What is going to be quantized, as a recipe."""
    rules = {glob.escape(p): Policy(f, job.activations.get(p)) for p, f in job.formats.items()}
    return Recipe(rules)


# --- the layers ---


class _Turned(NamedTuple):
    """One leaf of a unit; places count the unit's own blocks."""

    target: Target
    outs: Places | None
    ins: Places | None


class _Unit(NamedTuple):
    """Leaves that meet the same inputs.

    Attributes:
      key: equal for units that run the same program.
      stacks: the stack of each of its blocks.
      places: the place of each there, int32.
      leaves: how they are turned.
      values: the leaves.
      gram: reads that of their inputs, float32 `[batch, n, n]`.
    """

    key: Any
    stacks: tuple[int, ...]
    places: jax.Array
    leaves: list[_Turned]
    values: list[jax.Array]
    gram: Callable[[], np.ndarray]


def layers(job: Folding, ready: Ready, turns: Turns) -> Objective:
    """tr(E H E^T) / tr(W H W^T), H the second moments of the float model's inputs: the relative squared error of the
    outputs of the weights that share an input; a part is one such input. Tables of two uses are left out.

    Raises:
      JQuantError: nothing that is going to be quantized is turned.
    """
    units = _find_units(job, ready, turns)
    if not units:
        raise JQuantError(
            "learned_rotation: no weight that the recipe names is turned; name one in the recipe, or write rotate()"
        )
    programs: dict[Any, Any] = {}
    for u in units:
        if u.key not in programs:
            loss = _unit_loss(u.leaves, u.stacks)
            programs[u.key] = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
    run = lambda which, stacks, u: programs[u.key][which](stacks, u.places, u.values, u.gram())
    return Objective(len(units), lambda s, i: run(0, s, units[i]), lambda s, i: run(1, s, units[i]))


def _find_units(job: Folding, ready: Ready, turns: Turns) -> list[_Unit]:
    args, kwargs = call_args(job.batches[0])
    targets = plan_targets(find_sites(job.apply, ready.params, *args, **kwargs), ready.params, policies(job))
    roles: dict[str, list[Role]] = {}
    for role in ready.flow.outs:
        roles.setdefault(role.path, []).append(role)
    found: dict[str, _Turned] = {}
    for path, target in targets.items():
        leaf, mine = ready.program.leaves[path], roles.get(path, [])
        if len(mine) == 1 and target.observable and path not in ready.flow.fixed and not is_per_use(leaf):
            places = find_sides(ready, turns.blocks, mine[0], leaf)
            if any(places):
                found[path] = _Turned(target, *places)
    return [_unit(turns, [found[p] for p in paths], ready, gram) for paths, gram in _grams(job, ready, found)]


class _Scratch:
    """A file that is gone with this object."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self.file.close)


def _grams(
    job: Folding, ready: Ready, found: dict[str, _Turned]
) -> list[tuple[list[str], Callable[[], np.ndarray]]]:  # fmt: skip
    """Paths that meet the same inputs, and what reads their Gram matrix: in a file, for all together are as large as
    the model."""
    scratch = _Scratch()
    file = scratch.file
    written: dict[str, dict[Any, tuple[int, tuple[int, ...]]]] = {}

    def take(new: dict[str, dict[Any, Stats]]) -> None:
        known: dict[int, tuple[int, tuple[int, ...]]] = {}
        for path, slices in new.items():
            for at, stats in slices.items():
                if stats.gram is not None:
                    if id(stats.gram) not in known:
                        known[id(stats.gram)] = file.tell(), stats.gram.shape
                        file.write(np.asarray(stats.gram, np.float32).tobytes())
                    written.setdefault(path, {})[at] = known[id(stats.gram)]

    job.observe(ready.params, list(found), frozenset({"gram"}), take)
    together: dict[Any, list[str]] = {}
    for path, places in written.items():
        if _all_there(found[path].target, ready.program.leaves[path].shape, list(places)):
            together.setdefault(tuple(sorted(places.items())), []).append(path)
    return [(paths, partial(_read, scratch, [place for _, place in key])) for key, paths in together.items()]


def _all_there(target: Target, shape: tuple[int, ...], slices: list[Any]) -> bool:
    """Whether each slice of a leaf was observed, along the outermost of the axes that are solved apart."""
    axes = [axis for axis, _ in slices[0]]
    return axes == sorted(target.batch)[: len(axes)] and len(slices) == math.prod(shape[a] for a in axes)


def _read(scratch: _Scratch, places: list[tuple[int, tuple[int, ...]]]) -> np.ndarray:
    """Gram matrices that lie in a file, `[batch, n, n]`."""
    parts = []
    for start, shape in places:
        scratch.file.seek(start)
        parts.append(np.frombuffer(scratch.file.read(4 * math.prod(shape)), np.float32).reshape(-1, *shape[-2:]))
    return np.concatenate(parts)


def _unit(turns: Turns, leaves: list[_Turned], ready: Ready, gram: Callable[[], np.ndarray]) -> _Unit:
    numbers = list(dict.fromkeys(i for t in leaves for p in (t.outs, t.ins) if p for i, _ in p.parts))
    own = lambda p: renumbered(p, numbers)
    leaves = [t._replace(outs=own(t.outs), ins=own(t.ins)) for t in leaves]
    stacks = tuple(turns.groups[i][0] for i in numbers)
    values = [jnp.asarray(ready.program.leaves[t.target.path]) for t in leaves]
    key = (
        stacks,
        *((t.target._replace(path=""), hashable(t.outs), hashable(t.ins), v.shape, str(v.dtype))
          for t, v in zip(leaves, values, strict=True)),
    )  # fmt: skip
    places = jnp.asarray([turns.groups[i][1] for i in numbers], jnp.int32)
    return _Unit(key, stacks, places, leaves, values, gram)


def _unit_loss(leaves: list[_Turned], numbers: tuple[int, ...]) -> Callable[..., jax.Array]:
    def loss(stacks: Stacks, places: jax.Array, values: list[jax.Array], gram: jax.Array) -> jax.Array:
        dtype = stacks[0].dtype
        matrices = [stacks[g][i] for g, i in zip(numbers, places)]
        gram = gram.astype(dtype)
        size = error = jnp.zeros((), dtype)
        for t, w in zip(leaves, values, strict=True):
            w = w.astype(dtype)
            size += _weighted(as_problem(w, t.target.contracted, t.target.batch).rows, gram)
            error += _weighted(_error(t, w, matrices), gram)
        return error / jnp.where(size > 0, size, 1)

    return loss


def _error(t: _Turned, w: jax.Array, matrices: list[jax.Array]) -> jax.Array:
    """What rounding changes in the turned leaf, turned back to the inputs that it had: `[batch, m, n]`."""
    for places in (t.outs, t.ins):
        w = w if places is None else rotate_places(w, places, lambda i: matrices[i])
    axes = t.target.contracted, t.target.batch
    problem = as_problem(w, *axes)
    done = _solve(Rounding(jax.lax.stop_gradient(problem.rows)), None, t.target.format)
    e = scaled_error(problem.rows, done, t.target.format).astype(w.dtype)
    if t.ins is None:
        return e
    full = from_rows(bring_back(problem, e), axes[0], [w.shape[a] for a in axes[0]])
    return as_problem(rotate_places(full, t.ins, lambda i: matrices[i].T), *axes).rows


def _weighted(rows: jax.Array, gram: jax.Array) -> jax.Array:
    """tr(A H A^T), summed over the batch."""
    return jnp.sum(jnp.matmul(rows, gram) * rows)
