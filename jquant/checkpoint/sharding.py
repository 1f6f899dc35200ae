"""Shardings of the arrays inside a QTensor, from the sharding of the array that it stands for."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jquant.core.errors import CheckpointError
from jquant.core.qtensor import QTensor
from jquant.core.side import Side


def _mesh_axes(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def _entry(axes: tuple[str, ...]) -> Any:
    return axes if len(axes) > 1 else (axes[0] if axes else None)


def _dividing(axes: tuple[str, ...], sizes: list[int], mesh: Any) -> tuple[str, ...]:
    """The longest prefix of mesh axes whose devices divide every one of `sizes`; axes of one element are not cut."""
    for end in range(len(axes), 0, -1):
        devices = math.prod(mesh.shape[a] for a in axes[:end])
        if all(s % devices == 0 and s > 0 for s in sizes):
            return axes[:end]
    return ()


def qtensor_sharding(q: QTensor, sharding: Sharding) -> QTensor:
    """A QTensor of shardings for the arrays of `q`, to be given to `jax.device_put` or `jax.jit`.

    Kept axes keep their spec. The specs of the contracted axes go, joined in order, to the packed axis of the codes and
    to the blocks axis of the scales, where the number of devices divides it (in the codes: every plane), and that axis
    is replicated otherwise; the rows of a side go with the codes. A scale shared along a kept axis is replicated along
    it, and the scales of tiles where devices don't divide the tiles.

    Args:
      q: a QTensor of arrays or of `jax.ShapeDtypeStruct`.
      sharding: where the logical array would go: a NamedSharding, or any sharding without cuts (one device,
        replicated).

    Raises:
      CheckpointError: a sharding that can't be mapped.
    """
    if not isinstance(sharding, NamedSharding):
        if len(sharding.device_set) > 1 and not sharding.is_fully_replicated:
            raise CheckpointError(
                f"{type(sharding).__name__} can't be mapped to the arrays of {q}; give a NamedSharding"
            )
        return jax.tree.map(lambda _: sharding, q)
    mesh, spec = sharding.mesh, sharding.spec
    if len(spec) > q.ndim:
        raise CheckpointError(f"the spec {spec} has more axes than {q}")
    axes = dict(zip(range(-q.ndim, 0), [_mesh_axes(e) for e in (*spec, *[None] * (q.ndim - len(spec)))], strict=True))
    kept = [axes[a] for a in q.kept]
    last = tuple(name for a in q.contracted for name in axes[a])
    planes = [c.shape[-1] for c in q.codes]

    def lead_spec(spec: tuple[str, ...], size: int, whole: int) -> tuple[str, ...]:
        if size == whole:
            return spec
        return () if size == 1 else _dividing(spec, [size], mesh)

    def place(array: Any, is_code: bool) -> NamedSharding:
        return placed(array, (_dividing(last, planes if is_code else [array.shape[-1]], mesh),))

    def placed(array: Any, tail: tuple[tuple[str, ...], ...]) -> NamedSharding:
        lead = [lead_spec(e, s, k) for e, s, k in zip(kept, array.shape, q.codes[0].shape[:-1])]
        parts = PartitionSpec(*[_entry(e) for e in (*lead, *tail)])
        return NamedSharding(mesh, parts, memory_kind=sharding.memory_kind)

    wide = lambda array: placed(array, ((), _dividing(last, [*planes, q.row_length], mesh)))
    return q.replace(
        codes=tuple(place(c, True) for c in q.codes),
        scale=place(q.scale, False),
        zero_point=None if q.zero_point is None else place(q.zero_point, False),
        outer=tuple(place(a, False) for a in q.outer),
        activation_params=jax.tree.map(lambda a: place(a, False), q.activation_params),
        side=q.side and Side(placed(q.side.left, ((),)), *jax.tree.map(wide, tuple(q.side[1:]))),
    )
