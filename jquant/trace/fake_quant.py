"""`fake_quantized`: quantization-aware training. The forward pass of `quantized`, with derivatives for the weights."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jquant.core.activation import Policy
from jquant.core.formats import BlockParams, Format, block_extremes, decode, spread
from jquant.core.histogram import static_range
from jquant.core.method import Rounding
from jquant.core.per_use import held, holding
from jquant.core.problem import as_problem, bring_back, finish
from jquant.core.qtensor import QTensor, from_rows, to_rows
from jquant.core.recipe import Recipe, as_recipe
from jquant.core.scales import spread_rows
from jquant.core.stats import Stats
from jquant.ops.low_precision import inside, straight_through
from jquant.solvers.rtn import rtn
from jquant.trace.execute import ExecuteReader, run_traced
from jquant.trace.function import trace_call
from jquant.trace.sites import sites_of
from jquant.trace.targets import Target, plan_targets


def fake_quantized(
    apply: Callable[..., Any],
    recipe: Recipe | Mapping[str, Format | Policy | None] | Format | Policy,
    *,
    stats: Mapping[str, Stats] | None = None,
    clip: bool = True,
    scales: bool = False,
) -> Callable[..., Any]:
    """The same function of the same float parameters, computed with them rounded as the recipe says.

    The forward pass is that of `quantized(apply)` on `quantize(apply, params, recipe, rtn(), ...)`, bit for bit in
    float32: the weights are rounded to nearest in every call, inputs where a `Policy` says so, and the products are the
    same. The derivative goes straight through all rounding (arXiv 1308.3432): of a weight it is that of the rounded
    weight. It composes with jit, grad, vmap, scan, remat and any optimizer over the float parameters.

    Args:
      apply: `apply(params, *args, **kwargs)`, pure.
      recipe: what is rounded, as for `quantize`.
      stats: for static input ranges: `calibrate(apply, params, batches, histogram=True)`, by path. Where it is None, a
        static range is that of the input at hand, the extremes of the tensor.
      clip: no derivative where a weight or an input is beyond the range of its codes: inputs outside a static range,
        weights whose scale was clipped. With False it goes straight through there too.
      scales: the derivative goes through the scales too: straight through is only the rounding, and the error of a
        block grows with its range.

    Returns:
      A function of the signature of `apply`.

    Raises (when called):
      RecipeError: a pattern matches nothing that can be quantized, or `stats` lacks a static range.
    """
    recipe = as_recipe(recipe)

    @functools.wraps(apply)
    def run(params: Any, *args: Any, **kwargs: Any) -> Any:
        traced = trace_call(apply, params, args, kwargs)
        targets = plan_targets(sites_of(traced), params, recipe)
        leaves = [
            holding(v, trained(jnp.asarray(held(v)), targets[p], stats, clip, scales)) if p in targets else v
            for p, v in zip(traced.paths, traced.leaves, strict=True)
        ]
        return run_traced(traced._replace(leaves=leaves), ExecuteReader(train=True, clip=clip))

    return run


@jax.tree_util.register_pytree_node_class
class TrainedQTensor(QTensor):
    """A QTensor that decodes with the derivative of the float weight it was rounded from.

    Attributes:
      soft: the float weight, `[*kept, n]`.
    """

    __slots__ = ("soft",)
    soft: jax.Array

    def tree_flatten(self):
        children, static = super().tree_flatten()
        return (*children, self.soft), static

    @classmethod
    def tree_unflatten(cls, static, children):
        q = super().tree_unflatten(static, children[:-1])
        q.soft = children[-1]
        return q

    def replace(self, **changes: Any) -> "TrainedQTensor":
        soft = changes.pop("soft", self.soft)
        return _with_soft(_plain(self).replace(**changes), soft)

    def rows(self) -> jax.Array:
        return straight_through(jax.lax.stop_gradient(super().rows()), self.soft.astype(jnp.float32))


def _plain(q: TrainedQTensor) -> QTensor:
    children, static = QTensor.tree_flatten(q)
    return QTensor.tree_unflatten(static, children)


def _with_soft(q: QTensor, soft: jax.Array) -> TrainedQTensor:
    children, static = QTensor.tree_flatten(q)
    return TrainedQTensor.tree_unflatten(static, (*children, soft))


def trained(
    w: jax.Array, target: Target, stats: Mapping[str, Stats] | None, clip: bool, scales: bool
) -> TrainedQTensor:
    """A leaf rounded to nearest, with its derivative; the arguments are those of `fake_quantized`."""
    fixed = jax.lax.stop_gradient(w)
    problem = as_problem(fixed, target.contracted, target.batch)
    solve = rtn().solve
    assert solve is not None
    done = solve(Rounding(problem.rows), None, target.format)
    q = finish(problem, done, target.format)
    # As in `quantized`, the codes are given: fused into their products they might be rounded in another way.
    q = jax.lax.optimization_barrier(q)
    soft = to_rows(w, target.contracted)
    if scales:
        rows = as_problem(w, target.contracted, target.batch).rows
        soft = soft + bring_back(problem, scaled_error(rows, done, target.format)).astype(w.dtype)
    elif clip:
        reached = from_rows(_inside(to_rows(fixed, target.contracted), q), q.contracted, q.contracted_shape)
        soft = to_rows(jnp.where(reached, w, fixed), target.contracted)
    act = target.activation
    params = None
    if act is not None and act.static and stats is None:
        act = act.replace(range="dynamic")
    elif act is not None and act.static and stats is not None:
        params = static_range(target.path, act, stats, q, target.batch)
    return _with_soft(q.replace(activation=act, activation_params=params), soft)


def scaled_error(rows: jax.Array, done: Rounding, fmt: Format) -> jax.Array:
    """What rounding changes in rows `[batch, m, n]`, float32, with its derivative by the range of each block.

    In units of the scale the error is held fixed: the straight-through estimator. The scale goes with the range.
    """
    assert done.params is not None and done.codes is not None
    error = jax.lax.stop_gradient(decode(done.codes, done.params, fmt) - rows.astype(jnp.float32))
    low, high = block_extremes(rows, fmt, stacked=1)
    width = jnp.maximum(-low, high) if fmt.symmetric else high - low
    growth = width / jax.lax.stop_gradient(jnp.where(width > 0, width, 1))
    return error * spread(spread_rows(growth, fmt.tile_rows, rows.shape[-2]), fmt, rows.shape[-1])


def _inside(rows: jax.Array, q: QTensor) -> jax.Array:
    n = rows.shape[-1]
    params = jax.tree.map(lambda a: spread(a, q.format, n), q.row_params())
    return inside(rows, BlockParams(*params), q.format)
