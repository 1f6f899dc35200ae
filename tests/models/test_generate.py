"""Generation equals a loop over full forward passes, stops where asked, and draws from the right set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.core.errors import CacheError
from jquant.models import (
    ModelError,
    build,
    generate,
    init_cache,
    key_settings,
    load_state,
    save_state,
    static_scales,
)
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


@pytest.mark.slow(optimized=False)
def test_streaming_in_any_portion_gives_the_same_tokens():
    whole = generate(APPLY, PARAMS, PROMPT, CONFIG, max_tokens=9)
    for stream in (1, 5, 20):
        seen = []
        part = generate(APPLY, PARAMS, PROMPT, CONFIG, max_tokens=9, on_token=seen.append, stream=stream)
        np.testing.assert_array_equal(part.tokens, whole.tokens)
        np.testing.assert_array_equal(np.stack(seen, 1), whole.tokens)


def test_prompts_of_any_length_are_continued_as_if_alone():
    prompts = [PROMPT[0, :1], PROMPT[1], PROMPT[0, :4]]
    result = generate(APPLY, PARAMS, prompts, CONFIG, max_tokens=7)
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(result.tokens[row], greedy(prompt[None], 7)[0])


def test_the_loop_ends_when_every_row_has():
    free = greedy(PROMPT, 12)
    stops = [int(free[0, 3]), int(free[1, 5])]
    result = generate(APPLY, PARAMS, PROMPT, CONFIG, max_tokens=12, stop_ids=stops)
    assert result.tokens.shape[1] <= 6 and result.state.ended.all()
    # A row that has ended takes no more room: its length is that of what was fed before.
    assert result.state.cache["length"].tolist() == [6 + n for n in result.lengths.tolist()]


@pytest.mark.slow(optimized=False)
@pytest.mark.parametrize("name", ["float32", "int8", "keys=int4-t8-asym,values=lloyd4-rot,sinks=2,residual=4"])
def test_a_saved_state_goes_on_with_the_same_tokens(name, tmp_path):
    draw = dict(temperature=1.5, key=jax.random.key(3))
    cache = lambda: init_cache(CONFIG, 2, 24, name)
    whole = generate(APPLY, PARAMS, PROMPT, cache=cache(), max_tokens=12, **draw)
    first = generate(APPLY, PARAMS, PROMPT, cache=cache(), max_tokens=5, **draw)
    save_state(tmp_path / "state", first.state)
    state = load_state(tmp_path / "state")
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), first.state, state)
    assert all(jax.tree.leaves(same))
    rest = generate(APPLY, PARAMS, state=state, max_tokens=7, temperature=1.5)
    np.testing.assert_array_equal(np.concatenate([first.tokens, rest.tokens], 1), whole.tokens)


@pytest.mark.slow(optimized=False)
def test_a_saved_state_keeps_what_the_cache_was_fitted_to(tmp_path):
    name = "keys=int4-g8-asym-rot,values=fp8_e4m3-tensor,sinks=1"
    settings = key_settings(PARAMS, CONFIG, [PROMPT], skip=1) | static_scales(PARAMS, CONFIG, [PROMPT], name)
    cache = lambda: init_cache(CONFIG, 2, 24, name, **settings)
    whole = generate(APPLY, PARAMS, PROMPT, cache=cache(), max_tokens=8)
    first = generate(APPLY, PARAMS, PROMPT, cache=cache(), max_tokens=3)
    save_state(tmp_path / "state", first.state)
    rest = generate(APPLY, PARAMS, state=load_state(tmp_path / "state"), max_tokens=5)
    np.testing.assert_array_equal(np.concatenate([first.tokens, rest.tokens], 1), whole.tokens)


@pytest.mark.slow(optimized=False)
def test_quantized_weights_and_the_state_are_restored_together(tmp_path):
    recipe = jq.Recipe({"*embed*": None, "*lm_head*": None, "*": jq.INT4_G32})
    q, apply = jq.quantize(APPLY, PARAMS, recipe, jq.rtn(), [PROMPT]), jq.quantized(APPLY)
    cache, draw = lambda: init_cache(CONFIG, 2, 24, "int4-g8-asym-rot"), dict(temperature=1.2, key=jax.random.key(5))
    whole = generate(apply, q, PROMPT, cache=cache(), max_tokens=10, **draw)
    first = generate(apply, q, PROMPT, cache=cache(), max_tokens=4, **draw)
    jq.save(tmp_path / "weights", q)
    save_state(tmp_path / "state", first.state)
    q, state = jq.load(tmp_path / "weights"), load_state(tmp_path / "state")
    rest = generate(apply, q, state=state, max_tokens=6, temperature=1.2)
    np.testing.assert_array_equal(np.concatenate([first.tokens, rest.tokens], 1), whole.tokens)


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_a_ring_of_the_windows_length_goes_on_for_ever(name):
    """Mistral's window of 5: 26 tokens pass through 10 positions, and none is another than with room for all."""
    config = CONFIGS["mistral"]
    apply, params, prompt = build(config), make_params(config), make_tokens(config, 6)
    ring = init_cache(config, 2, 10, name, ring=True)
    assert {config.window(i) for i in range(config.num_layers)} == {5}
    whole = generate(apply, params, prompt, config, max_tokens=20, cache_format=name)
    np.testing.assert_array_equal(generate(apply, params, prompt, cache=ring, max_tokens=20).tokens, whole.tokens)


def test_a_pool_shared_by_rows_and_one_that_is_too_small():
    whole = generate(APPLY, PARAMS, PROMPT, CONFIG, max_tokens=9)
    paged = lambda pages: init_cache(CONFIG, 2, 16, pages=pages, page_size=4)
    np.testing.assert_array_equal(generate(APPLY, PARAMS, PROMPT, cache=paged(8), max_tokens=9).tokens, whole.tokens)
    with pytest.raises(CacheError, match="no page left for rows"):
        generate(APPLY, PARAMS, PROMPT, cache=paged(5), max_tokens=9)


@pytest.mark.slow(optimized=False)
def test_weights_and_cache_are_quantized_independently():
    recipe = jq.Recipe({"*embed*": None, "*lm_head*": None, "*": jq.INT8})
    q = jq.quantize(APPLY, PARAMS, recipe, jq.rtn(), [PROMPT])
    done = generate(jq.quantized(APPLY), q, PROMPT, CONFIG, max_tokens=4, cache_format="int8")
    plain = generate(APPLY, jq.dequantize(q), PROMPT, CONFIG, max_tokens=4, cache_format="int8")
    np.testing.assert_array_equal(done.tokens, plain.tokens)


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
        (dict(tokens=[[1, 2], []]), "prompt 1 of 2 must hold at least one token"),
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
