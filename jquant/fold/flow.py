"""`Flow`: carries labels through a program (`trace.line.Line`), from the parameters that produce channels to those
that contract them.

What an operation means for labels is a table of rules, by primitive; `scales` and `rotations` each have one, and share
`rearrange`. This file holds the walk, and what reads of parameters mean. What has no rule
kills the labels that it reads.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jquant.core.qtensor import is_qtensor
from jquant.fold import arrays
from jquant.fold.info import Info, Role, Rule, plain
from jquant.fold.labels import Labels
from jquant.fold.rearrange import REARRANGE
from jquant.trace.line import Line, Sym
from jquant.trace.sites import full_axes
from jquant.trace.uses import Use, find_use
from jquant.trace.view import Ref

_LARGEST_READ = 2**22


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
        self.leaves, self.values = {}, {}  # a flow outlives the parameters that it was found in

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
        path, a, b = info.param
        if self.affine.setdefault(path, (a, b)) != (a, b):
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
