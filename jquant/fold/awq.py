"""AWQ as a method: scales found and folded into the model, clipped blocks, rounding to nearest."""

from typing import Any

import numpy as np

from jquant.core.method import Folding, Method
from jquant.core.text import call
from jquant.fold.groups import Group, Inputs, per_channel, scaled, weight_losses
from jquant.solvers.awq import candidates, clip_solver, relative_size


def awq(*, grid: int = 20, clip: bool = True, max_shrink: float = 0.5) -> Method:
    """Activation-aware weight quantization (arXiv 2306.00978).

    Salient input channels are made larger before rounding and what feeds them smaller: a norm's gain, the value
    projection, the up projection, whatever the jaxpr says can take up the scale exactly. The scales are s = x^a, x the
    mean |input|, and x^a / w^(1 - a); a is searched by the error of the outputs of all weights that read the input,
    tr(E H E^T), with H measured on the float model. Doing nothing is among what is tried, so it never grows. Then every
    block's range is clipped where that lowers the output error, and weights are rounded to nearest; `gptq()` after it
    rounds under the scales that the clipping chose, and `awq(clip=False)` leaves them to it.

    Args:
      grid: how many exponents a to try.
      clip: search the clipping of blocks.
      max_shrink: how far a block's range is clipped, in [0, 1), in steps of 1 / 20.

    Raises:
      ValueError: a setting is out of range.
    """
    if grid < 1 or not 0 <= max_shrink < 1:
        raise ValueError(f"awq: needs grid >= 1 and 0 <= max_shrink < 1, got grid={grid}, max_shrink={max_shrink}")

    def choose(group: Group, matrices: list[Inputs]) -> np.ndarray:
        x_mean, w_mean = _means(group, matrices)
        tried = candidates(x_mean, w_mean, grid)
        return tried[int(np.argmin(weight_losses(group, matrices, tried)))]

    fold_needs = frozenset({"gram", "mean_abs"})

    def fold(job: Folding) -> Any:
        return scaled(job, "awq", choose, fold_needs)

    factors = tuple(1 - i / 20 for i in range(1, int(round(max_shrink * 20)) + 1))
    name = call("awq", grid=(grid, 20), clip=(clip, True), max_shrink=(max_shrink, 0.5))
    solve, needs = (clip_solver(factors), frozenset({"gram"})) if clip else (None, frozenset[str]())
    return Method(name, solve, needs, (fold,), fold_needs)


def _means(group: Group, matrices: list[Inputs]) -> tuple[np.ndarray, np.ndarray]:
    """Mean |x| of each channel, and mean relative |w|."""
    ones = [np.ones(len(m.channels)) for m in group.matrices]
    count = per_channel(group, ones, np.add, 0.0)
    x = per_channel(group, [np.asarray(i.stats.mean_abs) for i in matrices], np.add, 0.0) / count
    rows = per_channel(group, [np.full(len(o), i.weight.shape[0]) for o, i in zip(ones, matrices)], np.add, 0.0)
    w = per_channel(group, [np.asarray(relative_size(i.weight, i.format)) for i in matrices], np.add, 0.0) / rows
    return x, w
