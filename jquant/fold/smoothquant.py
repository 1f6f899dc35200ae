"""SmoothQuant as a method: part of the activations' outliers moved into the weights."""

from typing import Any

import numpy as np

from jquant.core.method import Folding, Method
from jquant.core.stats import Stats
from jquant.core.text import call
from jquant.fold.groups import Group, Inputs, for_inputs, per_channel, scaled, weight_losses

_ALPHAS = tuple(i / 20 for i in range(20))


def smoothquant(
    alpha: float | None = 0.5, *, everywhere: bool = False, tokens_alike: bool = False, activation_bits: int = 8
) -> Method:
    """SmoothQuant (arXiv 2211.10438): X diag(1/s) and diag(s) W, with s_j = max|X_j|^alpha / max|W_j|^(1 - alpha).

    For formats that round activations too: outliers of a few channels set the scale of a whole token. s is taken up by
    the gain of the norm in front (with its bias, and for all of its readers), exactly. Chooses no codes: chain it, as
    in `chain(smoothquant(0.8), rtn())`. Needs calibration data.

    Args:
      alpha: the paper's migration strength; None searches it for each input, by an estimate of the error of both
        roundings in which doing nothing is among what is tried.
      everywhere: also scale inputs that no norm makes, where another linear layer's output can take it up (the value
        projection in front of the output projection, the up projection in front of the down projection).
      tokens_alike: max|X_j| of tokens brought to one root mean square. The paper's is that of a few massive tokens
        where a model has them; where each token has a scale of its own, they do not set the scales of others.
      activation_bits: for the search: the bits that activations will be rounded to.

    Raises:
      ValueError: `alpha` is outside [0, 1].
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"smoothquant: alpha must be in [0, 1] or None, not {alpha}")

    def choose(group: Group, matrices: list[Inputs]) -> np.ndarray:
        x = per_channel(group, [_largest(i.stats) for i in matrices], np.maximum, 0.0)
        w = per_channel(group, [np.max(np.abs(np.asarray(i.weight)), axis=0) for i in matrices], np.maximum, 0.0)
        if alpha is not None:
            return _scales(x, w, alpha)
        tried = np.stack([np.ones_like(x), *[_scales(x, w, a) for a in _ALPHAS]])
        return tried[int(np.argmin(_losses(group, matrices, tried, activation_bits)))]

    def fold(job: Folding) -> Any:
        wanted = (lambda g: True) if everywhere else (lambda g: g.norm)
        return scaled(job, "smoothquant", choose, fold_needs, wanted)

    said = {
        "alpha": (alpha, 0.5), "everywhere": (everywhere, False), "tokens_alike": (tokens_alike, False),
        "activation_bits": (activation_bits, 8),
    }  # fmt: skip
    fold_needs = frozenset({"peak" if tokens_alike else "absmax"} | ({"gram"} if alpha is None else set()))
    return Method(call("smoothquant", **said), None, folds=(fold,), fold_needs=fold_needs)


def _largest(stats: Stats) -> np.ndarray:
    """max|X_j|: of tokens as they are, or alike."""
    return np.asarray(stats.absmax if stats.peak is None else stats.peak)


def _tokens(stats: Stats) -> float:
    """How many tokens have an X with that maximum: all, or as many as have the same sum of squares."""
    if stats.peak is None:
        return float(stats.tokens)
    assert stats.gram is not None
    return float(np.mean(np.diagonal(np.asarray(stats.gram))))


def _scales(x: np.ndarray, w: np.ndarray, alpha: float) -> np.ndarray:
    """s; 1 for a channel that is never active or has no weights."""
    dead = (x <= 0) | (w <= 0)
    s = np.where(dead, 1, x) ** alpha / np.where(dead, 1, w) ** (1 - alpha)
    return np.where(dead, 1, np.clip(s, 1e-5, 1e5))


def _losses(group: Group, matrices: list[Inputs], tried: np.ndarray, bits: int) -> np.ndarray:
    """An estimate of the squared error of the outputs under each of the scales `tried` `[k, channels]`: `[k]`.

    Of the weights: tr(E H E^T). Of the activations: an error uniform within a step on every entry, steps from the
    largest |X_j| / s_j, which meets the weights as they then are.
    """
    total = weight_losses(group, matrices, tried)
    for m, own in zip(group.matrices, matrices, strict=True):
        by = for_inputs(m, tried)
        step = np.max(_largest(own.stats) / by, axis=-1) / (2 ** (bits - 1) - 0.5)
        squares = by**2 @ np.sum(np.asarray(own.weight, np.float64) ** 2, axis=0)
        total += _tokens(own.stats) * step**2 / 12 * squares
    return total
