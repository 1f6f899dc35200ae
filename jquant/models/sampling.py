"""How the next token is drawn from the logits."""

import dataclasses

import jax
import jax.numpy as jnp

from jquant.models.errors import ModelError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: the logits divided by `temperature` (0: the largest wins), cut down to the `top_k`
    largest and then to the fewest that hold the share `top_p` of the probability (Holtzman et al. 2020)."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ModelError(f"temperature {self.temperature} is negative; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ModelError(f"top_k {self.top_k} keeps no token; give 1 or more, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ModelError(f"top_p {self.top_p} is not in (0, 1]")


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """float32 logits [batch, vocab] -> int32 tokens [batch]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        smallest = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = jnp.where(logits < _nucleus(logits, sampling.top_p), -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """The smallest logit [batch, 1] kept: a token stays while those above it hold less than `top_p`."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    shares = jax.nn.softmax(ordered)
    above = jnp.cumsum(shares, axis=-1) - shares
    return jnp.where(above < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
