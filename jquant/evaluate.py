"""`evaluate`: what quantization cost, against the float model."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core.errors import JQuantError
from jquant.core.qtensor import tree_nbytes
from jquant.progress import Progress
from jquant.trace.execute import quantized
from jquant.trace.function import call_args


class Evaluation(NamedTuple):
    """What `evaluate` measures. Per predicted token: positions 1 to the last of every sequence.

    Attributes:
      kl: mean of KL(reference || quantized) over the full vocabulary, nats per token.
      kl_stderr: its standard error, from the spread of the sequences' means (of the tokens', of a single sequence).
      perplexity: exp of the mean negative log likelihood of the text under the quantized model.
      perplexity_reference: the same under the reference.
      top1_agreement: share of positions at which both have the same most likely token.
      bytes: of the quantized parameters.
      bytes_reference: of the reference's.
    """

    kl: float
    kl_stderr: float
    perplexity: float
    perplexity_reference: float
    top1_agreement: float
    bytes: int
    bytes_reference: int


class _Found(NamedTuple):
    """What is found at every predicted position, `[batch, length - 1]`."""

    kl: jax.Array
    nll: jax.Array
    nll_reference: jax.Array
    same: jax.Array


def windows(ids: Sequence[int], length: int = 512, count: int | None = None) -> list[np.ndarray]:
    """Cuts the tokens of a text into consecutive windows, int32 `[1, length]`; the last, partial one is dropped.

    Args:
      ids: the tokens of the whole text.
      length: tokens in a window.
      count: how many windows to take, from the front; None for all.

    Raises:
      JQuantError: the text fills no window, or a window can't predict a token.
    """
    if length < 2 or (count is not None and count < 1):
        raise JQuantError(f"windows: needs length >= 2 and count >= 1, got length={length}, count={count}")
    found = np.asarray(ids[: len(ids) // length * length], np.int32).reshape(-1, 1, length)[:count]
    if not len(found):
        raise JQuantError(f"the text has {len(ids)} tokens, fewer than one window of {length}; give more text")
    return list(found)


def evaluate(
    apply: Callable[..., Any], params: Any, qparams: Any, batches: Iterable[Any],
    *, tokens: Callable[[Any], jax.Array] | None = None,
) -> Evaluation:  # fmt: skip
    """Compares a quantized language model with its reference on text.

    Args:
      apply: `apply(params, *args) -> logits [batch, length, vocab]`.
      params: the reference, usually float.
      qparams: the quantized tree. It is run by `quantized(apply)`.
      batches: what `apply` takes after the parameters. Both models' logits of one batch are held at once.
      tokens: the tokens `[batch, length]` of a batch; by default the batch itself or its first array.

    Returns:
      An `Evaluation`.

    Raises:
      JQuantError: no batches, or sequences shorter than two tokens.
    """
    return evaluate_all(apply, params, {"": qparams}, batches, tokens=tokens)[""]


def evaluate_all(
    apply: Callable[..., Any], params: Any, qparams: Mapping[str, Any], batches: Iterable[Any],
    *, tokens: Callable[[Any], jax.Array] | None = None,
) -> dict[str, Evaluation]:  # fmt: skip
    """Compares several quantized trees with one reference, which is run once for all of them.

    Args:
      qparams: the trees by name. Logits are held of the reference and of one of them at a time.
      apply, params, batches, tokens: as in `evaluate`.

    Returns:
      An `Evaluation` for each name.

    Raises:
      JQuantError: nothing to compare, no batches, or sequences shorter than two tokens.
    """
    batches = list(batches)
    if not batches or not qparams:
        raise JQuantError("evaluate: nothing to compare; give at least one batch, as in [tokens], and one tree")
    get = tokens or (lambda batch: jax.tree.leaves(batch)[0])
    found: dict[str, list[_Found]] = {name: [] for name in qparams}
    with Progress(len(batches) * (1 + len(qparams)), "evaluating", "runs") as progress:
        for batch in batches:
            text = jnp.asarray(get(batch))
            if text.shape[1] < 2:
                raise JQuantError("evaluate: a sequence needs two tokens or more: the second is the first predicted")
            reference = _logits(apply, params, batch)
            progress.step()
            for name, tree in qparams.items():
                logits = reference if tree is params else _logits(apply, tree, batch)
                found[name].append(jax.device_get(_compare(reference, logits, text)))
                progress.step(name)
    return {name: _evaluation(f, tree_nbytes(qparams[name]), tree_nbytes(params)) for name, f in found.items()}


def _logits(apply: Callable[..., Any], params: Any, batch: Any) -> jax.Array:
    args, kwargs = call_args(batch)
    return jax.block_until_ready(_run(apply, params, args, kwargs))  # the temporaries of one run at a time


@partial(jax.jit, static_argnums=0)
def _run(apply: Callable[..., Any], params: Any, args: Any, kwargs: Any) -> jax.Array:
    return quantized(apply)(params, *args, **kwargs)


# Positions at once: the logarithms of a whole batch would be several more arrays of the size of its logits.
_CHUNK = 64


@jax.jit
def _compare(reference: jax.Array, logits: jax.Array, tokens: jax.Array) -> _Found:
    """Logits `[batch, length, vocab]`, tokens `[batch, length]`. The last position predicts nothing that is known."""
    batch, length = tokens.shape
    at = jnp.arange(batch * (length - 1))
    rows, positions = at // (length - 1), at % (length - 1)
    one = lambda i: _position(reference[i[0], i[1]], logits[i[0], i[1]], tokens[i[0], i[1] + 1])
    found = jax.lax.map(one, (rows, positions), batch_size=min(_CHUNK, at.size))
    return jax.tree.map(lambda v: v.reshape(batch, length - 1), found)


def _position(reference: jax.Array, logits: jax.Array, target: jax.Array) -> _Found:
    """One position: logits `[vocab]` -> scalars."""
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (reference, logits))
    kl = jnp.sum(jnp.exp(p) * (p - q))
    same = jnp.argmax(reference) == jnp.argmax(logits)
    return _Found(kl, -q[target], -p[target], same)


def _evaluation(found: list[_Found], nbytes: int, nbytes_reference: int) -> Evaluation:
    kl, nll, nll_reference, same = (np.concatenate([v.ravel() for v in column]).astype(float) for column in zip(*found))
    means = np.concatenate([np.mean(f.kl, axis=1, dtype=float) for f in found])
    spread = means if len(means) > 1 else kl
    stderr = np.std(spread, ddof=1) / math.sqrt(len(spread)) if len(spread) > 1 else 0.0
    return Evaluation(
        float(kl.mean()), float(stderr), math.exp(nll.mean()), math.exp(nll_reference.mean()), float(same.mean()),
        nbytes, nbytes_reference,
    )  # fmt: skip
