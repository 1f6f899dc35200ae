"""What rearrangements of a value do to its labels.

`(flow, equation, what is known of the operands, shapes of the outputs)` -> what is known of the outputs, or None where
it can't be said.
"""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jquant.fold import arrays
from jquant.fold.info import Info, Rule, plain

if TYPE_CHECKING:
    from jquant.fold.flow import Flow


def _same(flow: "Flow", eqn: Any, infos: list[Info], shapes: Any) -> list[Info] | None:
    new = eqn.params.get("new_dtype")
    if new is not None and not jnp.issubdtype(new, jnp.floating):
        return None if infos[0].labels.any() else [infos[0]]
    return list(infos[: len(shapes)])


def _reshape(flow: "Flow", eqn: Any, infos: list[Info], shapes: Any) -> list[Info] | None:
    if eqn.params.get("dimensions") is not None:
        return None
    info, a, b = infos[0], eqn.invars[0].aval.shape, shapes[0]
    return [info._replace(labels=arrays.reshape(info.labels, a, b), vary=arrays.reshape_flags(info.vary, a, b))]


def _transpose(flow: "Flow", eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    p, info = eqn.params["permutation"], infos[0]
    return [info._replace(labels=info.labels.transpose(p), vary=tuple(info.vary[i] for i in p))]


def _broadcast(flow: "Flow", eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    info, where, out = infos[0], eqn.params["broadcast_dimensions"], len(shapes[0])
    sizes, vary = [1] * out, [False] * out
    for source, target in enumerate(where):
        sizes[target], vary[target] = info.labels.shape[source], info.vary[source]
    return [info._replace(labels=info.labels.reshape(sizes), vary=tuple(vary))]


def _squeeze(flow: "Flow", eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    gone, info = eqn.params["dimensions"], infos[0]
    vary = tuple(v for d, v in enumerate(info.vary) if d not in gone)
    return [info._replace(labels=info.labels.squeeze(tuple(gone)), vary=vary)]


def _take(flow: "Flow", info: Info, index: list[slice]) -> Info:
    """A part of a value. That a part of the labels was taken is noted: they don't go on together with the rest."""
    at = tuple(s if n > 1 else slice(None) for s, n in zip(index, info.labels.shape, strict=True))
    part = info.labels[at]
    if part.shape != info.labels.shape:
        flow.labels.note(part, np.ones((1,) * part.ndim, np.int64), flow.here)
    return info._replace(labels=part)


def _slice(flow: "Flow", eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    p = eqn.params
    steps = p["strides"] or (1,) * len(p["start_indices"])
    index = [slice(*s) for s in zip(p["start_indices"], p["limit_indices"], steps, strict=True)]
    return [_take(flow, infos[0], index)]


def _split(flow: "Flow", eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    axis, start, out = eqn.params["axis"], 0, []
    for shape in shapes:
        index = [slice(None)] * len(shape)
        index[axis] = slice(start, start + shape[axis])
        before, flow.here = flow.here, flow.here + (start + 1 << 32)
        out.append(_take(flow, infos[0], index))
        flow.here, start = before, start + shape[axis]
    return out


def _unstack(flow: "Flow", eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    info, out = infos[0], []
    axis = eqn.params["axis"] % info.labels.ndim
    vary = (*info.vary[:axis], *info.vary[axis + 1 :])
    for i in range(len(shapes)):
        index = [slice(None)] * info.labels.ndim
        index[axis] = slice(i, i + 1)
        before, flow.here = flow.here, flow.here + (i + 1 << 32)
        part = _take(flow, info, index)
        out.append(part._replace(labels=part.labels.squeeze(axis), vary=vary))
        flow.here = before
    return out


def _dynamic_slice(flow: "Flow", eqn: Any, infos: list[Info], shapes: Any) -> list[Info] | None:
    cut = [a != b for a, b in zip(eqn.invars[0].aval.shape, shapes[0], strict=True)]
    if any(c and n > 1 for c, n in zip(cut, infos[0].labels.shape, strict=True)) or any(
        i.labels.any() for i in infos[1:]
    ):
        return None
    return [infos[0]]


def _concatenate(flow: "Flow", eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    axis, sizes = eqn.params["dimension"], [v.aval.shape for v in eqn.invars]
    full = list(np.broadcast_shapes(*([n if d != axis else 1 for d, n in enumerate(i.labels.shape)] for i in infos)))
    parts = [
        np.broadcast_to(i.labels, [*full[:axis], s[axis], *full[axis + 1 :]]) for i, s in zip(infos, sizes, strict=True)
    ]
    vary = [any(v) for v in zip(*(i.vary for i in infos), strict=True)]
    vary[axis] = True
    if not any(i.labels.any() for i in infos):
        return [plain(shapes[0])._replace(vary=tuple(vary))]
    return [Info(np.concatenate(parts, axis), tuple(vary), square=any(i.square for i in infos))]


def _stack(flow: "Flow", eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    axis = eqn.params["axis"] % len(shapes[0])
    vary = [any(v) for v in zip(*(i.vary for i in infos), strict=True)]
    vary.insert(axis, len(infos) > 1)
    if not any(i.labels.any() for i in infos):
        return [plain(shapes[0])._replace(vary=tuple(vary))]
    full = np.broadcast_shapes(*(i.labels.shape for i in infos))
    labels = np.stack([np.broadcast_to(i.labels, full) for i in infos], axis)
    return [Info(labels, tuple(vary), square=any(i.square for i in infos))]


def _tile(flow: "Flow", eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    """Copies: what a dimension's labels depend on comes again, in order."""
    info = infos[0]
    reps = [r if n > 1 else 1 for r, n in zip(eqn.params["reps"], info.labels.shape, strict=True)]
    return [info._replace(labels=np.tile(info.labels, reps))]


def _rev(flow: "Flow", eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    dims = tuple(d for d in eqn.params["dimensions"] if infos[0].labels.shape[d] > 1)
    return [infos[0]._replace(labels=np.flip(infos[0].labels, dims))]


def _gather(flow: "Flow", eqn: Any, infos: list[Info], shapes: Any) -> list[Info] | None:
    """A lookup in a value, along dimensions on which its labels don't depend."""
    info, numbers, sizes = infos[0], eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    moved = set(numbers.start_index_map) | set(numbers.collapsed_slice_dims)
    whole = all(s == n or d in moved for d, (s, n) in enumerate(zip(sizes, eqn.invars[0].aval.shape, strict=True)))
    if (
        not whole
        or numbers.operand_batching_dims
        or any(info.labels.shape[d] > 1 for d in moved)
        or infos[1].labels.any()
    ):
        return None
    kept = [d for d in range(len(sizes)) if d not in numbers.collapsed_slice_dims]
    shape, vary = [1] * len(shapes[0]), [n > 1 for n in shapes[0]]
    for source, target in zip(kept, numbers.offset_dims, strict=True):
        shape[target], vary[target] = info.labels.shape[source], info.vary[source]
    return [Info(info.labels.reshape(shape), tuple(vary), square=info.square)]


REARRANGE: dict[str, Rule] = {
    **dict.fromkeys(("convert_element_type", "copy", "copy_p", "stop_gradient", "sharding_constraint"), _same),
    **dict.fromkeys(("name", "reduce_precision", "optimization_barrier"), _same),
    "reshape": _reshape,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "slice": _slice,
    "split": _split,
    "unstack": _unstack,
    "dynamic_slice": _dynamic_slice,
    "concatenate": _concatenate,
    "stack": _stack,
    "tile": _tile,
    "rev": _rev,
    "gather": _gather,
}
