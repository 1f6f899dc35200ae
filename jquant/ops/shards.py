"""Functions that each device of a mesh runs on its own part of the arrays.

XLA knows nothing of a kernel: left alone, it gathers every operand on every device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def on_shards(
    run: Callable[..., Any],
    arrays: Sequence[jax.Array],
    ins: Sequence[str],
    outs: Sequence[str],
    *,
    sizes: dict[str, int],
    summed: str = "",
) -> Callable[..., Any]:
    """`run(*arrays) -> tuple`, on each device's part.

    An axis is named by a letter, the same one in every array that is cut together with it; "-" for an axis that is
    nobody else's, and is not cut. Where two arrays lie differently, the first one stays where it is.

    Args:
      run: the function.
      arrays: what it will be called with, or their shapes.
      ins, outs: the letters of the axes of each array, and of each result.
      sizes: the letters along which arrays may be cut, and in how many parts at most; every axis of that letter is a
        multiple of it.
      summed: those of `sizes` that no result has: the results of their parts are added.
    """
    wrapped = custom_partitioning(run)

    def partition(mesh: Any, args: Any, results: Any) -> Any:
        cut = _cuts(mesh, args, ins, sizes)
        place = lambda names: tuple(NamedSharding(mesh, PartitionSpec(*map(cut.get, name))) for name in names)
        added = tuple(axis for c in summed for axis in cut.get(c, ()))

        def local(*parts: jax.Array) -> Any:
            out = run(*parts)
            return jax.lax.psum(out, added) if added else out

        return mesh, local, place(outs), place(ins)

    rule, factors = _rule(arrays, ins, outs, sizes)
    wrapped.def_partition(partition=partition, sharding_rule=rule, **factors)
    return wrapped


def _cuts(mesh: Any, args: Sequence[Any], ins: Sequence[str], sizes: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """By letter, the axes of the mesh that it is cut along: each axis of the mesh cuts one letter, evenly."""
    cut: dict[str, tuple[str, ...]] = {}
    for arg, name in zip(args, ins, strict=True):
        for letter, axes in zip(name, (*arg.sharding.spec, *[None] * len(name))):
            axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
            taken = {axis for others in cut.values() for axis in others}
            parts = 1
            for axis in axes:
                parts *= mesh.shape[axis]
            if axes and letter in sizes and letter not in cut and not taken & {*axes} and sizes[letter] % parts == 0:
                cut[letter] = axes
    return cut


def _rule(
    arrays: Sequence[Any], ins: Sequence[str], outs: Sequence[str], sizes: dict[str, int]
) -> tuple[str, dict[str, int]]:
    """The axes as Shardy wants them told: an axis of several elements for each of another is a factor of two."""
    factors: dict[str, int] = {}
    count = iter(range(1000))

    def axis(letter: str, size: int | None) -> str:
        if letter == "-":
            return f"x{next(count)}"
        if size is None or letter not in sizes or size == sizes[letter]:
            return letter
        rest = f"x{next(count)}"
        factors[rest] = size // sizes[letter]
        factors[letter] = sizes[letter]
        return f"({letter} {rest})"

    of = lambda name, shape: " ".join(axis(c, s) for c, s in zip(name, shape, strict=True))
    left = ", ".join(of(name, a.shape) for name, a in zip(ins, arrays, strict=True))
    right = ", ".join(of(name, [None] * len(name)) for name in outs)
    whole = {c for name, a in zip(ins, arrays, strict=True) for c, s in zip(name, a.shape) if s == sizes.get(c)}
    return f"{left} -> {right}", {c: size for c, size in factors.items() if c not in whole}
