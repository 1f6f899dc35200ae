"""Generation equals a loop over full forward passes, stops where asked, and draws from the right set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.models import ModelError, build, generate, init_cache
from jquant.models.generate import Sampling, sample
from tests.models.cases import CONFIGS, make_params, make_tokens

CONFIG = CONFIGS["qwen3"]
APPLY = build(CONFIG)
PARAMS = make_params(CONFIG)
PROMPT = make_tokens(CONFIG, 6)


def greedy(prompt, count):
    tokens = np.asarray(prompt)
    for _ in range(count):
        padded = np.pad(tokens, ((0, 0), (0, 40 - tokens.shape[1])))  # one shape: one compilation
        last = FULL(PARAMS, padded)[:, tokens.shape[1] - 1]
        tokens = np.concatenate([tokens, np.asarray(last.argmax(-1), np.int32)[:, None]], axis=1)
    return tokens[:, np.asarray(prompt).shape[1] :]


FULL = jax.jit(APPLY)


def test_greedy_equals_full_forward_passes():
    result = generate(APPLY, PARAMS, PROMPT, CONFIG, max_tokens=12)
    np.testing.assert_array_equal(result.tokens, greedy(PROMPT, 12))
    assert result.tokens.dtype == np.int32 and list(result.lengths) == [12, 12]
    assert result.prefill_tokens_per_second > 0 and result.decode_tokens_per_second > 0
    assert len({*result.tokens.ravel()}) > 2  # a model that repeats one token would hide a stuck cache


def test_stops_at_a_stop_token_and_fills_the_row():
    free = greedy(PROMPT, 12)
    stop = int(free[0, 4])
    first = int(np.flatnonzero(free[0] == stop)[0])
    one = generate(APPLY, PARAMS, PROMPT[0], CONFIG, max_tokens=12, stop_ids=[stop, 10_000])
    np.testing.assert_array_equal(one.tokens[0], free[0, : first + 1])
    assert one.lengths[0] == first
    both = generate(APPLY, PARAMS, PROMPT, CONFIG, max_tokens=12, stop_ids=[stop])
    assert (both.tokens[0, first:] == stop).all()
    count = both.lengths[1]
    np.testing.assert_array_equal(both.tokens[1, :count], free[1, :count])


def test_streams_each_token_as_it_comes():
    seen = []
    result = generate(APPLY, PARAMS, PROMPT, CONFIG, max_tokens=5, on_token=seen.append)
    np.testing.assert_array_equal(np.stack(seen, 1), result.tokens)


def test_wrapped_apply_and_params_with_other_nodes():
    """As `quantized(apply)` does: other leaves than the model's, the same arguments otherwise."""
    half = jax.tree.map(lambda x: (x / 2, x / 2), PARAMS)
    is_pair = lambda x: isinstance(x, tuple)

    def wrapped(params, *args, **kwargs):
        return APPLY(jax.tree.map(sum, params, is_leaf=is_pair), *args, **kwargs)

    result = generate(wrapped, half, PROMPT, cache=init_cache(CONFIG, 2, 20), max_tokens=8)
    np.testing.assert_array_equal(result.tokens, greedy(PROMPT, 8))


def test_the_second_call_compiles_nothing():
    first = generate(APPLY, PARAMS, PROMPT[:, :5], CONFIG, max_tokens=3)
    second = generate(APPLY, PARAMS, PROMPT[:, :5], CONFIG, max_tokens=3)
    assert second.compile_seconds < first.compile_seconds / 5


def test_same_key_same_text_other_key_other_text():
    draw = lambda seed: (
        generate(APPLY, PARAMS, PROMPT, CONFIG, max_tokens=10, temperature=2.0, key=jax.random.key(seed)).tokens
    )
    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()


LOGITS = jnp.log(jnp.array([[0.05, 0.4, 0.3, 0.15, 0.1]]))


def draws(sampling, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    tokens = jax.jit(jax.vmap(lambda k: sample(LOGITS, sampling, k)[0]))(keys)
    return np.bincount(np.asarray(tokens), minlength=5) / count


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(1.0), [0.05, 0.4, 0.3, 0.15, 0.1]),
        (Sampling(0.5), np.array([0.05, 0.4, 0.3, 0.15, 0.1]) ** 2 / 0.285),
        (Sampling(1.0, top_k=2), [0, 4 / 7, 3 / 7, 0, 0]),
        (Sampling(1.0, top_k=99), [0.05, 0.4, 0.3, 0.15, 0.1]),
        (Sampling(1.0, top_p=0.6), [0, 4 / 7, 3 / 7, 0, 0]),
        (Sampling(1.0, top_p=0.72), [0, 0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0]),
        (Sampling(1.0, top_p=0.01), [0, 1, 0, 0, 0]),
        (Sampling(1.0, top_k=3, top_p=0.8), [0, 4 / 7, 3 / 7, 0, 0]),  # of what top_k left, 14/17 >= 0.8
        (Sampling(), [0, 1, 0, 0, 0]),
    ],
)
def test_sampling_follows_the_distribution(sampling, expected):
    found = draws(sampling)
    np.testing.assert_allclose(found, expected, atol=0.03)
    np.testing.assert_array_equal(found == 0, np.asarray(expected) == 0)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens=np.zeros((1, 0), int)), "at least one token"),
        (dict(max_tokens=0), "max_tokens 0"),
        (dict(temperature=1.0), "needs a key"),
        (dict(temperature=-1.0), "negative"),
        (dict(top_k=0), "top_k 0"),
        (dict(top_p=1.5), "top_p 1.5"),
        (dict(config=None), "config, or a cache"),
        (dict(cache=init_cache(CONFIG, 2, 9), max_tokens=5), "holds 9 positions; prompt and max_tokens need 10"),
    ],
)
def test_errors(change, message):
    arguments = {"tokens": PROMPT, "config": CONFIG, "max_tokens": 2, **change}
    with pytest.raises(ModelError, match=message):
        generate(APPLY, PARAMS, **arguments)


def test_a_cache_with_just_enough_room_is_enough():
    result = generate(APPLY, PARAMS, PROMPT, cache=init_cache(CONFIG, 2, 10), max_tokens=5)
    np.testing.assert_array_equal(result.tokens, greedy(PROMPT, 5))
