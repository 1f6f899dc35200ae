"""SmoothQuant as a method: part of the activations' outliers moved into the weights."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jquant.core.formats import compute_params, decode, encode
from jquant.core.method import Folding, Method
from jquant.fold.groups import Group, Inputs, for_inputs, per_channel, scaled

_ALPHAS = tuple(i / 20 for i in range(20))


def smoothquant(alpha: float | None = 0.5, *, everywhere: bool = False, activation_bits: int = 8) -> Method:
    """SmoothQuant (arXiv 2211.10438): X diag(1/s) and diag(s) W, with s_j = max|X_j|^alpha / max|W_j|^(1 - alpha).

    For formats that round activations too: outliers of a few channels set the scale of a whole token. s is taken up by
    the gain of the norm in front (with its bias, and for all of its readers), exactly. Chooses no codes: chain it, as
    in `chain(smoothquant(0.8), rtn())`. Needs calibration data.

    Args:
      alpha: the paper's migration strength; None searches it for each input, by an estimate of the error of both
        roundings in which doing nothing is among what is tried.
      everywhere: also scale inputs that no norm makes, where another linear layer's output can take it up (the value
        projection in front of the output projection, the up projection in front of the down projection).
      activation_bits: for the search: the bits that activations will be rounded to.

    Raises:
      ValueError: `alpha` is outside [0, 1].
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"smoothquant: alpha must be in [0, 1] or None, not {alpha}")

    def choose(group: Group, matrices: list[Inputs]) -> np.ndarray:
        x = per_channel(group, [np.asarray(i.stats.absmax) for i in matrices], np.maximum, 0.0)
        w = per_channel(group, [np.max(np.abs(np.asarray(i.weight)), axis=0) for i in matrices], np.maximum, 0.0)
        if alpha is not None:
            return _scales(x, w, alpha)
        tried = np.stack([np.ones_like(x), *[_scales(x, w, a) for a in _ALPHAS]])
        return tried[int(np.argmin([_loss(group, matrices, s, activation_bits) for s in tried]))]

    def fold(job: Folding) -> Any:
        wanted = (lambda g: True) if everywhere else (lambda g: g.norm)
        return scaled(job, "smoothquant", choose, gram=alpha is None, wanted=wanted)

    parts = [f"alpha={alpha}"] * (alpha != 0.5) + ["everywhere=True"] * everywhere
    parts += [f"activation_bits={activation_bits}"] * (activation_bits != 8)
    fold_needs = frozenset({"absmax"} if alpha is not None else {"absmax", "gram"})
    return Method(f"smoothquant({', '.join(parts)})", None, folds=(fold,), fold_needs=fold_needs)


def _scales(x: np.ndarray, w: np.ndarray, alpha: float) -> np.ndarray:
    """s; 1 for a channel that is never active or has no weights."""
    dead = (x <= 0) | (w <= 0)
    s = np.where(dead, 1, x) ** alpha / np.where(dead, 1, w) ** (1 - alpha)
    return np.where(dead, 1, np.clip(s, 1e-5, 1e5))


def _loss(group: Group, matrices: list[Inputs], s: np.ndarray, bits: int) -> float:
    """An estimate of the squared error of the outputs.

    Of the weights: tr(E H E^T). Of the activations: an error uniform within a step on every entry, steps from the
    largest |X_j| / s_j, which meets the weights as they then are.
    """
    total = 0.0
    for m, own in zip(group.matrices, matrices, strict=True):
        by = for_inputs(m, s)
        rows = own.weight * jnp.asarray(by, jnp.float32)
        params = compute_params(rows, own.format)
        e = (decode(encode(rows, params, own.format), params, own.format) - rows) / jnp.asarray(by, jnp.float32)
        assert own.stats.gram is not None
        of_weights = float(jnp.sum((e @ own.stats.gram) * e))
        step = float(np.max(np.asarray(own.stats.absmax) / by)) / (2 ** (bits - 1) - 0.5)
        total += of_weights + float(own.stats.tokens) * step**2 / 12 * float(jnp.sum(rows**2))
    return total
