"""Every use of JAX's internals, and every difference between the JAX versions we support, in one place."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap

from jquant.core.per_use import is_node

JaxprEqn = jex.JaxprEqn
Literal = jex.Literal


class Closed(NamedTuple):
    """A jaxpr with its constants, the same for every JAX version (0.12 merged Jaxpr and ClosedJaxpr).

    Attributes:
      eqns, outvars: as in the jaxpr.
      constvars, consts: constants and their values.
      invars: the inputs, constants not among them.
    """

    eqns: Sequence[Any]
    constvars: Sequence[Any]
    consts: Sequence[Any]
    invars: Sequence[Any]
    outvars: Sequence[Any]


def closed(jaxpr: Any) -> Closed:
    """The parts of a Jaxpr or ClosedJaxpr."""
    if isinstance(jaxpr, Closed):
        return jaxpr
    inner = jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr
    consts = list(getattr(jaxpr, "consts", ()))
    constvars = list(inner.constvars)
    # An open jaxpr's constvars without values are inputs in front of the others.
    if len(constvars) != len(consts):
        return Closed(inner.eqns, [], [], [*constvars, *inner.invars], inner.outvars)
    return Closed(inner.eqns, constvars, consts, list(inner.invars), inner.outvars)


class ScanParts(NamedTuple):
    """A scan's body and how its operands split."""

    body: Closed
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: int


def scan_parts(eqn: JaxprEqn) -> ScanParts:
    """The pieces of a scan equation, `num_consts` before 0.12 and `ft_in` from then on."""
    p = eqn.params
    if "num_consts" in p:
        consts, carry = p["num_consts"], p["num_carry"]
    else:
        consts, carry, _ = (len(list(part)) for part in p["ft_in"].unpack())
    return ScanParts(closed(p["jaxpr"]), consts, carry, p["length"], p["reverse"], p["unroll"])


def trace(fn: Callable[..., Any], *args: Any) -> tuple[Closed, Any]:
    """Traces `fn` at the shapes of `args` (arrays, tracers, ShapeDtypeStructs, `stand_in`s): jaxpr and output tree."""
    out: dict[str, Any] = {}

    def flat_fn(*flat: Any) -> list[Any]:
        result = fn(*jax.tree.unflatten(in_tree, flat))
        leaves, out["tree"] = jax.tree.flatten(result)
        return leaves

    flat_args, in_tree = jax.tree.flatten(args, is_leaf=lambda x: isinstance(x, _Stand))
    return closed(jax.make_jaxpr(flat_fn)(*map(_argument, flat_args))), out["tree"]


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype, weak type of an array, tracer or scalar; of a QTensor those of the array that it stands for."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if is_node(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def _varying(x: Any) -> frozenset[str]:
    """The axes of a shard_map around us over which a value varies."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return frozenset()
    return getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", frozenset())


def _argument(x: Any) -> Any:
    """What make_jaxpr is given for `x`. Inside a shard_map its type says where it varies, which no struct can say."""
    if isinstance(x, _Stand):
        return x.aval
    return jax.typeof(x) if _varying(x) else abstract(x)


class _Stand(NamedTuple):
    aval: Any


def stand_in(parts: Sequence[Any], shape: Sequence[int], dtype: Any) -> Any:
    """For `trace`: an array computed from `parts`, varying over the axes of a shard_map over which one of them does."""
    varying: frozenset[str] = frozenset().union(*map(_varying, parts))
    if not varying:
        return jax.ShapeDtypeStruct(tuple(shape), dtype)
    like = next(t for t in map(jax.typeof, parts) if t.manual_axis_type.varying)
    sharding = like.sharding.update(spec=jax.sharding.PartitionSpec(*[None] * len(shape)))
    manual = like.manual_axis_type.update(varying=varying)
    return _Stand(like.update(
        shape=tuple(shape), dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding, manual_axis_type=manual
    ))  # fmt: skip


def bind(eqn: JaxprEqn, *args: Any) -> list[Any]:
    """Runs one equation on values, custom derivatives and all."""
    return bind_with(eqn, eqn.params, *args)


def bind_with(eqn: JaxprEqn, params: dict[str, Any], *args: Any) -> list[Any]:
    """`bind` with other parameters."""
    params = eqn.primitive.get_bind_params(params)
    with eqn.ctx.manager:
        try:
            out = eqn.primitive.bind(*args, **params)
        except NotImplementedError:  # JAX may have no rule for it under a vmap: then one after the other
            out = sequential_vmap(lambda *args: eqn.primitive.bind(*args, **params))(*args)
    return list(out) if eqn.primitive.multiple_results else [out]


def is_literal(v: Any) -> bool:
    return isinstance(v, Literal)


def is_dropped(v: Any) -> bool:
    """An output that nobody reads."""
    return type(v).__name__ == "DropVar"


def sub_jaxprs(eqn: JaxprEqn) -> list[Closed]:
    """The jaxprs inside an equation's parameters."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") and hasattr(item, "invars") or hasattr(item, "jaxpr"):
                found.append(closed(item))
    return found


CUSTOM_CALLS = frozenset(("custom_jvp_call", "custom_vjp_call"))


def eqn_key(eqn: JaxprEqn) -> Any:
    """What an equation computes from its operands, hashable: equal equations, of two layers say, have equal keys.

    The derivative rules of custom_jvp and custom_vjp are left out: every trace makes new functions of them.
    """
    params = eqn.params
    if eqn.primitive.name in CUSTOM_CALLS:
        params = {k: params[k] for k in ("call_jaxpr", "num_consts")}
    return (eqn.primitive.name, static_key(dict(params)))


def static_key(value: Any) -> Any:
    """A hashable stand-in for an equation's parameter: equal keys only for equal parameters, while both are alive."""
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        return _jaxpr_key(closed(value))
    if isinstance(value, tuple | list):
        return (type(value).__name__, *map(static_key, value))
    if isinstance(value, dict):
        return ("dict", *((k, static_key(value[k])) for k in sorted(value, key=str)))
    if isinstance(value, np.ndarray | jax.Array):
        return _array_key(value)
    try:
        hash(value)
    except TypeError:
        return ("id", id(value))
    return (type(value).__name__, value)  # 1, 1.0 and True are equal to Python


def _array_key(value: Any) -> Any:
    # Comparing large arrays would cost more than it saves.
    if isinstance(value, jax.core.Tracer) or value.size > 1024 or jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return ("id", id(value))
    return ("array", value.shape, str(value.dtype), np.asarray(value).tobytes())


def _jaxpr_key(jaxpr: Closed) -> Any:
    """The equations with variables by number: names and the order of tracing do not matter, constants do."""
    numbers: dict[Any, int] = {}

    def name(v: Any) -> Any:
        return literal_key(v) if is_literal(v) else numbers.setdefault(v, len(numbers))

    ins = tuple((name(v), str(v.aval)) for v in (*jaxpr.constvars, *jaxpr.invars))
    body = tuple((eqn_key(e), tuple(map(name, e.invars)), tuple(map(name, e.outvars))) for e in jaxpr.eqns)
    return ("jaxpr", ins, tuple(map(static_key, jaxpr.consts)), body, tuple(map(name, jaxpr.outvars)))


def literal_key(v: Any) -> Any:
    """A hashable stand-in for a literal."""
    value = v.val
    return ("literal", str(jnp.result_type(value)), np.asarray(value).tobytes(), np.shape(value))
