"""What is compiled: in place, and sharded without moving the cache."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jquant import kv_cache
from jquant.kv_cache import init
from tests.kv_cache.cases import append, attend, tokens

pytestmark = pytest.mark.optimized
NAMES = ["float32", "int8", "int4-g64-asym-rot", "keys=int4-t8-asym,values=nvfp4,sinks=2,residual=4"]


def step(cache, q, k, v):
    cache = kv_cache.append(cache, k, v)
    return kv_cache.attend(q, cache), cache


def copies(program, shape):
    """The copies in a compiled program of arrays of a shape."""
    size = "[" + ",".join(map(str, shape)) + "]"
    return [line for line in program.splitlines() if size in line and re.search(r"= \S+ copy\(|copy-start", line)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pages", [None, 96])
def test_a_donated_decode_step_copies_nothing_of_the_cache(name, pages):
    q, k, v = tokens(2, 1)
    cache = init(2, 1536, 2, 64, name, **({} if pages is None else dict(pages=pages, page_size=32)))
    compiled = jax.jit(step, donate_argnums=0).lower(cache, q, k, v).compile()
    text = compiled.as_text()
    for store in (cache.keys, cache.values):
        assert [line for a in store.codes for line in copies(text, a.shape)] == []
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.keys.codes[0].nbytes + cache.values.codes[0].nbytes
    decoded = 2 * 2 * 1536 * 64 * 4
    assert memory.temp_size_in_bytes < decoded  # the cache as floats is never there


def test_prefill_decodes_a_block_at_a_time():
    q, k, v = tokens(1, 64, 1, 64, 1)
    cache = init(1, 16384, 1, 64, "int8")
    memory = jax.jit(step, donate_argnums=0).lower(cache, q, k, v).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 16384 * 64 * 4 / 4


def spread(cache, mesh):
    """Batch and heads over the devices, by the rank of each array."""

    def place(a):
        spec = P("batch", "heads") if a.ndim >= 3 else P("batch") if a.shape[:1] == (4,) else P()
        return jax.device_put(a, NamedSharding(mesh, spec))

    return jax.tree.map(place, cache)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("name", NAMES)
def test_sharded_over_batch_and_heads(name):
    """The same numbers, and no device gets another's part of the cache."""
    q, k, v = tokens(4, 20, 2)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("batch", "heads"))
    one = init(4, 32, 2, 64, name, dtype="float32")
    on = NamedSharding(mesh, P("batch", None, "heads"))
    many, q8, k8, v8 = spread(one, mesh), *(jax.device_put(a, on) for a in (q, k, v))
    many, one = append(many, k8[:, :19], v8[:, :19]), append(one, k[:, :19], v[:, :19])
    run = jax.jit(step, donate_argnums=0)
    compiled = run.lower(many, q8[:, 19:], k8[:, 19:], v8[:, 19:]).compile()
    text = compiled.as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    got, after = compiled(many, q8[:, 19:], k8[:, 19:], v8[:, 19:])
    np.testing.assert_allclose(got, run(one, q[:, 19:], k[:, 19:], v[:, 19:])[0], atol=1e-5)
    assert after.keys.codes[0].sharding.spec[:2] == ("batch", "heads")


def test_vmap_over_layers():
    """A cache is a pytree: stacked layers append and attend in one program."""
    q, k, v = tokens(2, 10)
    both = [append(init(2, 16, 2, 64, "int8"), k * s, v) for s in (1, 2)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *both)
    out = jax.vmap(lambda c: kv_cache.attend(q, c))(stack)
    for i, cache in enumerate(both):
        np.testing.assert_allclose(out[i], attend(q, cache), atol=1e-5)


def test_a_donated_cache_takes_nothing_of_what_it_was_made_from():
    """Settings found on a text serve many caches."""
    rng = np.random.default_rng(0)
    center, gain = (jnp.asarray(rng.uniform(1, 2, (2, 64)), jnp.float32) for _ in range(2))
    scale = jnp.asarray([1.0, 2.0], jnp.float32)
    k = jnp.asarray(rng.normal(size=(1, 4, 2, 64)), jnp.float32)
    for _ in range(2):
        given = dict(center=center, gain=gain, key_scale=scale)
        cache = kv_cache.init(1, 8, 2, 64, "keys=fp8_e4m3-tensor,values=int8", **given)
        jax.block_until_ready(jax.jit(kv_cache.append, donate_argnums=0)(cache, k, k))
    assert np.isfinite(center + gain).all() and scale.tolist() == [1, 2]
