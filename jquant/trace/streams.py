"""What the walk does at the products of a part: it rounds the inputs that will be rounded, and keeps two models apart.

The quantized model and the float model run in one program, mapped over an axis of length 2: so statistics of both are
sums over loops and batches like those of one.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jquant.core.activation import Activation
from jquant.ops.low_precision import round_input
from jquant.trace import compat, interpreter
from jquant.trace.execute import ExecuteReader
from jquant.trace.uses import Use
from jquant.trace.view import Ref

STREAMS = "streams"  # the axis: the quantized model's values, then the float model's


def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An array of this stream, in both."""
    first, second = jax.lax.all_gather(x, STREAMS)
    return first, second


class RoundingReader(ExecuteReader):
    """Runs uses of float weights, their inputs rounded as those of the quantized model will be.

    Args:
      rounds: path -> how, for leaves whose input is rounded as it comes. Only matmuls; never in the float model.
      two: both models run, mapped over `STREAMS`.
    """

    def __init__(self, rounds: Mapping[str, Activation], two: bool) -> None:
        super().__init__()
        self.rounds, self.two = rounds, two

    def use(self, use: Use, frame: interpreter.Frame) -> list[Any]:
        act = self.rounds.get(use.ref.path)
        if act is None or use.kind != "dot":
            return super().use(use, frame)
        near = _rounded(use, act)
        if self.two:
            near = jnp.where(jax.lax.axis_index(STREAMS) == 0, near, use.x)
        args = [near if a is use.x else a for a in use.args]
        return compat.bind(use.eqn, *[a.array() if isinstance(a, Ref) else a for a in args])


def _rounded(use: Use, act: Activation) -> jax.Array:
    """The input of a matmul, its tokens rounded."""
    rows = round_input(use.how.operand(use.x), act, clip=False)
    # `operand` only moves numbers about: its transpose puts them back.
    return jax.linear_transpose(use.how.operand, jax.ShapeDtypeStruct(use.x.shape, use.x.dtype))(rows)[0]
