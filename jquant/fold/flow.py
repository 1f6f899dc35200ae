"""`Flow`: carries labels through a program (`trace.program.Line`), from the parameters that produce channels to those
that contract them.

What an operation means for labels is a table of rules, by primitive; `scales` and `rotations` each have one. This file
holds what both share: rearrangements, and products with parameters. Whatever has no rule kills the labels that it reads.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jquant.core.qtensor import is_qtensor
from jquant.fold import arrays
from jquant.fold.labels import Labels
from jquant.trace.program import Line, Sym
from jquant.trace.sites import full_axes
from jquant.trace.uses import Use, find_use
from jquant.trace.view import Ref


class Info(NamedTuple):
    """What is known of a value.

    Attributes:
      labels: int64, of the value's rank; each dimension in full, or of length 1 where the labels don't depend on it.
      vary: for each dimension whether the value may vary along it.
      const: its value, where all entries are one number that is known.
      param: `(path, a, b)` where it is a w + b of the leaf at `path`, rearranged, and nothing else.
      square: it is the entrywise square of what has these labels.
    """

    labels: np.ndarray
    vary: tuple[bool, ...]
    const: float | None = None
    param: tuple[str, float, float] | None = None
    square: bool = False

    @property
    def zero(self) -> bool:
        return self.const == 0


class Role(NamedTuple):
    """How a leaf is read. A table that is looked up and also multiplied has two."""

    path: str
    kind: str  # "dot", "ragged_dot", "lookup" or "read"


class Fold(NamedTuple):
    """A change of parameters.

    Attributes:
      flow: the labels of the parameters' channels.
      diagonal: it scales channels, and mixes none.
      change: `(array, classes that its entries produce, classes that they contract) -> array`, float64; classes have the
        array's rank, and are None where there are none.
    """

    flow: "Flow"
    diagonal: bool
    change: Callable[[np.ndarray, np.ndarray | None, np.ndarray | None], np.ndarray]


Rule = Callable[["Flow", Any, list[Info], tuple[tuple[int, ...], ...]], list[Info] | None]
_LARGEST_READ = 2**22


def plain(shape: tuple[int, ...]) -> Info:
    """A value of which nothing is known."""
    return Info(np.zeros((1,) * len(shape), np.int64), tuple(s > 1 for s in shape))


class Flow:
    """The labels of one program.

    Args:
      line: the program, all calls inlined.
      leaves: its parameters by path; those that are quantized don't change.
      rules: what each primitive does to labels.

    Attributes:
      outs: for each role the labels that the leaf's entries produce, of the full leaf's rank, 1 along contracted axes.
      ins: the labels that they contract, 1 along the axes that the leaf keeps; -1 where nothing reads them.
      contracted: the full leaf's axes that make no channels: the contracted ones, the one that is looked up.
      affine: for each leaf that is not multiplied as a weight the `(a, b)` of the value a w + b that the program uses.
      gains: leaves that some value is multiplied with, entry by entry.
    """

    def __init__(self, line: Line, leaves: dict[str, Any], rules: dict[str, Rule]):
        self.line, self.leaves, self.rules = line, leaves, rules
        self.labels = Labels()
        self.values: dict[Sym, Info] = {}
        self.outs: dict[Role, np.ndarray] = {}
        self.ins: dict[Role, np.ndarray] = {}
        self.contracted: dict[Role, tuple[int, ...]] = {}
        self.affine: dict[str, tuple[float, float]] = {}
        self.gains: set[str] = set()
        self.fixed = {p for p, v in leaves.items() if is_qtensor(v)}
        self.here = 0
        for here, instr in enumerate(line.instrs, 1):
            self.here = here
            self.values.update(zip(instr.outs, self._step(instr), strict=True))
        for out in line.outputs:
            self.kill(self.info(out))
        self._kill_fixed()

    # --- what rules use ---

    def info(self, a: Any) -> Info:
        """What is known of an operand, its labels those of their classes."""
        if isinstance(a, Ref):
            return self._read(a)
        if not isinstance(a, Sym):
            value = np.asarray(a)
            return plain(value.shape)._replace(const=float(value) if value.size == 1 and value.dtype != bool else None)
        known = self.values.get(a)
        return plain(a.shape) if known is None else known._replace(labels=self.labels.find(known.labels))

    def kill(self, *infos: Info) -> None:
        for info in infos:
            self.labels.kill(info.labels)

    def unify(self, labels: np.ndarray, dims: Any) -> np.ndarray:
        """Makes labels equal along some dimensions; they are then of length 1 there."""
        for d in dims:
            if labels.shape[d] > 1:
                first = np.take(labels, [0], axis=d)
                self.labels.union(labels, first)
                labels = self.labels.find(first)
        return labels

    def place(self, labels: np.ndarray, dims: Any) -> np.ndarray:
        """A key for `Labels.note`: the index along those of `dims` along which labels have entries of their own."""
        shape = [n if d in dims else 1 for d, n in enumerate(labels.shape)]
        return np.arange(1, math.prod(shape) + 1).reshape(shape)

    # --- instructions ---

    def _step(self, instr: Any) -> list[Info]:
        shapes = tuple(o.shape for o in instr.outs)
        if instr.eqn is None:
            return _OWN[instr.key[0]](self, instr, shapes)
        if any(isinstance(a, Ref) for a in instr.args):
            use = find_use(instr.eqn, list(instr.args))
            if use is not None:
                return [self._use(use, shapes[0])]
        infos = [self.info(a) for a in instr.args]
        name = instr.eqn.primitive.name
        rule = self.rules.get(name) or REARRANGE.get(name)
        if len(instr.args) == 2 and instr.args[0] is instr.args[1] and name in ("mul", "dot_general"):
            rule = self.rules["itself"]
        found = None if rule is None else rule(self, instr.eqn, infos, shapes)
        if found is None:
            self.kill(*infos)
            found = [plain(s) for s in shapes]
        for info in infos:
            if info.param is not None and not any(f.param for f in found):
                self._land(info)
        return found

    def _land(self, info: Info) -> None:
        assert info.param is not None
        path, *line = info.param
        if self.affine.setdefault(path, tuple(line)) != tuple(line):
            self.fixed.add(path)

    def _kill_fixed(self) -> None:
        roles: dict[str, set[str]] = {}
        for role in self.outs:
            roles.setdefault(role.path, set()).add(role.kind)
        for role, labels in self.outs.items():
            if role.path in self.fixed or (len(roles[role.path]) > 1 and roles[role.path] != {"dot", "lookup"}):
                self.labels.kill(labels)
                if role in self.ins:
                    self.labels.kill(np.maximum(self.ins[role], 0))

    # --- parameters ---

    def _whole_shape(self, path: str) -> tuple[int, ...]:
        return self.line.params[path].shape

    def _outs(self, role: Role, contracted: tuple[int, ...]) -> np.ndarray:
        """The labels that a leaf's entries produce, made where the role is new."""
        if role not in self.outs:
            shape = self._whole_shape(role.path)
            sizes = [1 if a in contracted else shape[a] for a in range(-len(shape), 0)]
            large = math.prod(sizes) > _LARGEST_READ
            if large:
                self.fixed.add(role.path)
            self.outs[role] = np.zeros((1,) * len(shape), np.int64) if large else self.labels.new(tuple(sizes))
            self.contracted[role] = contracted
        if self.contracted[role] != contracted:
            self.fixed.add(role.path)
        return self.outs[role]

    def _read(self, ref: Ref) -> Info:
        shape = ref.shape
        if not jnp.issubdtype(ref.value.dtype, jnp.floating):
            return plain(shape)
        role, sliced = Role(ref.path, "read"), full_axes(ref, ref.sliced)
        # Entries that this call does not read, of a table of positions say, must change as those that it does read.
        known = self.contracted.get(role, sliced)
        labels = self._outs(role, known)
        for axis in sliced:
            if labels.shape[axis] > 1:
                labels = self.unify(labels, [labels.ndim + axis])
        mine = self.labels.find(arrays.arrange(ref, arrays.cut(labels, ref.value.cuts)))
        const = self.read_const(ref)
        if const is not None:
            return Info(np.zeros((1,) * len(shape), np.int64), (False,) * len(shape), const)
        return Info(mine, tuple(s > 1 for s in shape), param=(ref.path, 1.0, 0.0))

    def read_const(self, ref: Ref) -> float | None:
        """The number that a leaf is taken for; None where it has labels of its own."""
        return None

    def _use(self, use: Use, shape: tuple[int, ...]) -> Info:
        ref = use.ref
        others = [self.info(a) for i, a in enumerate(use.args) if i != use.which]
        if use.kind not in ("dot", "lookup", "ragged_dot") or not jnp.issubdtype(ref.value.dtype, jnp.floating):
            self.kill(*others)
            self.fixed.add(ref.path)
            return plain(shape)
        role = Role(ref.path, use.kind)
        # What a lookup brings out are the axes that it does not look up.
        contracted = full_axes(ref, (use.how.axis,) if use.kind == "lookup" else use.contracted)
        labels = self.labels.find(arrays.cut(self._outs(role, contracted), ref.value.cuts))
        if use.kind == "lookup":
            self.kill(*others)
            return _looked_up(use, labels, shape)
        if use.kind == "ragged_dot":  # a row's expert is not known: the channels of all of them are one
            labels = self.unify(labels, [0])
        if use.batch:  # their channels meet different inputs
            self.labels.note(labels, self.place(labels, [labels.ndim + a for a in use.batch]), self.here)
        x = others[0]
        self.kill(*others[1:])
        if x.square:
            self.kill(x)
        self._contract(role, ref, *_RUNS[use.kind](self, use, self.labels.find(x.labels)))
        return Info(_produced(use, labels, shape), tuple(s > 1 for s in shape))

    def _contract(self, role: Role, ref: Ref, found: np.ndarray, axes: tuple[int, ...]) -> None:
        """Notes the labels that a use contracts: `found` has the rank of the leaf as it is cut, full along `axes`."""
        ndim = len(self._whole_shape(role.path))
        held = self.ins.get(role, np.full((1,) * ndim, -1))
        full = (*full_axes(ref, axes), *(i.axis for i in ref.stack))
        held = arrays.expand(held, self._whole_shape(role.path), [ndim + a for a in full]).copy()
        mine = arrays.cut(held, ref.value.cuts)
        found = np.broadcast_to(found, mine.shape)
        both = mine >= 0
        self.labels.union(mine[both], found[both])
        mine[...] = np.where(both, mine, found)
        self.ins[role] = held


def _dot_labels(flow: Flow, use: Use, labels: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    how, ref, shape = use.how, use.ref, tuple(use.x.shape)
    b, c = len(how.batch_shape), len(use.eqn.params["dimension_numbers"][0][use.which])
    free = how.order_in[b : len(shape) - c]
    labels = flow.unify(labels, free)
    labels = arrays.expand(labels, shape, [d for d in range(len(shape)) if d not in free])
    rows = how.operand(labels)  # [*batch axes, 1, n]
    axes = (*how.batch, *how.contracted)
    return arrays.leaf_shaped(rows, axes, [ref.value.shape[a] for a in axes], len(ref.value.shape)), axes


def _ragged_labels(flow: Flow, use: Use, labels: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    rows = arrays.expand(flow.unify(labels, [0]), use.x.shape, [1])
    return arrays.leaf_shaped(rows, use.contracted, [rows.size], len(use.ref.value.shape)), use.contracted


_RUNS = {"dot": _dot_labels, "ragged_dot": _ragged_labels}


def _produced(use: Use, labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The labels of a product's result, from those of the leaf as it is cut."""
    if use.kind == "ragged_dot":
        return labels.reshape(1, -1)
    how = use.how
    axes = (*how.batch, *how.free)
    gone = [a for a in range(-labels.ndim, 0) if a not in axes]
    rows = labels.transpose([labels.ndim + a for a in (*axes, *gone)]).reshape([labels.shape[a] for a in axes])
    rows = rows.reshape(*rows.shape[: len(how.batch)], 1, *rows.shape[len(how.batch) :])
    return how.result(rows, [1] * (len(shape) - len(how.batch_shape) - len(how.free_shape)))


def _looked_up(use: Use, labels: np.ndarray, shape: tuple[int, ...]) -> Info:
    rows = arrays.arrange(use.ref, labels).squeeze(use.how.dim)
    sizes = [1] * len(shape)
    for d, n in zip(use.eqn.params["dimension_numbers"].offset_dims, rows.shape, strict=True):
        sizes[d] = n
    return Info(rows.reshape(sizes), tuple(s > 1 for s in shape))


# --- instructions of the linearizer's own ---


def _row(flow: Flow, instr: Any, shapes: Any) -> list[Info]:
    info = flow.info(instr.args[0])
    at = instr.key[1] if info.labels.shape[0] > 1 else 0
    return [Info(info.labels[at], info.vary[1:], info.const)]


def _array(flow: Flow, instr: Any, shapes: Any) -> list[Info]:
    return [flow.info(instr.args[0])]


def _stack(flow: Flow, instr: Any, shapes: Any) -> list[Info]:
    infos = [flow.info(a) for a in instr.args]
    full = np.broadcast_shapes(*(i.labels.shape for i in infos))
    labels = np.stack([np.broadcast_to(i.labels, full) for i in infos])
    vary = tuple(any(v) for v in zip(*(i.vary for i in infos), strict=True))
    return [Info(labels, (len(infos) > 1, *vary))]


_OWN = {"row": _row, "array": _array, "stack": _stack}


# --- rearrangements: (flow, equation, what is known of the operands, shapes of the outputs) -> the same of the outputs ---


def _same(flow: Flow, eqn: Any, infos: list[Info], shapes: Any) -> list[Info] | None:
    new = eqn.params.get("new_dtype")
    if new is not None and not jnp.issubdtype(new, jnp.floating):
        return None if infos[0].labels.any() else [infos[0]]
    return list(infos[: len(shapes)])


def _reshape(flow: Flow, eqn: Any, infos: list[Info], shapes: Any) -> list[Info] | None:
    if eqn.params.get("dimensions") is not None:
        return None
    info, a, b = infos[0], eqn.invars[0].aval.shape, shapes[0]
    return [info._replace(labels=arrays.reshape(info.labels, a, b), vary=arrays.reshape_flags(info.vary, a, b))]


def _transpose(flow: Flow, eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    p, info = eqn.params["permutation"], infos[0]
    return [info._replace(labels=info.labels.transpose(p), vary=tuple(info.vary[i] for i in p))]


def _broadcast(flow: Flow, eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    info, where, out = infos[0], eqn.params["broadcast_dimensions"], len(shapes[0])
    sizes, vary = [1] * out, [False] * out
    for source, target in enumerate(where):
        sizes[target], vary[target] = info.labels.shape[source], info.vary[source]
    return [info._replace(labels=info.labels.reshape(sizes), vary=tuple(vary))]


def _squeeze(flow: Flow, eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    gone, info = eqn.params["dimensions"], infos[0]
    vary = tuple(v for d, v in enumerate(info.vary) if d not in gone)
    return [info._replace(labels=info.labels.squeeze(tuple(gone)), vary=vary)]


def _take(flow: Flow, info: Info, index: list[slice]) -> Info:
    """A part of a value. That a part of the labels was taken is noted: they don't go on together with the rest."""
    at = tuple(s if n > 1 else slice(None) for s, n in zip(index, info.labels.shape, strict=True))
    part = info.labels[at]
    if part.shape != info.labels.shape:
        flow.labels.note(part, np.ones((1,) * part.ndim, np.int64), flow.here)
    return info._replace(labels=part)


def _slice(flow: Flow, eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    p = eqn.params
    steps = p["strides"] or (1,) * len(p["start_indices"])
    index = [slice(*s) for s in zip(p["start_indices"], p["limit_indices"], steps, strict=True)]
    return [_take(flow, infos[0], index)]


def _split(flow: Flow, eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    axis, start, out = eqn.params["axis"], 0, []
    for shape in shapes:
        index = [slice(None)] * len(shape)
        index[axis] = slice(start, start + shape[axis])
        before, flow.here = flow.here, flow.here + (start + 1 << 32)
        out.append(_take(flow, infos[0], index))
        flow.here, start = before, start + shape[axis]
    return out


def _dynamic_slice(flow: Flow, eqn: Any, infos: list[Info], shapes: Any) -> list[Info] | None:
    cut = [a != b for a, b in zip(eqn.invars[0].aval.shape, shapes[0], strict=True)]
    if any(c and n > 1 for c, n in zip(cut, infos[0].labels.shape, strict=True)) or any(i.labels.any() for i in infos[1:]):
        return None
    return [infos[0]]


def _concatenate(flow: Flow, eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    axis, sizes = eqn.params["dimension"], [v.aval.shape for v in eqn.invars]
    full = list(np.broadcast_shapes(*([n if d != axis else 1 for d, n in enumerate(i.labels.shape)] for i in infos)))
    parts = [np.broadcast_to(i.labels, [*full[:axis], s[axis], *full[axis + 1 :]]) for i, s in zip(infos, sizes, strict=True)]
    vary = [any(v) for v in zip(*(i.vary for i in infos), strict=True)]
    vary[axis] = True
    if not any(i.labels.any() for i in infos):
        return [plain(shapes[0])._replace(vary=tuple(vary))]
    return [Info(np.concatenate(parts, axis), tuple(vary), square=any(i.square for i in infos))]


def _rev(flow: Flow, eqn: Any, infos: list[Info], shapes: Any) -> list[Info]:
    dims = [d for d in eqn.params["dimensions"] if infos[0].labels.shape[d] > 1]
    return [infos[0]._replace(labels=np.flip(infos[0].labels, dims))]


def _gather(flow: Flow, eqn: Any, infos: list[Info], shapes: Any) -> list[Info] | None:
    """A lookup in a value, along dimensions on which its labels don't depend."""
    info, numbers, sizes = infos[0], eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    moved = set(numbers.start_index_map) | set(numbers.collapsed_slice_dims)
    whole = all(s == n or d in moved for d, (s, n) in enumerate(zip(sizes, eqn.invars[0].aval.shape, strict=True)))
    if not whole or numbers.operand_batching_dims or any(info.labels.shape[d] > 1 for d in moved) or infos[1].labels.any():
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
    "dynamic_slice": _dynamic_slice,
    "concatenate": _concatenate,
    "rev": _rev,
    "gather": _gather,
}


def aligned(infos: list[Info], ndim: int) -> list[Info]:
    """Operands of an entrywise operation, scalars as values of its rank."""
    out = []
    for i in infos:
        if i.labels.ndim == ndim:
            out.append(i)
        else:
            out.append(i._replace(labels=i.labels.reshape((1,) * ndim), vary=(False,) * ndim))
    return out


def varies(infos: list[Info]) -> tuple[bool, ...]:
    """The dimensions along which an entrywise operation's result varies."""
    return tuple(any(v) for v in zip(*(i.vary for i in infos), strict=True))


def together(infos: list[Info]) -> np.ndarray:
    """The labels of an entrywise result of operands of which one has labels, or whose labels are one by now."""
    shape = np.broadcast_shapes(*(i.labels.shape for i in infos))
    out = np.zeros(shape, np.int64)
    for i in infos:
        out = np.where(out == 0, i.labels, out)
    return out


