"""What is found in the jaxpr is what the mathematics of each model says, counted by hand."""

import collections

import jax
import numpy as np
import pytest

import jquant as jq
from tests.fold.models import BANK, MODELS
from tests.models.cases import CONFIGS, make_params, make_tokens


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_scales(model):
    folds = jq.find_folds(model.apply, model.params, *model.args)
    found = collections.Counter(frozenset(f.readers) for f in folds.of("scale"))
    assert found == collections.Counter(model.scales)
    assert {f.readers[0] for f in folds.of("none")} == model.without


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_rotations(model):
    folds = jq.find_folds(model.apply, model.params, *model.args)
    assert sorted((f.channels for f in folds.of("rotation")), reverse=True) == list(model.blocks)


@pytest.mark.parametrize("name", ["llama", "llama-tied-all-biases", "llama-one-kv-head", "qwen2", "qwen3", "mistral"])
def test_a_decoder_has_all_of_them(name):
    config = CONFIGS[name]
    params, tokens = make_params(config), make_tokens(config, 6)
    from jquant.models import build

    folds = jq.find_folds(build(config), params, tokens)
    readers = collections.Counter(frozenset(p.removeprefix("layers/") for p in f.readers) for f in folds.of("scale"))
    want = {frozenset({"embed/embedding" if config.tied else "lm_head/kernel"})}
    for i in range(config.num_layers):
        for group in (
            ("attention/q", "attention/k", "attention/v"),
            ("attention/o",),
            ("mlp/gate", "mlp/up"),
            ("mlp/down",),
        ):
            want.add(frozenset(f"{i}/{n}/kernel" for n in group))
    assert readers == collections.Counter(want) and folds.of("none") == []
    by_size = collections.Counter(f.channels for f in folds.of("rotation"))
    assert by_size == {config.hidden_size: 1, config.head_dim: config.num_layers * config.num_kv_heads}
    [stream] = [f for f in folds.of("rotation") if f.note == "residual stream"]
    assert stream.channels == config.hidden_size
    values = [f.channels for f in folds.of("scale") if f.readers[0].endswith("o/kernel")]
    assert values == [config.num_kv_heads * config.head_dim] * config.num_layers  # one scale for the heads of a group


def test_copies_and_stacks_are_looked_through():
    """Key heads copied by `tile`, queries, keys and values apart by `unstack`, a rotation of pairs by `stack`."""
    groups, size, width = 2, 4, 6
    rng = np.random.default_rng(0)
    p = {name: rng.normal(size=s).astype(np.float32) for name, s in {
        "embed": (16, width), "gain": (width,), "qkv": (width, 3 * groups * size), "o": (2 * groups * size, width),
    }.items()}  # fmt: skip

    def turned(x):  # of neighbouring channels, as rotary embeddings do
        a, b = jax.numpy.unstack(x.reshape(*x.shape[:-1], size // 2, 2), axis=-1)
        return jax.numpy.stack([-b, a], axis=-1).reshape(x.shape)

    def apply(p, tokens):
        x = p["embed"][tokens]
        y = x / jax.numpy.sqrt((x * x).mean(-1, keepdims=True)) * p["gain"]
        parts = (y @ p["qkv"]).reshape(len(tokens), 3, groups, 1, size)
        q, k, v = (jax.numpy.tile(a, (1, 1, 2, 1)) for a in jax.numpy.unstack(parts, axis=1))
        q, k = q + turned(q), k + turned(k)
        weights = jax.nn.softmax(jax.numpy.einsum("tgrk,sgrk->grts", q, k))
        mixed = jax.numpy.einsum("grts,sgrk->tgrk", weights, v)
        return jax.numpy.tanh(x + mixed.reshape(len(tokens), -1) @ p["o"]) @ np.ones((width, 2), np.float32)

    folds = jq.find_folds(apply, p, np.arange(5))
    readers = {f.readers: f.channels for f in folds.of("scale")}
    assert readers == {("qkv",): width, ("o",): groups * size}  # the copies of a head share a scale
    assert [f.channels for f in folds.of("rotation")] == [size] * groups


def test_shapes_are_enough():
    model = BANK["fused"]
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (model.params, model.args))
    folds = jq.find_folds(model.apply, shapes[0], *shapes[1])
    assert list(folds) == list(jq.find_folds(model.apply, model.params, *model.args))
    assert "rotation" in repr(folds) and len(repr(folds).splitlines()) == len(folds) + 2


def test_whoever_else_reads_a_value_stops_it():
    p = {"gain": np.full(8, 2.0, np.float32), "w": np.ones((8, 4), np.float32)}
    norm = lambda p, x: x / (1 + abs(x).max(-1, keepdims=True)) * p["gain"]
    assert len(jq.find_folds(lambda p, x: norm(p, x) @ p["w"], p, np.ones((2, 8), np.float32)).of("scale")) == 1
    for also in (lambda y: y, lambda y: np.float32(2) * y[..., :3], lambda y: jax.numpy.tanh(y)):
        apply = lambda p, x, also=also: (norm(p, x) @ p["w"], also(norm(p, x)))
        folds = jq.find_folds(apply, p, np.ones((2, 8), np.float32))
        assert [f.kind for f in folds] in (["none"], ["scale"]) and sum(f.channels for f in folds) in (0, 5)


def test_a_weight_that_two_layers_share_has_the_scale_of_both():
    p = {"a": np.ones((8, 8), np.float32)}
    twice = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["a"])
    assert [f.kind for f in jq.find_folds(twice, p, np.ones((2, 8), np.float32))] == ["none"]
