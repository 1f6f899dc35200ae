"""A program in float64, whatever dtypes it was written in: what proves that a fold is exact.

A model casts to float32 here and there, and rounding hides errors of 1e-7. Here every float is a float64: casts to a
float dtype do nothing, and products are asked for float64. Parameters are made when they are read and dropped behind,
so that a large model is never in memory in float64. Numpy runs what it can (`numbers`), JAX the rest.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core import kept
from jquant.core.per_use import PerUse, held
from jquant.fold import numbers
from jquant.trace import compat, interpreter
from jquant.trace.line import Line, Sym
from jquant.trace.view import Ref

Leaf = Callable[[str, tuple[tuple[int, ...], ...]], Any]
_DTYPES = ("new_dtype", "preferred_element_type", "dtype")


def run_wide(line: Line, leaf: Leaf, arrays: Sequence[Any]) -> list[np.ndarray]:
    """The outputs of a program in float64.

    Args:
      line: the program, all calls inlined.
      leaf: `(path, cuts) -> the leaf`, cut, floats in float64 (numpy).
      arrays: what it takes after the parameters.
    """
    with jax.enable_x64(True):
        env: dict[Sym, Any] = {s: _widen(a) for s, a in zip(line.arrays, arrays, strict=True)}
        env.update({s: _widen(a) for s, a in line.consts.items()})
        left = Counter(a for instr in line.instrs for a in instr.args if isinstance(a, Sym))
        left.update(a for a in line.outputs if isinstance(a, Sym))
        for instr in line.instrs:
            values = [_value(a, env, leaf) for a in instr.args]
            for out, value in zip(instr.outs, _instr(instr, values), strict=True):
                env[out] = value
            for a in instr.args:
                if isinstance(a, Sym):
                    left[a] -= 1
                    if not left[a]:
                        del env[a]
        outs = [_value(a, env, leaf) for a in line.outputs]
        return [np.asarray(o.array() if isinstance(o, Ref) else o) for o in outs]


def cut_leaf(leaf: Any, cuts: Sequence[tuple[int, ...]]) -> Any:
    """A leaf, cut; floats in float64."""
    inner = kept.apply_cuts(held(leaf), tuple(cuts))
    inner = inner.dequantize() if hasattr(inner, "dequantize") else inner
    maps = {
        k: np.asarray(getattr(leaf, k), np.float64) for k in ("lookup", "product") if getattr(leaf, k, None) is not None
    }
    a = np.asarray(inner)
    a = a.astype(np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a
    return leaf.replace(value=a, **maps) if isinstance(leaf, PerUse) else a


def _widen(x: Any) -> Any:
    if isinstance(x, Ref):
        return x
    if isinstance(x, int | float | complex):  # literals, some with a dtype of their own
        x = np.asarray(x, jnp.result_type(x) if hasattr(x, "dtype") or isinstance(x, bool) else _KINDS[type(x)])
    x = numbers.plain(x)
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != np.float64 else x


_KINDS = {int: np.int32, float: np.float64, complex: np.complex128}


def _value(a: Any, env: dict[Sym, Any], leaf: Leaf) -> Any:
    if isinstance(a, Ref):
        return a.replace(value=leaf(a.path, a.value.cuts), casts=())
    if isinstance(a, Sym):
        return env[a]
    return _widen(a)


class _Reader:
    """Runs each use on the float64 array."""

    inline, unroll = True, True

    def use(self, use: Any, frame: Any) -> list[Any]:
        return _bind(use.eqn, [a.array() if isinstance(a, Ref) else a for a in use.args])

    def read(self, ref: Ref, eqn: Any, frame: Any) -> Any:
        return ref.array()


_READER: Any = _Reader()


def _instr(instr: Any, values: list[Any]) -> list[Any]:
    if instr.eqn is None:
        return [numbers.plain(o) for o in instr.run(values, _READER, interpreter.Frame())]
    return _eqn(instr.eqn, values)


def _eqn(eqn: Any, values: list[Any]) -> list[Any]:
    if any(isinstance(v, Ref) for v in values):
        use = interpreter.find_use(eqn, values)
        if use is not None:
            args = tuple(a if i == use.which or not isinstance(a, Ref) else a.array() for i, a in enumerate(values))
            return interpreter.use_held(use._replace(args=args), _READER, interpreter.Frame())
        values = [v.array() if isinstance(v, Ref) else v for v in values]
    return _bind(eqn, values)


def _body(jaxpr: compat.Closed, args: Sequence[Any]) -> list[Any]:
    env = dict(zip(jaxpr.constvars, map(_widen, jaxpr.consts), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    value = lambda v: _widen(v.val) if compat.is_literal(v) else env[v]
    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _bind(eqn, [value(v) for v in eqn.invars]), strict=True))
    return [value(v) for v in jaxpr.outvars]


def _bind(eqn: Any, values: list[Any]) -> list[Any]:
    """One equation in float64."""
    name = eqn.primitive.name
    if (rule := numbers.rule_of(name, values)) is not None:
        out = rule(eqn.params, *values)
        if out is not NotImplemented:
            return [out]
    if name == "reduce_precision":
        return values
    if name in interpreter.ENTER and name not in _LOOPS:
        return _body(compat.sub_jaxprs(eqn)[0], values)
    return [numbers.plain(o) for o in _bind_in_jax(eqn, values)]


def _bind_in_jax(eqn: Any, values: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    values = [jnp.asarray(v) if isinstance(v, np.ndarray | np.generic) else v for v in values]
    if name in _LOOPS:
        return _LOOPS[name](eqn, values)
    if name in _NARROW:
        return [
            _widen(o) for o in compat.bind(eqn, *[_narrow(v, x.aval) for v, x in zip(values, eqn.invars, strict=True)])
        ]
    params = dict(eqn.params)
    for key in _DTYPES:
        if params.get(key) is not None and jnp.issubdtype(params[key], jnp.floating):
            params[key] = np.dtype(np.float64)
    return compat.bind_with(eqn, params, *values)


def _scan(eqn: Any, values: list[Any]) -> list[Any]:
    parts = compat.scan_parts(eqn)
    c, k = parts.num_consts, parts.num_carry

    def step(carry: Any, xs: Any) -> Any:
        outs = _body(parts.body, [*values[:c], *carry, *xs])
        return outs[:k], outs[k:]

    carry, ys = jax.lax.scan(step, values[c : c + k], values[c + k :], parts.length, parts.reverse)
    return [*carry, *ys]


def _while(eqn: Any, values: list[Any]) -> list[Any]:
    p = eqn.params
    a, b = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    test, body = compat.closed(p["cond_jaxpr"]), compat.closed(p["body_jaxpr"])
    return jax.lax.while_loop(
        lambda c: _body(test, [*values[:a], *c])[0], lambda c: _body(body, [*values[a:b], *c]), values[b:]
    )


def _cond(eqn: Any, values: list[Any]) -> list[Any]:
    branches = [partial(_body, compat.closed(b)) for b in eqn.params["branches"]]
    return jax.lax.switch(jnp.asarray(values[0], jnp.int32), branches, values[1:])


# What runs code that was written for its dtypes.
_NARROW = frozenset(
    ("pure_callback", "io_callback", "debug_callback", "pallas_call", "ffi_call", "bitcast_convert_type")
)


def _narrow(value: Any, aval: Any) -> Any:
    return value.astype(aval.dtype) if jnp.issubdtype(aval.dtype, jnp.floating) else value


_LOOPS: dict[str, Callable[[Any, list[Any]], list[Any]]] = {"scan": _scan, "while": _while, "cond": _cond}
