"""Text generation: one prefill, then a jitted step for each token over a cache that is donated to it."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.models.cache import cache_length, init_cache
from jquant.models.config import Config
from jquant.models.decoder import Apply
from jquant.models.errors import ModelError


class Generation(NamedTuple):
    """What `generate` returns.

    Attributes:
      tokens: int32 [batch, n], the new tokens; a row that has ended is filled with the stop token that ended it.
      lengths: int32 [batch], new tokens of each row, without the stop token and what follows it.
      prefill_tokens_per_second: of the prompt, all rows together; compilation is not counted.
      decode_tokens_per_second: of the tokens after the first, all rows together; 0 when there are none.
      compile_seconds: tracing and compiling both programs; near 0 from the second call with the same shapes on.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    compile_seconds: float


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


def generate(
    apply: Apply,
    params: Any,
    tokens: Any,
    config: Config | None = None,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    stop_ids: Sequence[int] = (),
    on_token: Callable[[np.ndarray], None] | None = None,
    cache: Any = None,
    cache_dtype: Any = "float32",
) -> Generation:
    """Continues a prompt.

    Args:
      apply: `model.apply`, or a wrapper with its signature (`quantized(model.apply)`).
      params: whatever `apply` takes.
      tokens: the prompt, int [length] or [batch, length]; rows of one length.
      config: the model's, to make a cache; not needed when `cache` is given.
      max_tokens: new tokens at most.
      temperature, top_k, top_p: see `Sampling`; the default is greedy.
      key: a jax.random key, needed unless greedy.
      stop_ids: a row ends at any of these (`config.eos_ids`).
      on_token: called with int32 [batch] as each token is ready.
      cache: an empty cache with room for the prompt and `max_tokens`; it is donated, don't use it again.

    Raises:
      ModelError: an empty prompt, a missing key or config, a cache without room, sampling settings out of range.
    """
    sampling = Sampling(temperature, top_k, top_p)
    prompt, cache = _check(tokens, config, max_tokens, sampling, key, cache, cache_dtype)
    keys = jax.random.split(jax.random.key(0) if key is None else key, max_tokens)
    start = time.perf_counter()
    prefill = _compiled(apply, sampling, params, prompt, cache, keys[0])
    one = jax.ShapeDtypeStruct((prompt.shape[0], 1), jnp.int32)
    step = _compiled(apply, sampling, params, one, cache, keys[0]) if max_tokens > 1 else None
    compiled = time.perf_counter()
    last, cache = prefill(params, prompt, cache, keys[0])
    new = [np.asarray(last)]
    prefilled = time.perf_counter()
    ended = _report(new[-1], np.zeros(len(prompt), bool), stop_ids, on_token)
    while step is not None and len(new) < max_tokens and not ended.all():
        last, cache = step(params, last[:, None], cache, keys[len(new)])
        new.append(np.asarray(last))
        ended = _report(new[-1], ended, stop_ids, on_token)
    decoded = time.perf_counter()
    rows, lengths = _trim(np.stack(new, axis=1), stop_ids)
    rate = lambda count, seconds: count / seconds if count else 0.0
    prefill_rate = rate(prompt.size, prefilled - compiled)
    decode_rate = rate((len(new) - 1) * len(prompt), decoded - prefilled)
    return Generation(rows, lengths, prefill_rate, decode_rate, compiled - start)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def _step(apply: Apply, sampling: Sampling, params: Any, tokens: jax.Array, cache: Any, key: jax.Array) -> Any:
    # The head is computed at the last position only: of a prompt it is the largest product, and the rest is not used.
    logits, cache = apply(params, tokens, cache=cache, logits_at=jnp.array([-1]))
    return sample(logits[:, -1], sampling, key), cache


def _compiled(apply: Apply, sampling: Sampling, *args: Any) -> Any:
    return _step.lower(apply, sampling, *args).compile()


def _check(
    tokens: Any, config: Config | None, max_tokens: int, sampling: Sampling, key: Any, cache: Any, cache_dtype: Any
) -> tuple[jax.Array, Any]:
    prompt = jnp.asarray(tokens, jnp.int32)
    prompt = prompt[None] if prompt.ndim == 1 else prompt
    if prompt.ndim != 2 or prompt.size == 0:
        raise ModelError(f"the prompt must hold at least one token, as [length] or [batch, length]; got {prompt.shape}")
    if max_tokens < 1:
        raise ModelError(f"max_tokens {max_tokens} must be at least 1")
    if sampling.temperature > 0 and key is None:
        raise ModelError("sampling with a temperature needs a key: key=jax.random.key(0)")
    needed = prompt.shape[1] + max_tokens - 1  # the last token is never fed back
    if cache is None:
        if config is None:
            raise ModelError("generate needs the model's config, or a cache of your own")
        return prompt, init_cache(config, prompt.shape[0], needed, cache_dtype)
    if cache_length(cache) < needed:
        raise ModelError(f"the cache holds {cache_length(cache)} positions; prompt and max_tokens need {needed}")
    return prompt, cache


def _report(token: np.ndarray, ended: np.ndarray, stop_ids: Sequence[int], on_token: Any) -> np.ndarray:
    if on_token is not None:
        on_token(token)
    return ended | np.isin(token, list(stop_ids))


def _trim(tokens: np.ndarray, stop_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Fills each row with its first stop token from there on; the lengths before it."""
    stops = np.isin(tokens, list(stop_ids))
    lengths = np.where(stops.any(axis=1), stops.argmax(axis=1), tokens.shape[1])
    first = np.take_along_axis(tokens, np.minimum(lengths, tokens.shape[1] - 1)[:, None], axis=1)
    return np.where(np.arange(tokens.shape[1]) > lengths[:, None], first, tokens), lengths.astype(np.int32)
