"""Groups of weights that contract the same channels, whose scale something in front of them can take up."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from jquant.core import memory
from jquant.core.formats import Format
from jquant.core.method import Folding
from jquant.core.per_use import held
from jquant.core.qtensor import to_rows
from jquant.core.stats import Stats
from jquant.core.text import some
from jquant.fold.flow import Flow
from jquant.fold.info import Fold
from jquant.fold.program import Program, apply_fold, prove, read_program, warn_refused
from jquant.fold.scales import find_scales, scaling
from jquant.solvers.awq import scale_losses
from jquant.trace.function import call_args
from jquant.trace.sites import Site, find_sites


class Matrix(NamedTuple):
    """One matrix `[m, n]` that reads a group: a weight, or one expert or layer of it.

    Attributes:
      site: the use.
      at: its number along the flattened batch axes of the site.
      channels: for each of its n inputs the position in the group's classes; -1 where it can't be scaled.
    """

    site: Site
    at: int
    channels: np.ndarray


class Group(NamedTuple):
    """Matrices whose inputs are scaled together.

    Attributes:
      classes: the channels' classes, int64 `[channels]`.
      matrices: those that will be quantized.
      producers: the leaves that take up the scale.
      norm: one of them is the gain of a norm, or another factor.
    """

    classes: np.ndarray
    matrices: tuple[Matrix, ...]
    producers: tuple[str, ...]
    norm: bool

    def __str__(self) -> str:
        paths = list(dict.fromkeys(m.site.path for m in self.matrices))
        return f"the scale of the inputs of {', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}"


class Found(NamedTuple):
    """What `find_groups` found.

    Attributes:
      groups: in the program's order.
      without: leaves to be quantized no channel of whose input can be scaled.
    """

    flow: Flow
    groups: list[Group]
    without: list[str]


def find_groups(program: Program, sites: dict[str, list[Site]], paths: Iterable[str]) -> Found:
    """The groups of the leaves at `paths`."""
    flow = find_scales(program.line, program.leaves)
    rows: list[tuple[Site, int, np.ndarray]] = []
    without = []
    for path in paths:
        mine = [r for r in _rows(flow, sites.get(path, [])) if r[2].any()]
        rows += mine
        if not mine and any(s.kind != "lookup" for s in sites.get(path, [])):
            without.append(path)
    made = {r: np.unique(flow.labels.find(a)) for r, a in flow.outs.items()}
    groups = []
    for part in _connected([r[2] for r in rows], len(flow.labels.root)):
        classes = np.unique(np.concatenate([rows[i][2] for i in part]))
        classes = classes[classes > 0]
        where = np.full(len(flow.labels.root), -1)
        where[classes] = np.arange(len(classes))
        producers = tuple(dict.fromkeys(r.path for r, m in made.items() if np.isin(m, classes).any()))
        matrices = tuple(Matrix(rows[i][0], rows[i][1], where[rows[i][2]]) for i in part)
        groups.append(Group(classes, matrices, producers, any(p in flow.gains for p in producers)))
    return Found(flow, groups, without)


def _rows(flow: Flow, sites: list[Site]) -> Iterator[tuple[Site, int, np.ndarray]]:
    """For each matrix of a leaf the classes of its inputs."""
    for role, array in flow.ins.items():
        site = next((s for s in sites if s.path == role.path and s.kind == role.kind), None)
        if site is None or site.contracted != flow.contracted[role]:
            continue
        shape = [site.shape[a] if a in (*site.contracted, *site.batch) else 1 for a in range(-len(site.shape), 0)]
        classes = np.broadcast_to(
            flow.labels.find(np.maximum(array, 0)), np.broadcast_shapes(array.shape, tuple(shape))
        )
        if list(classes.shape) != shape:
            continue
        for i, row in enumerate(_matrices(classes, site)[:, 0]):
            yield site, i, row


def _matrices(w: Any, site: Site) -> Any:
    """A leaf as `[batch, m, n]`."""
    rows = to_rows(w, site.contracted)
    kept_axes = [a for a in range(-w.ndim, 0) if a not in site.contracted]
    first = [kept_axes.index(a) for a in site.batch]
    order = [*first, *[i for i in range(len(kept_axes)) if i not in first], len(kept_axes)]
    count = int(np.prod([w.shape[a] for a in site.batch]))
    return rows.transpose(order).reshape(count, -1, rows.shape[-1])


def _connected(rows: list[np.ndarray], count: int) -> list[list[int]]:
    """Rows that share a class, directly or by others, in order."""
    if not rows:
        return []
    ends = [(np.full(int((r > 0).sum()), i), r[r > 0]) for i, r in enumerate(rows)]
    a, b = np.concatenate([e[0] for e in ends]), np.concatenate([e[1] for e in ends]) + len(rows)
    size = len(rows) + count
    _, part = connected_components(coo_matrix((np.ones(len(a)), (a, b)), shape=(size, size)), directed=False)
    groups: dict[int, list[int]] = {}
    for i in range(len(rows)):
        groups.setdefault(int(part[i]), []).append(i)
    return list(groups.values())


class Inputs(NamedTuple):
    """What a matrix is and meets: weight `[m, n]` float32, statistics of its inputs, format.

    `same` is equal for matrices that meet the same inputs.
    """

    weight: jax.Array
    stats: Stats
    format: Format
    same: Any


def _inputs(job: Folding, program: Program, m: Matrix, met: "_Met") -> Inputs:
    w = jnp.asarray(held(program.leaves[m.site.path]))
    weight = _matrices(w, m.site)[m.at].astype(jnp.float32)
    lead = met.stats.tokens.ndim
    one = jax.tree.map(lambda a: a.reshape(-1, *a.shape[lead:])[met.at], met.stats) if lead else met.stats
    return Inputs(weight, one, job.formats[m.site.path], (id(met.stats), met.at))


class _Met(NamedTuple):
    """Statistics of a unit, and the place of one matrix along their flattened leading axes."""

    stats: Stats
    at: int


def _met(m: Matrix, found: Mapping[str, Mapping[Any, Stats]]) -> _Met | None:
    """A matrix's own among the statistics of some units; None where they are not there."""
    sizes = [m.site.shape[a] for a in m.site.batch]
    where = dict(zip(m.site.batch, map(int, np.unravel_index(m.at, sizes)) if sizes else (), strict=True))
    for at, stats in found.get(m.site.path, {}).items():
        walked = {axis for axis, _ in at}
        if all(where.get(axis) == i for axis, i in at):
            left = [a for a in m.site.batch if a not in walked]
            inner = [m.site.shape[a] for a in left]
            return _Met(stats, int(np.ravel_multi_index([where[a] for a in left], inner)) if left else 0)
    return None


class _Choices:
    """Chooses for each group as soon as the statistics of all its matrices are there, and keeps none of them."""

    def __init__(self, groups: list[Group], choose: Callable[[Group, list[_Met]], None]):
        self.waiting: list[tuple[Group, dict[int, _Met]]] = [(g, {}) for g in groups]
        self.choose = choose

    def take(self, found: Mapping[str, Mapping[Any, Stats]]) -> None:
        left = []
        for group, met in self.waiting:
            for i, m in enumerate(group.matrices):
                if i not in met and (mine := _met(m, found)) is not None:
                    met[i] = mine
            if len(met) == len(group.matrices):
                self.choose(group, [met[i] for i in range(len(met))])
            else:
                left.append((group, met))
        self.waiting = left


def scaled(
    job: Folding, name: str, choose: Callable[[Group, list[Inputs]], np.ndarray | None], needs: frozenset[str],
    wanted: Callable[[Group], bool] = lambda g: True,
) -> Any:  # fmt: skip
    """The parameters with the inputs of every group divided by chosen scales, and its weights multiplied by them.

    One pass over the batches; in memory are the statistics of the groups that the walk has met in part.

    Args:
      choose: `(group, its matrices) -> s` `[channels]`, or None to leave it.
      needs: the statistics that `choose` needs.
      wanted: which groups to ask for.
    """
    program = read_program(job.apply, job.params, job.batches[0])
    args, kwargs = call_args(job.batches[0])
    sites = find_sites(job.apply, job.params, *args, **kwargs).by_path()
    found = find_groups(program, sites, job.formats)
    if found.without:
        job.miss(name, f"nothing in front of {some(found.without)} can take up a scale of its input; left as it is")
    chosen: list[tuple[Group, np.ndarray]] = []

    def ask(group: Group, met: list[_Met]) -> None:
        s = choose(group, [_inputs(job, program, m, one) for m, one in zip(group.matrices, met, strict=True)])
        if s is not None and not (s == 1).all():
            chosen.append((group, s))

    groups = [g for g in found.groups if wanted(g)]
    choices = _Choices(groups, ask)
    if paths := {m.site.path for g in groups for m in g.matrices}:
        job.observe(job.params, paths, needs, choices.take)
    memory.give_back()  # what the walk held lies about in the heap
    for group, _ in choices.waiting:
        job.miss(name, f"{group} is left as it is: not all of them could be observed")

    def make(items: list[tuple[Group, np.ndarray]]) -> tuple[Fold]:
        scale = np.ones(len(found.flow.labels.root))
        for group, s in items:
            scale[group.classes] = 1 / s
        return (scaling(found.flow, scale),)

    good, bad, made = prove(program, make, chosen)
    warn_refused(name, bad, lambda item: str(item[0]))
    program.leaves.clear()
    return apply_fold(make(good), job.box.pop(), made) if good else job.box.pop()


def per_channel(group: Group, values: list[np.ndarray], how: Any, start: float) -> np.ndarray:
    """A number for each of the group's channels from those `[n]` of its matrices' inputs, joined by a ufunc `how`."""
    out = np.full(len(group.classes), start)
    for m, v in zip(group.matrices, values, strict=True):
        live = m.channels >= 0
        how.at(out, m.channels[live], np.asarray(v, np.float64)[live])
    return out


def for_inputs(m: Matrix, s: np.ndarray) -> np.ndarray:
    """The group's scales `[..., channels]` for the n inputs of a matrix; 1 where it can't be scaled."""
    return np.where(m.channels >= 0, s[..., np.maximum(m.channels, 0)], 1.0)


def weight_losses(group: Group, matrices: list[Inputs], tried: np.ndarray) -> np.ndarray:
    """tr(E H E^T), summed over the matrices of a group, under each of the candidates `tried` `[k, channels]`: `[k]`."""
    total = np.zeros(len(tried))
    together: dict[Any, list[int]] = {}
    for i, (m, own) in enumerate(zip(group.matrices, matrices, strict=True)):
        shared = m.channels.tobytes() if own.format.rows_apart else i
        together.setdefault((own.same, own.format, shared), []).append(i)
    for numbers in together.values():
        first = matrices[numbers[0]]
        w = jnp.concatenate([matrices[i].weight for i in numbers])
        scales = jnp.asarray(for_inputs(group.matrices[numbers[0]], tried), jnp.float32)
        total += np.asarray(scale_losses(w, first.stats.gram, scales, first.format), np.float64)
    return total
