"""A model as a straight line of instructions.

The jaxpr is flattened: calls are inlined, scans over stacked parameters become one copy of the body for each slice.
Nothing is computed here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core import kept
from jquant.trace import compat, interpreter, view
from jquant.trace.function import Traced
from jquant.trace.rearrange import REARRANGE, SAME_DATA, is_ref, row_of


class Sym:
    """A value of the program; equal only to itself. `static`: depends on neither parameters nor arguments."""

    __slots__ = ("aval", "static", "ndim", "shape", "size")

    def __init__(self, aval: Any, static: bool):
        self.aval, self.static = aval, static
        self.shape = tuple(getattr(aval, "shape", ()))
        self.ndim, self.size = len(self.shape), int(np.prod(self.shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Instr:
    """One instruction.

    Attributes:
      run: `(operands, frame) -> outputs`; operands are arrays and Refs.
      eqn: the equation, or None for an instruction of the linearizer's own.
      key: what it does, hashable; equal instructions have equal keys.
      args: Syms, Refs of `kept.Later` leaves, or literals' values.
      outs: Syms.
    """

    eqn: Any
    key: Any
    args: tuple[Any, ...]
    outs: tuple[Sym, ...]
    static: bool
    run: Callable[[list[Any], interpreter.Reader, interpreter.Frame], list[Any]]


class Line:
    """The flat program of one traced call.

    Args:
      traced: the call.
      inline: whether calls that read no parameter are inlined too.
      derivatives: whether functions with derivatives of their own (custom_jvp, custom_vjp) stay one instruction.

    Attributes:
      instrs: in order.
      outputs: what it returns: Syms, Refs, or values.
      params: for each path the whole leaf, a `kept.Later`.
      arrays: Syms of the arguments.
      consts: values of Syms that the jaxpr captured.
    """

    def __init__(self, traced: Traced, inline: bool = False, derivatives: bool = False):
        self.inline = inline
        self.calls = _CALLS - _CUSTOM if derivatives else _CALLS
        self.instrs: list[Instr] = []
        self.consts: dict[Sym, Any] = {}
        self._known: dict[Any, list[Any]] = {}
        self._alive: list[Any] = []
        self._keys: dict[int, Any] = {}
        leaves = [compat.abstract(jnp.asarray(v) if isinstance(v, int | float) else v) for v in traced.leaves]
        self.params = {p: kept.Later(tuple(v.shape), v.dtype) for p, v in zip(traced.paths, leaves, strict=True)}
        self.arrays = [Sym(compat.abstract(a), False) for a in traced.arrays]
        refs = [view.new_ref(p, v) for p, v in self.params.items()]
        self.outputs = self._run(traced.jaxpr, [*refs, *self.arrays])
        self._keys.clear()  # an id is an equation's while the trace lives

    def _run(self, jaxpr: compat.Closed, args: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = {v: self._const(c) for v, c in zip(jaxpr.constvars, jaxpr.consts, strict=True)}
        env.update(zip(jaxpr.invars, args, strict=True))

        def value(v: Any) -> Any:
            return v.val if compat.is_literal(v) else env[v]

        for eqn in jaxpr.eqns:
            outs = self._step(eqn, [value(v) for v in eqn.invars])
            env.update((v, o) for v, o in zip(eqn.outvars, outs, strict=True) if not compat.is_dropped(v))
        return [value(v) for v in jaxpr.outvars]

    def _const(self, value: Any) -> Any:
        if jnp.ndim(value) == 0:
            return value
        sym = Sym(compat.abstract(value), True)
        self.consts[sym] = value
        return sym

    def _step(self, eqn: compat.JaxprEqn, args: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if any(map(is_ref, args)):
            if name in REARRANGE and is_ref(args[0]) and not _has_sym(args[1:]):
                refs = REARRANGE[name](args[0], eqn, args[1:])
                if refs is not None:
                    return list(refs)
            if name in self.calls:
                return self._run(compat.sub_jaxprs(eqn)[0], args)
            if name == "scan" and (outs := self._scan(eqn, args)) is not None:
                return outs
        elif self.inline and name in self.calls:
            return self._run(compat.sub_jaxprs(eqn)[0], args)
        return self._record(eqn, args)

    def _record(self, eqn: compat.JaxprEqn, args: list[Any]) -> list[Any]:
        if (key := self._keys.get(id(eqn))) is None:  # layers that are alike share their equations
            key = self._keys[id(eqn)] = compat.eqn_key(eqn)
        same = (key, *map(id, args)) if eqn.primitive.name in SAME_DATA else None
        if same in self._known:
            return self._known[same]
        avals = [v.aval for v in eqn.outvars]
        outs = self._add(eqn, key, args, avals, partial(interpreter.step, eqn))
        if same is not None:
            self._known[same] = outs
            self._alive.append(args)
        return outs

    def _add(self, eqn: Any, key: Any, args: Sequence[Any], avals: Sequence[Any], run: Any) -> list[Any]:
        static = not eqn_effects(eqn) and all(isinstance(a, Sym) and a.static or not _is_value(a) for a in args)
        outs = [Sym(aval, static) for aval in avals]
        self.instrs.append(Instr(eqn, key, tuple(args), tuple(outs), static, run))
        return list(outs)

    def _scan(self, eqn: Any, args: list[Any]) -> list[Any] | None:
        """A scan over stacked parameters, one copy of its body for each slice; None for any other scan."""
        parts = compat.scan_parts(eqn)
        c, k = parts.num_consts, parts.num_carry
        consts, carry, xs = args[:c], args[c : c + k], args[c + k :]
        if not any(map(is_ref, xs)) or any(map(is_ref, carry)):
            return None
        if not all(view.stackable(x) for x in xs if is_ref(x)):
            return None
        steps = []
        for i in reversed(range(parts.length)) if parts.reverse else range(parts.length):
            outs = self._run(parts.body, [*consts, *carry, *[self._row(x, i) for x in xs]])
            carry = [self._array(o) for o in outs[:k]]
            steps.append([self._array(o) for o in outs[k:]])
        if parts.reverse:
            steps.reverse()
        return [*carry, *[self._stack(list(column)) for column in zip(*steps, strict=True)]]

    def _row(self, x: Any, i: int) -> Any:
        if is_ref(x):
            return row_of(x, i)
        aval = jax.ShapeDtypeStruct(x.shape[1:], x.aval.dtype)
        return self._add(None, ("row", i), [x], [aval], lambda a, *_: [a[0][i]])[0]

    def _array(self, x: Any) -> Any:
        if not is_ref(x):
            return x
        aval = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return self._add(None, ("array",), [x], [aval], lambda a, *_: [a[0].array()])[0]

    def _stack(self, column: list[Any]) -> Sym:
        shape = np.shape(column[0]) if not isinstance(column[0], Sym) else column[0].shape
        dtype = column[0].aval.dtype if isinstance(column[0], Sym) else jnp.result_type(column[0])
        aval = jax.ShapeDtypeStruct((len(column), *shape), dtype)
        return self._add(None, ("stack", len(column)), column, [aval], lambda a, *_: [jnp.stack(a)])[0]


def eqn_effects(eqn: Any) -> bool:
    """Whether an equation does more than compute its outputs (debug prints, callbacks)."""
    return bool(eqn is not None and eqn.effects)


_CUSTOM = frozenset(("custom_jvp_call", "custom_vjp_call"))
_CALLS = _CUSTOM | {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"}


def _has_sym(args: Sequence[Any]) -> bool:
    return any(isinstance(a, Sym) or is_ref(a) for a in args)


def _is_value(a: Any) -> bool:
    return isinstance(a, Sym) or is_ref(a)
