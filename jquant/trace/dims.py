"""Which dimensions of an operation's result are which dimensions of its operands."""

from collections.abc import Callable, Sequence
from typing import Any

Shape = tuple[int, ...]
# For each dimension of the result, the dimensions of one operand that it was made of; () where it is new.
Sources = tuple[tuple[int, ...], ...]


def sources(eqn: Any, shapes: Sequence[Shape], out: Shape) -> list[Sources | None]:
    """For each operand, of these shapes, what became of its dimensions; None where that can't be said.

    An operation that is not known is taken to act along dimensions that it leaves where they are.
    """
    rule = _RULES.get(eqn.primitive.name)
    if rule is not None:
        return [*rule(eqn, shapes, out), *[None] * len(shapes)][: len(shapes)]
    axes = eqn.params.get("axes")
    if axes is not None and shapes and len(shapes[0]) - len(axes) == len(out):  # reductions
        kept = tuple((d,) for d in range(len(shapes[0])) if d not in axes)
        return [kept if s == shapes[0] else None for s in shapes]
    return [_stretched(s, out) for s in shapes]


def _stretched(shape: Shape, out: Shape) -> Sources | None:
    """Of an operand whose dimensions of size 1 meet larger ones of others."""
    if len(shape) != len(out) or any(n not in (1, m) for n, m in zip(shape, out, strict=True)):
        return None
    return tuple((d,) if n == m else () for d, (n, m) in enumerate(zip(shape, out, strict=True)))


def same(shape: Shape) -> Sources:
    """Every dimension is the one it was."""
    return tuple((d,) for d in range(len(shape)))


def blocks(a: Shape, b: Shape) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The finest parts into which a reshape from `a` to `b` falls: dimensions of both of the same product.

    Dimensions of size 1 belong to none.
    """
    out = []
    left, right = ([d for d, n in enumerate(s) if n != 1] for s in (a, b))
    while left and right:
        ds, es = [left.pop(0)], [right.pop(0)]
        size, other = a[ds[0]], b[es[0]]
        while size != other:
            if size < other:
                ds.append(left.pop(0))
                size *= a[ds[-1]]
            else:
                es.append(right.pop(0))
                other *= b[es[-1]]
        out.append((tuple(ds), tuple(es)))
    return out


def _reshape(eqn: Any, shapes: Sequence[Shape], out: Shape) -> list[Sources | None]:
    if eqn.params.get("dimensions") or 0 in out:
        return [None]
    where = {e: ds for ds, es in blocks(shapes[0], out) for e in es}
    return [tuple(where.get(d, ()) for d in range(len(out)))]


def _transpose(eqn: Any, shapes: Sequence[Shape], out: Shape) -> list[Sources | None]:
    return [tuple((int(p),) for p in eqn.params["permutation"])]


def _broadcast(eqn: Any, shapes: Sequence[Shape], out: Shape) -> list[Sources | None]:
    where = {int(t): (s,) for s, t in enumerate(eqn.params["broadcast_dimensions"]) if shapes[0][s] == out[t]}
    return [tuple(where.get(d, ()) for d in range(len(out)))]


def _squeeze(eqn: Any, shapes: Sequence[Shape], out: Shape) -> list[Sources | None]:
    gone = {d % len(shapes[0]) for d in eqn.params["dimensions"]}
    return [tuple((d,) for d in range(len(shapes[0])) if d not in gone)]


def _stack(eqn: Any, shapes: Sequence[Shape], out: Shape) -> list[Sources | None]:
    axis = eqn.params["axis"] % len(out)
    return [tuple((d - (d > axis),) if d != axis else () for d in range(len(out))) for _ in shapes]


def _unstack(eqn: Any, shapes: Sequence[Shape], out: Shape) -> list[Sources | None]:
    axis = eqn.params["axis"] % len(shapes[0])
    return [tuple((d,) for d in range(len(shapes[0])) if d != axis)]


def _first(eqn: Any, shapes: Sequence[Shape], out: Shape) -> list[Sources | None]:
    return [same(out)]


def _all(eqn: Any, shapes: Sequence[Shape], out: Shape) -> list[Sources | None]:
    return [same(out) for _ in shapes]


def _gather(eqn: Any, shapes: Sequence[Shape], out: Shape) -> list[Sources | None]:
    """Dimensions that numbers are looked up along are made of those that they index."""
    n = eqn.params["dimension_numbers"]
    gone = (*n.collapsed_slice_dims, *n.operand_batching_dims)
    kept = iter(d for d in range(len(shapes[0])) if d not in gone)
    return [tuple((next(kept),) if d in n.offset_dims else tuple(n.collapsed_slice_dims) for d in range(len(out)))]


def _dot(eqn: Any, shapes: Sequence[Shape], out: Shape) -> list[Sources | None]:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left = [d for d in range(len(shapes[0])) if d not in (*lc, *lb)]
    right = [d for d in range(len(shapes[1])) if d not in (*rc, *rb)]
    none: list[tuple[int, ...]] = [()]
    one = lambda dims: [(int(d),) for d in dims]
    return [(*one(lb), *one(left), *none * len(right)), (*one(rb), *none * len(left), *one(right))]


_Rule = Callable[[Any, Sequence[Shape], Shape], list[Sources | None]]
_RULES: dict[str, _Rule] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "gather": _gather,
    "dot_general": _dot,
    **dict.fromkeys(("slice", "dynamic_slice", "pad", "split", "tile"), _first),
    "stack": _stack,
    "unstack": _unstack,
    "concatenate": _all,
    "dynamic_update_slice": lambda eqn, shapes, out: [same(out)] * 2,
}
