"""How a leaf, or a slice of a stacked one, is turned and rounded on the way to its use, with a derivative."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.core import kept
from jquant.core.per_use import held, holding, is_per_use
from jquant.fold import arrays
from jquant.fold.info import Role
from jquant.fold.program import edited, roles_of
from jquant.fold.rotate import Ready, rotation
from jquant.fold.rotations import Block, Places, classes_of, find_places, rotate_places
from jquant.trace.fake_quant import trained
from jquant.trace.program import Unit, unit_axes
from jquant.trace.targets import Target

Make = Callable[[Any, list[jax.Array]], Any]


class Turning(NamedTuple):
    """What is done to a unit.

    Attributes:
      key: equal where `make` is the same function.
      blocks: the numbers of the blocks by whose matrices it is turned; none where it is not.
      cuts: those that take what `make` is given from the leaf.
      rest: those that take the unit from what it gives.
      plain: `value -> the leaf`: of a PerUse only the array is given, its maps are numbers.
      make: `(value, matrices) -> the leaf, turned and rounded`.
    """

    key: Any
    blocks: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]
    rest: tuple[tuple[int, ...], ...]
    plain: Callable[[Any], Any]
    make: Make


def find_turning(ready: Ready, blocks: list[Block], targets: dict[str, Target], unit: Unit) -> Turning:
    """What is done to a unit. Units of equal layers have equal keys."""
    leaf, target = ready.program.leaves[unit.path], targets.get(unit.path)
    cuts, rest = unit.cuts, unit.cuts[:0]
    if target is not None and not {axis for axis, _ in unit.at} <= set(target.batch):
        cuts, rest = (), unit.cuts  # its scales are those of the whole leaf
    if target is not None:
        at = () if rest else unit.at
        axes = unit_axes(target.contracted, at), unit_axes(target.batch, at)
        target = target._replace(path="", contracted=axes[0], batch=axes[1])
    roles = roles_of(ready.flow, unit.path) if jnp.issubdtype(held(leaf).dtype, jnp.floating) else []
    if is_per_use(leaf) or len(roles) > 1:
        key, numbers, turn = _apart(ready, blocks, unit.path, cuts)
    elif roles:
        key, numbers, turn = _along(ready, blocks, roles[0], leaf, cuts)
    else:
        key, numbers, turn = ("still",), (), _still
    maps = holding(leaf, None)
    plain = lambda value: holding(maps, value)

    def make(value: Any, matrices: list[jax.Array]) -> Any:
        value = turn(plain(value), matrices)
        if target is None:
            return value
        return holding(value, trained(jnp.asarray(held(value)), target, None, clip=True, scales=True))

    return Turning((*key, target, rest), numbers, cuts, rest, plain, make)


Turn = tuple[Any, tuple[int, ...], Make]  # a key, the blocks, and what turns


def _still(value: Any, matrices: list[jax.Array]) -> Any:
    return value


def find_sides(ready: Ready, blocks: list[Block], role: Role, leaf: Any, cuts: Any = ()) -> list[Places | None]:
    """Where blocks are in a leaf, cut: among what it produces and what it contracts."""
    shape = jax.eval_shape(lambda a: kept.apply_cuts(a, cuts), leaf).shape
    sides: list[Places | None] = []
    for side in ("outs", "ins"):
        classes = classes_of(ready.flow, role, side)
        found = None if classes is None else find_places(tuple(shape), arrays.cut(classes, cuts), blocks)
        sides.append(found if found is not None and found.parts else None)
    return sides


def renumbered(p: Places | None, numbers: Sequence[int]) -> Places | None:
    """Places that count blocks by where their numbers are in a list."""
    return None if p is None else p._replace(parts=[(numbers.index(i), at) for i, at in p.parts])


def hashable(p: Places | None) -> Any:
    """Equal for equal places."""
    return None if p is None else (p.order, p.axes, tuple((i, at.shape, at.tobytes()) for i, at in p.parts))


def _along(ready: Ready, blocks: list[Block], role: Role, leaf: Any, cuts: Any) -> Turn:
    """A leaf that is read in one way."""
    sides = find_sides(ready, blocks, role, leaf, cuts)
    numbers = tuple(dict.fromkeys(i for p in sides if p for i, _ in p.parts))
    sides = [renumbered(p, numbers) for p in sides]
    a, b = ready.flow.affine.get(role.path, (1.0, 0.0)) if role.kind == "read" else (1.0, 0.0)

    def turn(value: Any, matrices: list[jax.Array]) -> Any:
        if not numbers:
            return value
        wide = jnp.asarray(value).astype(matrices[0].dtype)
        done = wide if (a, b) == (1, 0) else wide * a + b
        for p in sides:
            done = done if p is None else rotate_places(done, p, matrices.__getitem__)
        return (done if (a, b) == (1, 0) else (done - b) / a).astype(value.dtype)

    return ("along", a, b, *map(hashable, sides)), numbers, turn


def _apart(ready: Ready, blocks: list[Block], path: str, cuts: Any) -> Turn:
    """A leaf that is read in several ways."""
    numbers = tuple(i for i, b in enumerate(blocks) if path in (*b.producers, *b.readers))
    mine = [blocks[i] for i in numbers]

    def turn(value: Any, matrices: list[jax.Array]) -> Any:
        if not numbers:
            return value
        fold = rotation(ready.flow, mine, lambda block: matrices[mine.index(block)])
        return edited((fold,), path, value, matrices[0].dtype, cuts)

    return ("apart", path, cuts), numbers, turn
