"""A program in float64, whatever dtypes it was written in: what proves that a fold is exact.

A model casts to float32 here and there, and rounding hides errors of 1e-7. Here every float is a float64: casts to a
float dtype do nothing, and products are asked for float64. Parameters are made when they are read and dropped behind,
so that a large model is never in memory in float64. Numpy runs what it can (`numbers`), JAX the rest.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core import kept, memory
from jquant.core.per_use import PerUse, held
from jquant.fold import arrays, numbers
from jquant.trace import compat, interpreter, view
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
        run = _steps(line, leaf, arrays)
        while (outs := next(run)) is None:
            pass
        return outs


def run_together(
    line: Line, leaves: Sequence[Leaf], arrays: Sequence[Any]
) -> list[list[np.ndarray] | ValueError]:
    """`run_wide` of several sets of leaves, instruction by instruction: what one reads can be what the last has read.

    A set of leaves that raises a ValueError ends its run, and has it in the place of outputs.
    """
    runs = [_steps(line, leaf, arrays) for leaf in leaves]
    outs: list[Any] = [None] * len(runs)
    with jax.enable_x64(True):
        while any(o is None for o in outs):
            for i, run in enumerate(runs):
                if outs[i] is None:
                    try:
                        outs[i] = next(run)
                    except ValueError as e:
                        outs[i] = e
    return outs


def _steps(line: Line, leaf: Leaf, arrays: Sequence[Any]) -> Iterator[list[np.ndarray] | None]:
    """Runs one instruction after the other, giving None; at last the outputs."""
    env: dict[Sym, Any] = {s: _widen(a) for s, a in zip(line.arrays, arrays, strict=True)}
    env.update({s: _widen(a) for s, a in line.consts.items()})
    left = Counter(a for instr in line.instrs for a in instr.args if isinstance(a, Sym))
    left.update(a for a in line.outputs if isinstance(a, Sym))
    read = 0
    for instr in line.instrs:
        read += sum(math.prod(a.value.shape) for a in instr.args if isinstance(a, Ref))
        if read > _READ:  # what was made of parameters lies about in the heap
            memory.give_back()
            read = 0
        for out, value in zip(instr.outs, _instr(instr, env, leaf), strict=True):
            env[out] = value
        for a in instr.args:
            if isinstance(a, Sym):
                left[a] -= 1
                if not left[a]:
                    del env[a]
        yield None
    outs = [_value(a, env, leaf) for a in line.outputs]
    yield [np.asarray(o.array() if isinstance(o, Ref) else o) for o in outs]


def cut_leaf(leaf: Any, cuts: Sequence[tuple[int, ...]]) -> Any:
    """A leaf, cut; floats in float64."""
    inner = held(leaf)
    here = memory.in_host_memory(inner)  # then a cut is no copy
    inner = arrays.cut(np.asarray(inner), cuts) if here else kept.apply_cuts(inner, tuple(cuts))
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


def _instr(instr: Any, env: dict[Sym, Any], leaf: Leaf) -> list[Any]:
    if any(isinstance(a, Ref) and made_in_parts(a) for a in instr.args):
        args = [a if isinstance(a, Ref) else _value(a, env, leaf) for a in instr.args]
        if (out := _in_parts(instr.eqn, args, leaf)) is not None:
            return [out]
    values = [_value(a, env, leaf) for a in instr.args]
    if instr.eqn is None:
        return [numbers.plain(o) for o in instr.run(values, _READER, interpreter.Frame())]
    return _eqn(instr.eqn, values)


def made_in_parts(ref: Ref) -> bool:
    """Whether a leaf is too large to be made as a whole where parts will do."""
    return math.prod(ref.value.shape) > _LARGE


_READ = 2**25  # entries of leaves after which memory is given back: that takes time
_LARGE, _PART = 2**23, 2**22  # entries of a leaf that is made in parts, and of such a part


def _in_parts(eqn: Any, args: list[Any], leaf: Leaf) -> Any:
    """A product with a large leaf, or a lookup in it, part by part along an axis; None for anything else."""
    use = None if eqn is None else interpreter.find_use(eqn, args)
    if use is None or use.kind not in _PARTS or sum(isinstance(a, Ref) for a in args) > 1:
        return None
    try:
        return _PARTS[use.kind](use, lambda dim: _parts_along(use.ref, dim, leaf), args)
    except ValueError:  # a change that mixes what lies along that axis wants all of it
        return None


def _parts_along(ref: Ref, dim: int, leaf: Leaf) -> Iterator[tuple[int, int, Callable[[], Ref]]]:
    """`(start, size, what makes the part)` along a dimension of a view that is a whole axis."""
    whole = ref.shape[dim]
    count = min(-(-math.prod(ref.value.shape) // _PART), max(1, whole // 2))
    for start, end in pairwise(whole * i // count for i in range(count + 1)):
        part = view.cut(ref, dim, start, end - start)
        assert part is not None
        yield start, end - start, partial(_value, part, {}, leaf)


def _product_in_parts(use: Any, parts: Any, args: list[Any]) -> Any:
    contract, batch = use.eqn.params["dimension_numbers"]
    taken = (*contract[use.which], *batch[use.which])
    free = [d for d, n in enumerate(use.ref.shape) if d not in taken and n > 1]
    if len(free) != 1 or view.whole_axis(use.ref, free[0]) is None:
        return None
    ndim = use.eqn.outvars[0].aval.ndim
    # The result has the batch dimensions, the left operand's, the right one's; `free` is one of the leaf's own.
    own = [d for d in range(len(use.ref.shape)) if d not in taken]
    at = (len(batch[0]) if use.which == 0 else ndim - len(own)) + own.index(free[0])
    outs = [_eqn(use.eqn, [make() if a is use.ref else a for a in args])[0] for _, _, make in parts(free[0])]
    return np.concatenate(outs, at)


def _lookup_in_parts(use: Any, parts: Any, args: list[Any]) -> Any:
    index, dim = np.asarray(use.x), use.how.dim
    if index.size == 0 or index.min() < 0 or index.max() >= use.ref.shape[dim]:
        return None
    out = None
    for start, n, make in parts(dim):
        here = (index[..., 0] >= start) & (index[..., 0] < start + n)
        if not here.any():
            continue
        [rows] = _eqn(use.eqn, [make(), np.clip(index - start, 0, n - 1)])
        offset = use.eqn.params["dimension_numbers"].offset_dims
        here = np.expand_dims(here, tuple(offset))
        out = np.where(here, rows, 0.0 if out is None else out)
    return out


_PARTS: dict[str, Callable[..., Any]] = {"dot": _product_in_parts, "lookup": _lookup_in_parts}


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
