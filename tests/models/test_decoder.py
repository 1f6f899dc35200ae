"""The decoder equals an independent float64 one, with and without a cache."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.kv_cache.rotation import rotate
from jquant.models import (
    Config,
    ModelError,
    Rope,
    build,
    init,
    init_cache,
    key_settings,
    param_shapes,
    static_scales,
)
from jquant.models.attention import attend, causal_attention
from tests.models.cases import BASE, CONFIGS, make_params, make_tokens
from tests.models.reference import forward


def flat(tree):
    return {"/".join(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_float64_reference(name):
    config = CONFIGS[name]
    params, tokens = make_params(config), make_tokens(config, 40)  # past max_position_embeddings: dynamic rope acts
    logits = jax.jit(build(config))(params, tokens)
    assert logits.dtype == jnp.float32
    assert logits.shape == (2, 40, config.vocab_size)
    expected = forward(config, params, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"dynamic"}))
def test_decoding_with_cache_equals_full_forward(name):
    config = CONFIGS[name]
    params, tokens, apply = make_params(config), make_tokens(config, 14), jax.jit(build(config))
    full = apply(params, tokens)
    cache = init_cache(config, batch=2, length=17)
    parts = []
    for start, end in [(0, 6), (6, 7), (7, 8), (8, 14)]:
        logits, cache = apply(params, tokens[:, start:end], cache=cache)
        parts.append(logits)
    assert cache["length"].tolist() == [14, 14]
    np.testing.assert_allclose(jnp.concatenate(parts, 1), full, atol=2e-5 * float(jnp.abs(full).max()))


def test_dynamic_rope_with_cache_equals_full_forward_up_to_the_trained_length():
    config = CONFIGS["dynamic"]
    params, tokens, apply = make_params(config), make_tokens(config, 32), jax.jit(build(config))
    cache = init_cache(config, 2, 40)
    _, cache = apply(params, tokens[:, :31], cache=cache)
    last, _ = apply(params, tokens[:, 31:], cache=cache)
    np.testing.assert_allclose(last[:, 0], apply(params, tokens)[:, -1], atol=1e-4)


def test_dynamic_rope_changes_the_base_inside_jit_with_a_traced_length():
    config = CONFIGS["dynamic"]
    params, tokens, apply = make_params(config), make_tokens(config, 40), jax.jit(build(config))
    logits, _ = apply(params, tokens, cache=init_cache(config, 2, 40))
    np.testing.assert_allclose(logits, apply(params, tokens), atol=1e-4)


@pytest.mark.slow(optimized=False)
@pytest.mark.parametrize("name", ["llama", "mistral", "dynamic"])
def test_ragged_rows_equal_rows_alone(name):
    """Rows of one batch with lengths of their own, padded behind, then one token each."""
    config = CONFIGS[name]
    params, tokens, apply = make_params(config), make_tokens(config, 14, batch=3), jax.jit(build(config))
    counts = jnp.array([9, 1, 14])
    at = counts[:, None] - 1
    logits, cache = apply(params, tokens, cache=init_cache(config, 3, 16), counts=counts, logits_at=at)
    after, cache = apply(params, tokens[:, :1], cache=cache)
    assert cache["length"].tolist() == [10, 2, 15]
    for row, n in enumerate(counts.tolist()):
        one, alone = apply(params, tokens[row : row + 1, :n], cache=init_cache(config, 1, 16))
        np.testing.assert_allclose(logits[row, 0], one[0, -1], atol=1e-4)
        np.testing.assert_allclose(after[row], apply(params, tokens[row : row + 1, :1], cache=alone)[0][0], atol=1e-4)


@pytest.mark.parametrize("name", ["int8", "keys=int4-t8-asym,values=int4-g32-asym-rot,sinks=2,residual=4"])
def test_a_quantized_cache_is_near_the_float_one_and_the_same_token_by_token(name):
    config = CONFIGS["qwen2"]
    params, tokens, apply = make_params(config), make_tokens(config, 14), jax.jit(build(config))
    full = apply(params, tokens)
    cache = init_cache(config, 2, 16, name, dtype="float32")
    at_once, filled = apply(params, tokens, cache=cache)
    assert 1e-5 < np.abs(at_once - full).max() < (0.05 if name == "int8" else 1.0) * np.abs(full).max()
    for i in range(14):
        last, cache = apply(params, tokens[:, i : i + 1], cache=cache)
    np.testing.assert_allclose(last[:, 0], at_once[:, -1], atol=(0.02 if name == "int8" else 0.5) * np.abs(full).max())
    assert cache["length"].tolist() == filled["length"].tolist() == [14, 14]


def test_logits_at_selects_positions():
    config = CONFIGS["llama"]
    params, tokens, apply = make_params(config), make_tokens(config, 9), jax.jit(build(config))
    some = apply(params, tokens, logits_at=jnp.array([2, -1]))
    np.testing.assert_allclose(some, apply(params, tokens)[:, jnp.array([2, 8])], atol=1e-5)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("length", [64, 65, 256, 301])
def test_causal_blocks_equal_one_block(length, window):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, length, 4, 8))
    k, v = (jax.random.normal(key, (2, 2, length, 8)) for key in keys[1:])
    mask = jnp.tril(jnp.ones((length, length), bool))
    mask = mask if window is None else mask & ~jnp.tril(mask, -window)
    np.testing.assert_allclose(causal_attention(q, k, v, mask), attend(q, k, v, mask), atol=1e-5)


def test_a_later_token_changes_no_earlier_logit():
    config = CONFIGS["qwen2"]
    params, tokens, apply = make_params(config), make_tokens(config, 20), jax.jit(build(config))
    other = tokens.copy()
    other[:, 12] = (other[:, 12] + 1) % config.vocab_size
    before, after = apply(params, tokens), apply(params, other)
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert np.abs(before[:, 12:] - after[:, 12:]).max() > 0.01


def test_bfloat16_params_compute_in_bfloat16_and_give_float32_logits():
    config = CONFIGS["qwen3"]
    params, tokens = make_params(config), make_tokens(config, 12)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    logits = jax.jit(build(config))(half, tokens)
    expected = forward(config, half, tokens)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()
    jaxpr = str(jax.make_jaxpr(build(config))(half, tokens))
    assert "bf16[2,12,40]" in jaxpr  # the hidden units of the MLP


def test_gradients_are_finite_and_reach_every_parameter():
    config = CONFIGS["llama-tied-all-biases"]
    params, tokens, apply = make_params(config), make_tokens(config, 12), jax.jit(build(config))
    grads = flat(jax.jit(jax.grad(lambda p: (apply(p, tokens)[:, -1] ** 2).mean()))(params))
    norms = {path: float(jnp.linalg.norm(g)) for path, g in grads.items()}
    assert all(np.isfinite(n) for n in norms.values())
    # A bias of all keys alike cancels in the softmax only without rope: with it, even k/bias has a gradient.
    assert not [path for path, n in norms.items() if n == 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_init_has_the_shapes_that_flax_expects(name):
    config = CONFIGS[name]
    ours = {path: x.shape for path, x in flat(init(config, jax.random.key(0))).items()}
    assert ours == param_shapes(config)
    jax.eval_shape(
        build(config), init(config, jax.random.key(0)), make_tokens(config, 3)
    )  # Flax checks each shape it reads


def test_paths_are_the_promised_ones():
    shapes = param_shapes(dataclasses.replace(BASE, qkv_bias=True, qk_norm=True))
    assert shapes["layers/1/attention/q/kernel"] == (24, 32)
    assert shapes["layers/1/attention/k/bias"] == (16,)
    assert shapes["layers/0/attention/q_norm/scale"] == (8,)
    assert shapes["layers/0/mlp/down/kernel"] == (40, 24)
    assert {"embed/embedding", "norm/scale", "lm_head/kernel", "layers/1/mlp_norm/scale"} <= shapes.keys()
    assert "lm_head/kernel" not in param_shapes(CONFIGS["qwen2"])


def test_layers_that_are_alike_are_traced_once(monkeypatch):
    """One trace for each window, however many layers; and a new one each time, whatever held for the last."""
    from jquant.models import decoder

    traced: list[int | None] = []
    whole = decoder.MLP.__call__
    monkeypatch.setattr(decoder.MLP, "__call__", lambda self, x: traced.append(0) or whole(self, x))
    config = dataclasses.replace(BASE, num_layers=6, sliding_window=3, sliding_layers=(1, 4))
    model, tokens = build(config), jax.ShapeDtypeStruct((1, 5), jnp.int32)
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    for times in (1, 2):
        jax.eval_shape(lambda p, t: model(p, t), params, tokens)
        assert len(traced) == 2 * times


def test_init_dtype_and_seed():
    params = init(BASE, jax.random.key(0), "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    a, b, c = (init(BASE, jax.random.key(s))["lm_head"]["kernel"] for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_json(name):
    config = dataclasses.replace(CONFIGS[name], eos_ids=(3, 5), bos_id=1)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_errors():
    with pytest.raises(ModelError, match="rope type 'longrope'.*supported: default"):
        Rope(type="longrope")
    with pytest.raises(ModelError, match="original_max_position_embeddings"):
        Rope(type="yarn", factor=2.0)
    with pytest.raises(ModelError, match="freq_factors"):
        Rope(type="freq_factors")
    with pytest.raises(ModelError, match="multiple of num_kv_heads 3"):
        dataclasses.replace(BASE, num_kv_heads=3)
    with pytest.raises(ModelError, match="unexpected keyword argument 'depth'"):
        Config.from_dict({**BASE.to_dict(), "depth": 3})


@pytest.mark.slow(optimized=False)
def test_key_settings_are_the_mean_key_and_the_balance_of_keys_and_queries():
    """Against a float cache that holds the same keys; and a rotated 4-bit cache gains from them."""
    config = dataclasses.replace(CONFIGS["qwen2"], head_dim=16)
    params = make_params(config)
    params["layers"]["0"]["attention"]["k"]["bias"] += 4 * np.sin(np.arange(32, dtype=np.float32))
    batches = [make_tokens(config, n, seed=n) for n in (12, 20)]
    found = key_settings(params, config, batches, skip=2)
    apply = jax.jit(build(config))
    keys = [apply(params, t, cache=init_cache(config, 2, 20))[1]["layers"]["0"].keys.codes[0] for t in batches]
    behind = [k[:, :, 2:n].transpose(0, 2, 1, 3).reshape(-1, 2, 16) for k, n in zip(keys, (12, 20))]
    mean = np.concatenate(behind).mean(0)
    np.testing.assert_allclose(found["center"]["0"], mean, atol=1e-4)
    assert found["gain"]["1"].shape == (2, 16) and (found["gain"]["1"] > 0).all()
    tokens, name = make_tokens(config, 14), "keys=int4-g16-asym-rot,values=float32"
    full = apply(params, tokens)
    cache = lambda **more: init_cache(config, 2, 16, name, **more)
    error = lambda **more: float(jnp.abs(apply(params, tokens, cache=cache(**more))[0] - full).mean())
    assert error(**found) < error()
    with pytest.raises(ModelError, match="none behind the first 4"):
        key_settings(params, config, [tokens[:, :4]])


def test_a_decode_step_for_a_gpu_has_one_kernel_for_the_cache_of_each_layer():
    """And none on a CPU; a prompt, of more queries than the kernel takes, has none either."""
    config = CONFIGS["llama"]
    params, tokens, apply = make_params(config), make_tokens(config, 40), build(config)
    cache = init_cache(config, 2, 64, "int8")

    def kernels(tokens, platform="cuda"):
        step = jax.jit(lambda params, tokens, cache: apply(params, tokens, cache=cache))
        text = step.trace(params, tokens, cache).lower(lowering_platforms=(platform,)).as_text()
        bodies = dict(re.findall(r"func\.func \w+ @(\w+)(.*?)\n  }\n", text, re.DOTALL))

        def run(name):  # layers that are alike are one function, called for each
            calls = re.findall(r"call @(\w+)\(", bodies[name])
            return bodies[name].count("__gpu$xla.gpu.triton") + sum(run(c) for c in calls if c in bodies)

        return run("main")

    assert kernels(tokens[:, :1]) == config.num_layers
    assert kernels(tokens[:, :1], "cpu") == 0
    assert kernels(tokens) == 0


@pytest.mark.slow(optimized=False)
def test_key_settings_of_quantized_parameters_are_those_of_their_values():
    config = dataclasses.replace(CONFIGS["llama"], head_dim=16)
    params, batches = make_params(config), [make_tokens(config, 12)]
    q = jq.quantize(build(config), params, jq.Recipe({"*embed*": None, "*": jq.INT8}), jq.rtn(), batches)
    found, want = (key_settings(p, config, batches) for p in (q, jq.dequantize(q)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, want)


@pytest.mark.slow(optimized=False)
def test_static_scales_give_the_largest_number_of_a_text_the_largest_code():
    """The keys and values of a float cache, as they are encoded; a format without such scales has none."""
    config = dataclasses.replace(CONFIGS["llama"], head_dim=16)
    params, tokens = make_params(config), make_tokens(config, 14)
    ease = key_settings(params, config, [tokens], skip=2)
    name = "keys=fp8_e4m3-tensor-rot,values=nvfp4,sinks=2"
    found = static_scales(params, config, [tokens[:, :9], tokens], name, **ease)
    layer = jax.jit(build(config))(params, tokens, cache=init_cache(config, 2, 14))[1]["layers"]["1"]
    k, v = (np.asarray(s.codes[0])[:, :, 2:] for s in (layer.keys, layer.values))
    k = rotate(jnp.asarray((k - ease["center"]["1"][:, None]) / ease["gain"]["1"][:, None]), 1, 0)
    np.testing.assert_allclose(found["key_scale"]["1"] * 448, np.abs(k).max((0, 2, 3)), rtol=1e-3)
    np.testing.assert_allclose(found["value_scale"]["1"] * 448 * 6, np.abs(v).max((0, 2, 3)), rtol=1e-6)
    cache = init_cache(config, 2, 14, name, **found, **ease)["layers"]["1"]
    np.testing.assert_array_equal(cache.keys.static, found["key_scale"]["1"])
    assert static_scales(params, config, [tokens], "keys=int8,values=fp8_e4m3-tensor").keys() == {"value_scale"}
    assert static_scales(params, config, [tokens], "int8") == {}
    with pytest.raises(ModelError, match="none behind 2 sinks"):
        static_scales(params, config, [tokens[:, :2]], name)
    with pytest.raises(ModelError, match="at least one batch"):
        static_scales(params, config, [], name)


@pytest.mark.parametrize("name", ["qwen2", "llama-one-kv-head", "yarn"])
def test_static_scales_are_those_of_calibrate(name):
    """Keys behind rope, over queries in blocks (70 tokens) too. Layers behind the first see what attention with and
    without a cache gave, so equal only up to its rounding."""
    config, fmt = CONFIGS[name], "keys=fp8_e4m3-tensor-rot,values=nvfp4,sinks=2"
    params, batches = make_params(config), [make_tokens(config, 70)]
    stats = jq.calibrate(build(config), params, batches, paths=[], attention=fmt)
    assert list(stats) == [f"attention[{i}]" for i in range(config.num_layers)]
    found, want = jq.kv_cache.static_scales(stats, fmt), static_scales(params, config, batches, fmt)
    for which in ("key_scale", "value_scale"):
        assert found[which]["1"].shape == (config.num_kv_heads,)
        np.testing.assert_array_max_ulp(np.asarray(found[which]["0"]), np.asarray(want[which]["0"]), 2)
        np.testing.assert_allclose(found[which]["1"], want[which]["1"], rtol=1e-5)
    init_cache(config, 2, 14, fmt, **found)


def test_the_rotation_of_values_can_be_merged_into_the_weights():
    """`rotate(stream=False)` turns what the cache gets: values round as in a -rot format."""
    config = dataclasses.replace(CONFIGS["llama"], head_dim=16)
    params, tokens = make_params(config), make_tokens(config, 14)
    stands_out = lambda count: np.where(np.arange(count) % 16 == 3, np.float32(30), np.float32(1))
    for layer in params["layers"].values():  # a channel of every head
        attention = layer["attention"]
        attention["v"]["kernel"] *= stands_out(32)
        attention["o"]["kernel"] /= stands_out(64)[:, None]
    apply, nothing = jax.jit(build(config)), jq.Recipe({"*": None})
    folded = jq.quantize(build(config), params, nothing, jq.rotate(stream=False), [tokens])
    full = apply(params, tokens)
    np.testing.assert_allclose(apply(folded, tokens), full, atol=2e-4)
    error = lambda p, name: float(jnp.abs(apply(p, tokens, cache=init_cache(config, 2, 14, name))[0] - full).mean())
    plain, turned = "keys=float32,values=int4-g16-asym", "keys=float32,values=int4-g16-asym-rot"
    assert error(folded, plain) < 0.75 * error(params, plain)
    assert 0.75 < error(folded, plain) / error(params, turned) < 1.33
