"""Positive scales of channels that a program does not notice, and how they change its parameters.

A label is a channel; a scale may be chosen for each class of labels that is not 0. The entries that produce the class
are multiplied by it, the entries that contract it are divided by it, and every output is as before.
"""

from typing import Any

import numpy as np

from jquant.fold.flow import Flow
from jquant.fold.info import Fold, Info, Rule, aligned, together, varies
from jquant.trace.line import Line

Shapes = tuple[tuple[int, ...], ...]


def find_scales(line: Line, leaves: dict[str, Any]) -> Flow:
    """The labels of a program under positive scales."""
    return Flow(line, leaves, RULES)


def _linear(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info] | None:
    """a + b, a - b, max(a, b), and the alternatives of a selection: all change alike."""
    infos = aligned(infos, len(shapes[0]))
    labelled = [i for i in infos if not i.zero]
    if len(labelled) == 2 and (moved := _moved(eqn.primitive.name, infos)) is not None:
        return [moved]
    const = _folded_const(eqn.primitive.name, infos)
    for a, b in zip(labelled, labelled[1:], strict=False):
        flow.labels.union(a.labels, b.labels)  # a label that meets none meets 0
    found = flow.labels.find(together(labelled)) if labelled else together(infos)
    return [Info(found, varies(infos), const)]


def _moved(name: str, infos: list[Info]) -> Info | None:
    """A parameter plus or minus a number."""
    x, y = infos
    if x.param and y.const is not None and name in ("add", "sub", "add_any"):
        path, a, b = x.param
        return x._replace(param=(path, a, b + (y.const if name != "sub" else -y.const)))
    if y.param and x.const is not None and name in ("add", "sub", "add_any"):
        path, a, b = y.param
        sign = -1.0 if name == "sub" else 1.0
        return y._replace(param=(path, sign * a, x.const + sign * b))
    return None


def _folded_const(name: str, infos: list[Info]) -> float | None:
    if any(i.const is None for i in infos) or name not in _NUMBERS:
        return None
    return float(_NUMBERS[name](*[i.const for i in infos]))


_NUMBERS: dict[str, Any] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "max": max, "min": min,
    "div": lambda a, b: a / b if b else np.nan,
}  # fmt: skip


def _times(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info] | None:
    """a * b: one of them may change."""
    x, y = infos = aligned(infos, len(shapes[0]))
    flow.gains.update(_gains(x, y))
    for p, q in ((x, y), (y, x)):
        if p.param and q.const:
            path, a, b = p.param
            return [p._replace(param=(path, a * q.const, b * q.const))]
    const = _folded_const("mul", infos)
    if x.labels.any() and y.labels.any():
        loses = x if y.param or not x.param else y
        flow.kill(loses)
        kept = y if loses is x else x
        return [Info(flow.labels.find(kept.labels), varies(infos))]
    return [Info(together(infos), varies(infos), const)]


def _gains(x: Info, y: Info) -> set[str]:
    """The leaf that multiplies something else than a number."""
    return {p.param[0] for p, q in ((x, y), (y, x)) if p.param and q.const is None}


def _divided(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info] | None:
    x, y = infos = aligned(infos, len(shapes[0]))
    if x.param and y.const:
        path, a, b = x.param
        return [x._replace(param=(path, a / y.const, b / y.const))]
    flow.kill(y)
    return [Info(flow.labels.find(x.labels), varies(infos), _folded_const("div", infos))]


def _negated(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info]:
    [x] = infos
    param = (x.param[0], -x.param[1], -x.param[2]) if x.param else None
    return [x._replace(param=param, const=None if x.const is None else -x.const)]


def _homogeneous(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info]:
    return [infos[0]._replace(param=None, const=None)]


def _compared(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info] | None:
    """A comparison with zero does not notice a positive scale."""
    infos = aligned(infos, len(shapes[0]))
    if not any(i.zero for i in infos):
        return None
    return [Info(np.zeros((1,) * len(shapes[0]), np.int64), varies(infos))]


def _selected(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info] | None:
    which, *cases = aligned(infos, len(shapes[0]))
    if which.labels.any():
        return None
    [found] = _linear(flow, eqn, cases, shapes) or []
    return [found._replace(vary=varies([which, *cases]), const=None)]


def _padded(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info] | None:
    x, value = infos
    if not value.zero:
        return None
    labels = x.labels
    moved = [d for d, p in enumerate(eqn.params["padding_config"]) if tuple(p) != (0, 0, 0) and labels.shape[d] > 1]
    return None if moved else [x._replace(const=None, param=None)]


def _summed(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info]:
    """What is added up must change alike."""
    axes, x = eqn.params["axes"], infos[0]
    labels = flow.unify(x.labels, axes).squeeze(tuple(axes))
    return [Info(labels, tuple(v for d, v in enumerate(x.vary) if d not in axes))]


def _product(flow: Flow, eqn: Any, infos: list[Info], shapes: Shapes) -> list[Info] | None:
    """A product of two activations, of which one may change."""
    if infos[0].labels.any() and infos[1].labels.any():
        return None
    which = 0 if infos[0].labels.any() else 1
    return [contracted_product(flow, eqn, infos[which].labels, which, shapes[0])]


def contracted_product(flow: Flow, eqn: Any, labels: np.ndarray, which: int, shape: tuple[int, ...]) -> Info:
    """The labels of a dot_general's result from those of its operand `which`."""
    contract, batch = eqn.params["dimension_numbers"]
    c, b = contract[which], batch[which]
    labels = flow.unify(labels, c)
    free = [d for d in range(labels.ndim) if d not in c and d not in b]
    sizes = [labels.shape[d] for d in b]
    mine, others = [labels.shape[d] for d in free], [1] * (len(shape) - len(b) - len(free))
    sizes += [*mine, *others] if which == 0 else [*others, *mine]
    order = [*b, *free, *c]
    return Info(labels.transpose(order).reshape(sizes), tuple(s > 1 for s in shape))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "add_any", "max", "min"), _linear),
    "mul": _times,
    "div": _divided,
    "neg": _negated,
    "abs": _homogeneous,
    "select_n": _selected,
    **dict.fromkeys(("gt", "ge", "lt", "le"), _compared),
    "reduce_sum": _summed,
    "reduce_max": _summed,
    "reduce_min": _summed,
    "pad": _padded,
    "dot_general": _product,
    "itself": lambda flow, eqn, infos, shapes: None,
}


# --- applying ---


def scaling(flow: Flow, scale: np.ndarray) -> Fold:
    """The fold that multiplies the channels of each class by `scale` `[labels]`, 1 for label 0."""

    def change(a: np.ndarray, outs: np.ndarray | None, ins: np.ndarray | None) -> np.ndarray:
        if outs is not None and ((by := scale[outs]) != 1).any():
            a = a * by
        if ins is not None and ((by := scale[ins]) != 1).any():
            a = a / by
        return a

    return Fold(flow, True, change)
