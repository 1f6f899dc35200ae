"""`evaluate`: what quantization cost, against the float model."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.core.errors import JQuantError
from jquant.core.qtensor import tree_nbytes
from jquant.progress import Progress
from jquant.trace.execute import quantized
from jquant.trace.function import call_args


class Evaluation(NamedTuple):
    """What `evaluate` measures. Per predicted token: positions 1 to the last of every sequence.

    Attributes:
      kl: mean of KL(reference || quantized) over the full vocabulary, nats per token.
      kl_stderr: its standard error, from the spread of the sequences' means (of the tokens, where there is one sequence).
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


class _Sums(NamedTuple):
    kl: jax.Array  # [batch]: sum over positions
    kl_squared: jax.Array  # [batch]
    nll: jax.Array
    nll_reference: jax.Array
    same: jax.Array


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
    logits, sums, length = _logits(apply), [], 0
    get = tokens or (lambda batch: jax.tree.leaves(batch)[0])
    batches = list(batches)
    with Progress(len(batches), "evaluating", "batches") as progress:
        for batch in batches:
            text = get(batch)
            length = text.shape[1] - 1
            if length < 1:
                raise JQuantError("evaluate: a sequence needs two tokens or more, the second is the first one predicted")
            args, kwargs = call_args(batch)
            reference = _log_probabilities(logits(params, *args, **kwargs))
            sums.append((length, jax.device_get(_compare(reference, logits(qparams, *args, **kwargs), text))))
            progress.step()
    if not sums:
        raise JQuantError("evaluate: there are no batches; give at least one, as in [tokens]")
    return _evaluation(sums, tree_nbytes(qparams), tree_nbytes(params))


def _logits(apply: Callable[..., Any]) -> Callable[..., jax.Array]:
    # The last position predicts nothing that the text could tell.
    return jax.jit(lambda p, *args, **kwargs: quantized(apply)(p, *args, **kwargs)[:, :-1].astype(jnp.float32))


_log_probabilities = jax.jit(lambda logits: jax.nn.log_softmax(logits, axis=-1), donate_argnums=0)


@jax.jit
def _compare(reference: jax.Array, logits: jax.Array, tokens: jax.Array) -> _Sums:
    other = jax.nn.log_softmax(logits, axis=-1)
    target = tokens[:, 1:, None]
    kl = jnp.sum(jnp.exp(reference) * (reference - other), axis=-1)
    same = jnp.argmax(reference, axis=-1) == jnp.argmax(other, axis=-1)

    def nll(logp: jax.Array) -> jax.Array:
        return -jnp.sum(jnp.take_along_axis(logp, target, axis=-1), axis=(1, 2))

    return _Sums(jnp.sum(kl, axis=1), jnp.sum(kl**2, axis=1), nll(other), nll(reference), jnp.sum(same, axis=1))


def _evaluation(sums: list[tuple[int, _Sums]], nbytes: int, nbytes_reference: int) -> Evaluation:
    count = sum(length * s.kl.shape[0] for length, s in sums)
    total = _Sums(*(sum(float(v.sum()) for v in column) for column in zip(*(s for _, s in sums), strict=True)))  # type: ignore[arg-type]
    kl = total.kl / count
    means = [float(v) / length for length, s in sums for v in s.kl]
    if len(means) > 1:
        spread = sum((m - sum(means) / len(means)) ** 2 for m in means) / (len(means) - 1) / len(means)
    else:
        spread = max(total.kl_squared / count - kl**2, 0.0) / count
    return Evaluation(
        kl, math.sqrt(spread), math.exp(total.nll / count), math.exp(total.nll_reference / count), total.same / count,
        nbytes, nbytes_reference,
    )  # fmt: skip
