"""The quantized model and the float model beside it in one program, mapped over an axis of length 2: so statistics of
both are sums over loops and batches like those of one. And inputs that are rounded in the first of the two only.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.core.activation import Activation
from jquant.ops.low_precision import round_input
from jquant.trace import compat, interpreter
from jquant.trace.execute import ExecuteReader
from jquant.trace.uses import Use
from jquant.trace.view import Ref

STREAMS = "streams"  # the axis: the quantized model's values, then the float model's


class Both(NamedTuple):
    """A value in both streams.

    Attributes:
      value: the quantized model's.
      other: the float model's; of floats what it is more, in bfloat16: half the memory for a small difference.
    """

    value: Any
    other: Any


class Weights(NamedTuple):
    """A weight of the quantized model, and of the float model."""

    value: Any
    other: Any


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


def in_both(run: Callable[..., Any]) -> Callable[..., Any]:
    """A part's `run` on both streams: what it takes and gives is `Both` where they may differ."""

    def step(inputs: list[Any], operands: list[Any]) -> tuple[list[Any], Any]:
        values = [_stacked(x) for x in (*inputs, *operands)]
        arrays, axes = [v for v, _ in values], [a for _, a in values]
        n = len(inputs)
        mapped = jax.vmap(
            run, in_axes=(axes[:n], axes[n:]), out_axes=(0, None), axis_size=2, axis_name=STREAMS
        )  # fmt: skip
        outs, seen = mapped(arrays[:n], arrays[n:])
        return [_parted(o) for o in outs], seen

    return step


def _stacked(x: Any) -> tuple[Any, int | None]:
    """A value with a leading axis of both streams, and 0; or one that is the same in both, and None."""
    if isinstance(x, Both) and jnp.issubdtype(x.value.dtype, jnp.floating):
        x = Both(x.value, x.value + x.other.astype(x.value.dtype))
    if isinstance(x, (Both, Weights)):
        return jax.tree.map(lambda a, b: jnp.stack([a, b]), x.value, x.other), 0
    return x, None


def _parted(pair: jax.Array) -> Both:
    if jnp.issubdtype(pair.dtype, jnp.floating):
        return Both(pair[0], (pair[1] - pair[0]).astype(jnp.bfloat16))
    return Both(pair[0], pair[1])
