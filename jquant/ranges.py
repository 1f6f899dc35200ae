"""How the inputs of a quantized tree's matmuls are rounded: set on its leaves, static ranges calibrated."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jquant.calibrate import calibrate
from jquant.core.errors import JQuantError, RecipeError
from jquant.core.histogram import BINS, Histogram, range_params, static_range
from jquant.core.paths import map_with_paths
from jquant.core.per_use import held, holding
from jquant.core.qtensor import QTensor
from jquant.core.stats import Stats
from jquant.trace.targets import Target


def add_activations(apply: Callable[..., Any], qtree: Any, targets: Mapping[str, Target], batches: list[Any]) -> Any:
    """The quantized tree with the activations that its targets ask for.

    Static ranges are those of one pass of the quantized weights over the batches, all inputs unrounded.

    Raises:
      RecipeError: no token reached an input that is to have a static range.
      JQuantError: static ranges, but the batches are only shapes.
    """
    static = {p for p, t in targets.items() if t.activation is not None and t.activation.static}
    stats = _observe(apply, qtree, static, batches) if static else {}

    def one(path: str, leaf: Any) -> Any:
        target = targets.get(path)
        return leaf if target is None or target.activation is None else holding(leaf, _add(held(leaf), target, stats))

    return map_with_paths(one, qtree)


def _add(q: QTensor, target: Target, stats: Mapping[str, Stats]) -> QTensor:
    act = target.activation
    assert act is not None
    if not act.static:
        return q.replace(activation=act)
    params = static_range(target.path, act, stats, q, target.batch)
    empty = [i for i, n in enumerate(stats[target.path].tokens.ravel().tolist()) if n == 0]
    if empty:
        which = f"{len(empty)} of its matrices (experts, layers), such as number {empty[0]}" if target.batch else "it"
        raise RecipeError(
            f"{target.path}: no calibration token reached {which}, so its input has no static range ({act}); give more "
            "batches, or use a dynamic range"
        )
    return q.replace(activation=act, activation_params=params)


def with_activation(q: QTensor, target: Target) -> QTensor:
    """The activation of a target, a static range of zeros: the shapes of what `add_activations` gives."""
    act = target.activation
    if act is None or not act.static:
        return q.replace(activation=act)
    lead = [q.shape[a] for a in target.batch]
    nothing = Histogram(jnp.zeros((*lead, 2 * BINS)), jnp.zeros(lead), jnp.zeros(lead))
    return q.replace(activation=act, activation_params=range_params(nothing, act, q, target.batch))


def _observe(apply: Any, qtree: Any, static: set[str], batches: list[Any]) -> dict[str, Stats]:
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(batches)):
        raise JQuantError(
            f"quantize: the input of {sorted(static)[0]} is to have a static range, which needs calibration data; give "
            "batches of arrays, or use a dynamic range"
        )
    return calibrate(apply, qtree, batches, gram=False, histogram=True, paths=static)
