"""The examples of a model of one's own: what they print is right, whatever part of the text a step reads."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant import kv_cache

EXAMPLES = Path(__file__).parent.parent / "examples"
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 9)), jnp.int32)
SMALL = dict(WIDTH=32, HEADS=4, KV_HEADS=2, LAYERS=2, LENGTH=12)


def imported(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(monkeypatch):
    """Imports one by its name, and makes its model small."""

    def load(name: str) -> ModuleType:
        module = imported(name)
        for field, value in SMALL.items():
            monkeypatch.setattr(module, field, value)
        return module

    return load


def plain_attention(q, k, v):
    """What the three lines replace: attention over whole arrays of floats."""
    return nn.dot_product_attention(q, *(jnp.repeat(a, 2, axis=2) for a in (k, v)), mask=nn.make_causal_mask(TOKENS))


def test_the_linen_example_computes_what_the_model_without_a_cache_does(example, monkeypatch):
    module = example("kv_cache")
    exact, whole = module.run("float32", TOKENS)
    near, small = module.run("int8", TOKENS)
    kept = {}
    monkeypatch.setattr(module.kv_cache, "append", lambda cache, k, v: kept.update(k=k, v=v) or cache)
    monkeypatch.setattr(module.kv_cache, "attend", lambda q, cache: plain_attention(q, kept["k"], kept["v"]))
    params, cache = module.start(module.Model("float32"), 2)
    want, _ = module.Model("float32").apply({"params": params, "cache": cache}, TOKENS, mutable=["cache"])
    np.testing.assert_allclose(exact, want.swapaxes(0, 1), atol=1e-4)
    assert 0 < np.abs(near - exact).max() < 0.1 * np.abs(exact).max()
    assert small < 0.4 * whole  # of 8 channels a head, each with a scale


def test_the_nnx_example_computes_what_the_model_without_a_cache_does(example, monkeypatch):
    module = example("kv_cache_nnx")
    exact, floats, whole = module.run("float32", None, TOKENS)
    near, codes, small = module.run("int8", "int8", TOKENS)
    kept = {}
    monkeypatch.setattr(module.kv_cache, "append", lambda cache, k, v: kept.update(k=k, v=v) or cache)
    monkeypatch.setattr(module.kv_cache, "attend", lambda q, cache: plain_attention(q, kept["k"], kept["v"]))
    want = module.Model(2, "float32", module.nnx.Rngs(0))(TOKENS)
    np.testing.assert_allclose(exact, want.swapaxes(0, 1), atol=1e-4)
    assert 0 < np.abs(near - exact).max() < 0.1 * np.abs(exact).max()
    assert small < 0.4 * whole and codes < floats


@pytest.mark.slow
@pytest.mark.parametrize("name, more", [("kv_cache", []), ("kv_cache_nnx", ["--weights", "int4-g16"])])
def test_what_they_print(example, monkeypatch, capsys, name, more):
    module = example(name)
    monkeypatch.setattr(module, "LENGTH", 128)
    monkeypatch.setattr(sys, "argv", [name, "--cache", "int4-g8-asym-rot", *more])
    module.main()
    shown = capsys.readouterr().out
    assert "int4-g8-asym-rot: " in shown and " KL 0.0" in shown
    size = sum(a.nbytes for a in jax.tree.leaves(kv_cache.init(2, 128, 2, 8, "int4-g8-asym-rot")))
    assert f" {2 * size:,} bytes" in shown
