"""`find_folds`: which exact rewrites the jaxpr of a function allows."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jquant.core.text import columns, some
from jquant.fold.groups import find_groups
from jquant.fold.program import read_program
from jquant.fold.rotate import find_gains
from jquant.fold.rotations import find_rotations
from jquant.trace.sites import find_sites


class FoldFound(NamedTuple):
    """One freedom of a function's parameters.

    Attributes:
      kind: "scale": the channels may be scaled one by one, by positive numbers; "rotation": any orthogonal matrix may
        act on them; "none": nothing was found for the input of these leaves.
      channels: how many.
      producers: the leaves whose outputs change.
      readers: the leaves whose inputs change.
      note: what else there is to say.
    """

    kind: str
    channels: int
    producers: tuple[str, ...]
    readers: tuple[str, ...]
    note: str = ""


class Folds(Sequence[FoldFound]):
    """The freedoms of a function's parameters. Prints as a table."""

    def __init__(self, folds: Sequence[FoldFound]):
        self._folds = tuple(folds)

    def __len__(self) -> int:
        return len(self._folds)

    def __getitem__(self, i: Any) -> Any:
        return Folds(self._folds[i]) if isinstance(i, slice) else self._folds[i]

    def __iter__(self) -> Iterator[FoldFound]:
        return iter(self._folds)

    def of(self, kind: str) -> list[FoldFound]:
        """Those of one kind."""
        return [f for f in self if f.kind == kind]

    def __repr__(self) -> str:
        rows = [("kind", "channels", "producers", "readers", "note")]
        rows += [(f.kind, str(f.channels or ""), some(f.producers), some(f.readers), f.note) for f in self]
        return columns(rows)


def find_folds(apply: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Folds:
    """What `awq`, `smoothquant` and `rotate` can use: found by data flow in the jaxpr, nothing is computed.

    Rotations are those that there are once the gains of norms have been moved into their readers, as `rotate` does.
    A method proves what it uses before it uses it, so this may list more than is applied (a gain that is zero).

    Args:
      apply, params, *args, **kwargs: as for `find_sites`; arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      Folds: scales, rotations, and under "none" the leaves whose input nothing can scale.
    """
    batch = (*args,) if not kwargs else None
    program = (
        read_program(apply, params, batch)
        if batch is not None
        else read_program(_keywords(apply, args), params, kwargs)
    )
    sites = find_sites(apply, params, *args, **kwargs).by_path()
    paths = [p for p, s in sites.items() if any(x.quantizable and x.kind != "lookup" for x in s)]
    found = find_groups(program, sites, paths)
    out = [
        FoldFound("scale", len(g.classes), g.producers, tuple(dict.fromkeys(m.site.path for m in g.matrices)))
        for g in found.groups
    ]
    gains, _ = find_gains(program, found.flow)
    ones = {}
    for g in gains:
        a, b = found.flow.affine.get(g.role.path, (1.0, 0.0))
        ones[g.role.path] = np.full(program.line.params[g.role.path].shape, (1 - b) / a)
    for block in find_rotations(program.line, {**program.leaves, **ones}).blocks:
        note = "residual stream" if block.norm else ""
        note += " (keeping the vector of ones)" if block.ones else ""
        out.append(FoldFound("rotation", len(block.labels), block.producers, block.readers, note.strip()))
    out += [FoldFound("none", 0, (), (path,), "nothing in front can take up a scale") for path in found.without]
    return Folds(out)


def _keywords(apply: Callable[..., Any], args: Sequence[Any]) -> Callable[..., Any]:
    return lambda params, **kwargs: apply(params, *args, **kwargs)
