"""Uses whose input is rounded, and their derivative: that of the product of the rounded operands, straight through the
rounding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jquant.core.formats import BlockParams
from jquant.core.qtensor import QTensor
from jquant.ops.choice import How
from jquant.ops.dot import apart, beside, fits, takes
from jquant.ops.low_precision import round_input, static_params
from jquant.trace.uses import Use

Runner = Callable[[Use], tuple[jax.Array, How]]


def straight_dot(use: Use, run: Runner, clip: bool) -> tuple[jax.Array, How]:
    """What `run` computes, with the straight-through derivative.

    Args:
      use: a dot.
      run: computes it on the codes, and says how.
      clip: no derivative where the input is beyond its range.
    """
    found = []

    @jax.custom_jvp
    def product(args: tuple[Any, ...]) -> jax.Array:
        out, how = run(use._replace(args=args))
        found.append(how)
        return out

    @product.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        _, change = jax.jvp(lambda args: _float_dot(use._replace(args=args), clip), primals, tangents)
        return product(*primals), change

    return product(use.args), found[0]


def _float_dot(use: Use, clip: bool) -> jax.Array:
    """The product of the rounded operands, in floats."""
    q, how, params = use.ref.value, use.how, use.eqn.params
    x, t = how.operand(use.x), None
    precision, preferred = params["precision"], params["preferred_element_type"]
    if takes(q) and fits(q, how.batch):
        x, t = apart(x, q, how.batch, precision)
    if q.activation is not None:
        x = round_input(x, q.activation, static_params(q, how.batch), clip)
    if q.side is not None and not takes(q):
        x, t = apart(x, q, how.batch, precision)

    def decoded(q: QTensor, wide: Any = None) -> tuple[jax.Array, How]:
        rows = use.ref.cast(q.rows().astype(q.dtype))
        first = tuple(q.kept.index(a) for a in how.batch)
        numbers = (((x.ndim - 1,), (rows.ndim - 1,)), (tuple(range(len(first))), first))
        preferred_type = preferred or wide
        out = jax.lax.dot_general(x, rows, numbers, precision=precision, preferred_element_type=preferred_type)
        return out, How("")

    return dot_result(use, (decoded(q) if t is None else beside(decoded, t, q, how.batch, precision))[0])


def dot_result(use: Use, out: jax.Array) -> jax.Array:
    """`[*batch axes, tokens, *other kept axes]` as the equation has it."""
    how = use.how
    contract, batch = use.eqn.params["dimension_numbers"]
    other, start = 1 - use.which, len(how.batch_shape)
    free = use.x.ndim - len(contract[other]) - len(batch[other])
    shape = [use.x.shape[d] for d in how.order_in[start : start + free]]
    return how.result(out, shape).astype(use.eqn.outvars[0].aval.dtype)


def rounds_in_float(use: Use) -> bool:
    """Whether the input of a use that runs on dequantized weights is rounded: convolutions and ragged products."""
    return use.ref.value.activation is not None and use.kind in _FLOAT


def round_args(use: Use, clip: bool) -> tuple[Any, ...]:
    """The operands of such a use, the input rounded: a token is a row, or what a convolution has at one place."""
    axis, static = _FLOAT[use.kind](use)
    act, x = use.ref.value.activation, jnp.moveaxis(use.args[0], axis, -1)
    rows = round_input(x.reshape(-1, x.shape[-1]), act, static, clip)
    return (jnp.moveaxis(rows.reshape(x.shape), -1, axis), *use.args[1:])


def _conv(use: Use) -> tuple[int, BlockParams | None]:
    return use.eqn.params["dimension_numbers"].lhs_spec[1], static_params(use.ref.value)


def _ragged(use: Use) -> tuple[int, BlockParams | None]:
    """A static range is that of the expert which the token goes to."""
    q: QTensor = use.ref.value
    experts = static_params(q, use.batch)
    if experts is None:
        return 1, None
    ends = jnp.cumsum(use.args[2])
    mine = jnp.searchsorted(ends, jnp.arange(use.args[0].shape[0], dtype=ends.dtype), side="right")
    return 1, jax.tree.map(lambda a: a[jnp.minimum(mine, a.shape[0] - 1), 0], experts)


_FLOAT: dict[str, Callable[[Use], tuple[int, BlockParams | None]]] = {"conv": _conv, "ragged_dot": _ragged}
