"""Text generation: a prefill, then one jitted loop over a cache that is donated to it."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core.errors import CacheError
from jquant.kv_cache import CacheFormat
from jquant.models.cache import cache_length, init_cache
from jquant.models.config import Config
from jquant.models.decoder import Apply
from jquant.models.errors import ModelError
from jquant.models.sampling import Sampling, sample

__all__ = ["Generation", "Sampling", "State", "generate", "sample"]


class State(NamedTuple):
    """Where a generation stands; `generate(state=...)` goes on from it with the tokens that would have come.

    Attributes:
      cache: what the model has read: all tokens but `last`.
      last: int32 [batch], the newest token.
      key: a jax.random key. The draw of step n is by `fold_in(key, n)`.
      step: int32 [], how many tokens were drawn.
      ended: bool [batch], rows that have drawn a stop token.
    """

    cache: Any
    last: jax.Array
    key: jax.Array
    step: jax.Array
    ended: jax.Array


class Generation(NamedTuple):
    """What `generate` returns.

    Attributes:
      tokens: int32 [batch, n], the new tokens; a row that has ended is filled with the stop token that ended it.
      lengths: int32 [batch], new tokens of each row, without the stop token and what follows it.
      prefill_tokens_per_second: of the prompt, all rows together; compilation is not counted.
      decode_tokens_per_second: of the tokens after the first, all rows together; 0 when there are none.
      compile_seconds: tracing and compiling both programs; near 0 from the second call with the same shapes on.
      state: to go on from.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    compile_seconds: float
    state: State


def generate(
    apply: Apply,
    params: Any,
    tokens: Any = None,
    config: Config | None = None,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    stop_ids: Sequence[int] = (),
    on_token: Callable[[np.ndarray], None] | None = None,
    stream: int = 4,
    cache: Any = None,
    cache_format: str | CacheFormat = "float32",
    state: State | None = None,
) -> Generation:
    """Continues prompts. Decoding is one jitted `while_loop`, which ends when every row has.

    Args:
      apply: `model.apply`, or a wrapper with its signature (`quantized(model.apply)`).
      params: whatever `apply` takes.
      tokens: the prompt, int [length] or [batch, length]; or a list of prompts of any lengths.
      config: the model's, to make a cache; not needed when `cache` or `state` is given.
      max_tokens: new tokens at most.
      temperature, top_k, top_p: see `Sampling`; the default is greedy.
      key: a jax.random key, needed unless greedy.
      stop_ids: a row ends at any of these (`config.eos_ids`).
      on_token: called with int32 [batch] for each token, `stream` of them at a time: so many steps the loop makes
        before it comes back.
      stream: see `on_token`.
      cache: an empty cache with room for the prompt and `max_tokens`; it is donated, don't use it again.
      cache_format: of the cache that is made: "int8", "int4-g64-asym-rot", ..., see `jquant.kv_cache.parse`.
      state: go on from an earlier generation's end, instead of from `tokens`; it is donated too.

    Raises:
      ModelError: an empty prompt, a missing key or config, a cache without room, sampling settings out of range.
      CacheError: the pool of a paged cache was used up.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if sampling.temperature > 0 and key is None and state is None:
        raise ModelError("sampling with a temperature needs a key: key=jax.random.key(0)")
    if max_tokens < 1 or stream < 1:
        raise ModelError(f"max_tokens {max_tokens} and stream {stream} must be at least 1")
    stops = jnp.asarray(sorted(set(stop_ids)), jnp.int32)
    clock, new, prompt_size, emit = [time.perf_counter()], [], 0, on_token or (lambda token: None)
    if state is None:
        prompt, counts = pad_prompts(tokens)
        cache = _room(config, prompt, counts, max_tokens, cache, cache_format)
        prompt_size = prompt.size if counts is None else int(counts.sum())
        args = (params, prompt, counts, cache, jax.random.key(0) if key is None else key, stops)
        prefill = _prefill.lower(apply, sampling, *args).compile()
        like = jax.eval_shape(functools.partial(_prefill, apply, sampling), *args)
    else:
        _check_state(state, tokens, max_tokens)
        prefill, like = None, state
    left = max_tokens - (state is None)
    size = stream if on_token is not None else 1 << max(left - 1, 0).bit_length()
    loop = _decode.lower(apply, sampling, size, params, like, jnp.int32(0), stops).compile() if left else None
    clock.append(time.perf_counter())
    if prefill is not None:
        state = prefill(*args)
        new.append(np.asarray(state.last)[:, None])
        emit(new[0][:, 0])
    assert state is not None
    clock.append(time.perf_counter())
    while loop is not None and left and not np.asarray(state.ended).all():
        state, out, count = loop(params, state, jnp.int32(min(size, left)), stops)
        new.append(np.asarray(out)[:, : int(count)])
        for token in new[-1].T:
            emit(token)
        left -= new[-1].shape[1]
    clock.append(time.perf_counter())
    _check_overflow(state)
    return _generation(new, prompt_size, clock, stops, state)


def pad_prompts(tokens: Any) -> tuple[jax.Array, jax.Array | None]:
    """Prompts as int32 [batch, length], padded behind, and int32 [batch], the length of each; None where all fill it.

    Raises:
      ModelError: a prompt, or all of them, without a token.
    """
    ragged = isinstance(tokens, list | tuple) and any(np.ndim(t) for t in tokens)
    rows = [np.asarray(t, np.int32) for t in tokens] if ragged else []
    if not ragged:
        prompt = np.asarray(tokens, np.int32)
        prompt = prompt[None] if prompt.ndim == 1 else prompt
        if prompt.ndim != 2 or prompt.size == 0:
            raise ModelError(
                f"the prompt must hold at least one token, as [length] or [batch, length]; got {prompt.shape}"
            )
        return jnp.asarray(prompt), None
    if bad := [i for i, r in enumerate(rows) if r.ndim != 1 or r.size == 0]:
        raise ModelError(
            f"prompt {bad[0]} of {len(rows)} must hold at least one token (such as the model's bos_id), as [length]; "
            f"got {rows[bad[0]].shape}"
        )
    length = max(len(r) for r in rows)
    counts = None if all(len(r) == length for r in rows) else jnp.asarray([len(r) for r in rows], jnp.int32)
    return jnp.asarray(np.stack([np.pad(r, (0, length - len(r))) for r in rows])), counts


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(5,))
def _prefill(
    apply: Apply, sampling: Sampling, params: Any, tokens: Any, counts: Any, cache: Any, key: Any, stops: jax.Array
) -> State:
    # The head is computed at the last position only: of a prompt it is the largest product, and the rest is not used.
    more = {"logits_at": jnp.array([-1])} if counts is None else {"logits_at": counts[:, None] - 1, "counts": counts}
    logits, cache = apply(params, tokens, cache=cache, **more)
    token = sample(logits[:, -1], sampling, jax.random.fold_in(key, 0))
    return State(cache, token, key, jnp.int32(1), jnp.isin(token, stops))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def _decode(
    apply: Apply, sampling: Sampling, size: int, params: Any, state: State, steps: jax.Array, stops: jax.Array
) -> tuple[State, jax.Array, jax.Array]:
    """Draws `steps` tokens, `size` at most, or fewer if all rows end: the state, int32 [batch, size], how many."""

    def more(carry: tuple[State, jax.Array, jax.Array]) -> jax.Array:
        state, _, count = carry
        return (count < steps) & ~jnp.all(state.ended)

    def step(carry: tuple[State, jax.Array, jax.Array]) -> tuple[State, jax.Array, jax.Array]:
        state, out, count = carry
        reads = (~state.ended).astype(jnp.int32)  # a row that has ended takes no more room
        logits, cache = apply(
            params, state.last[:, None], cache=state.cache, logits_at=jnp.array([-1]), counts=reads
        )
        token = sample(logits[:, -1], sampling, jax.random.fold_in(state.key, state.step))
        token = jnp.where(state.ended, state.last, token)
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], count, 1)
        ended = state.ended | jnp.isin(token, stops)
        return State(cache, token, state.key, state.step + 1, ended), out, count + 1

    out = jnp.zeros((state.last.shape[0], size), jnp.int32)
    return jax.lax.while_loop(more, step, (state, out, jnp.int32(0)))


def _room(
    config: Config | None, prompt: jax.Array, counts: Any, max_tokens: int, cache: Any, fmt: str | CacheFormat
) -> Any:
    """A cache that holds the prompt and what is drawn; the last token is never fed back."""
    longest = prompt.shape[1] if counts is None else int(counts.max())
    needed = longest + max_tokens - 1
    if cache is None:
        if config is None:
            raise ModelError("generate needs the model's config, or a cache of your own")
        return init_cache(config, prompt.shape[0], needed, fmt)
    _check_room(cache, needed, f"prompt and max_tokens need {needed}")
    return cache


def _check_state(state: State, tokens: Any, max_tokens: int) -> None:
    if tokens is not None:
        raise ModelError("generate goes on from `state`; it takes no prompt beside it")
    needed = int(np.max(np.asarray(state.cache["length"]))) + max_tokens
    _check_room(state.cache, needed, f"going on for max_tokens={max_tokens} needs {needed}")


def _check_room(cache: Any, needed: int, why: str) -> None:
    if not cache["layers"]["0"].ring and cache_length(cache) < needed:
        raise ModelError(f"the cache holds {cache_length(cache)} positions; {why}")


def _check_overflow(state: State) -> None:
    """What can't be known before: pages are shared by all rows, which end when they will."""
    if (rows := np.flatnonzero(np.asarray(state.cache["layers"]["0"].overflow))).size:
        raise CacheError(f"the pool of the cache has no page left for rows {rows.tolist()}; give init_cache more pages")


def _generation(
    new: list[np.ndarray], prompt_size: int, clock: list[float], stops: jax.Array, state: State
) -> Generation:
    tokens = np.concatenate(new, axis=1) if new else np.zeros((state.last.shape[0], 0), np.int32)
    rows, lengths = _trim(tokens, np.asarray(stops))
    start, compiled, prefilled, decoded = clock
    rate = lambda count, seconds: count / seconds if count else 0.0
    drawn = (tokens.shape[1] - bool(prompt_size)) * tokens.shape[0]
    rates = rate(prompt_size, prefilled - compiled), rate(drawn, decoded - prefilled)
    return Generation(rows, lengths, *rates, compiled - start, state)


def _trim(tokens: np.ndarray, stop_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fills each row with its first stop token from there on; the lengths before it."""
    stops = np.isin(tokens, stop_ids)
    if not tokens.shape[1]:
        return tokens, np.zeros(len(tokens), np.int32)
    lengths = np.where(stops.any(axis=1), stops.argmax(axis=1), tokens.shape[1])
    first = np.take_along_axis(tokens, np.minimum(lengths, tokens.shape[1] - 1)[:, None], axis=1)
    return np.where(np.arange(tokens.shape[1]) > lengths[:, None], first, tokens), lengths.astype(np.int32)
