"""Sharded parameters and inputs over eight devices, under jit and inside shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jquant as jq
from jquant.core.formats import Format
from tests import model_bank
from tests.model_bank import assert_same, dequantize, normal, params, quick

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")

FORMATS = [Format("int8"), Format("int4", 8), Format("int3", 8, symmetric=False), Format("int4", "tensor")]


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


def mlp(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def quantized_mlp(fmt: Format):
    p = params(up=(32, 64), down=(64, 16))
    return {k: model_bank.rtn(w, fmt, (-2,)) for k, w in p.items()}


def put(q, spec_of):
    """Every array of a tree on the mesh, with the spec that `spec_of(array)` says."""
    on = mesh()
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(on, spec_of(a))), q)


# The arrays of a QTensor are [kept axis, packed contracted axis].
SPECS = {
    "kept": lambda a: P("model") if a.shape[0] % 4 == 0 else P(),
    "contracted": lambda a: P(None, "model") if a.shape[1] % 4 == 0 else P(),
    "both": lambda a: P(*[n if s % k == 0 else None for n, k, s in zip(("model", "data"), (4, 2), a.shape)]),
    "replicated": lambda a: P(),
}


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_sharded_parameters_under_jit(spec: str, fmt: Format):
    q, x = quantized_mlp(fmt), normal(8, 32)
    sharded = put(q, SPECS[spec])
    x_sharded = jax.device_put(x, NamedSharding(mesh(), P("data")))
    got = quick(jq.quantized(mlp))(sharded, x_sharded)
    assert_same(jax.device_get(got), jax.device_get(quick(mlp)(dequantize(q), x)), rtol=1e-5)
    assert len(got.sharding.device_set) == 8
    assert all(r.fused for r in jq.explain(mlp, sharded, x_sharded))


def test_constraints_inside_the_model_are_kept():
    on = mesh()

    def apply(p, x):
        w = jax.lax.with_sharding_constraint(p["up"], NamedSharding(on, P(None, "model")))
        h = jax.lax.with_sharding_constraint(jnp.tanh(x @ w), NamedSharding(on, P("data", "model")))
        return h @ p["down"]

    q, x = quantized_mlp(FORMATS[1]), normal(8, 32)
    got = quick(jq.quantized(apply))(put(q, lambda a: P()), jax.device_put(x, NamedSharding(on, P("data"))))
    assert_same(jax.device_get(got), jax.device_get(quick(mlp)(dequantize(q), x)), rtol=1e-5)
    assert [r.fused for r in jq.explain(apply, q, x)] == [True, True]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_shard_map_around_with_data_sharded(fmt: Format):
    q, x = quantized_mlp(fmt), normal(8, 32)
    f = jax.shard_map(jq.quantized(mlp), mesh=mesh(), in_specs=(P(), P("data")), out_specs=P("data"))
    assert_same(quick(f)(q, x), quick(mlp)(dequantize(q), x), rtol=1e-5)


@pytest.mark.parametrize("fmt", FORMATS[:3], ids=str)
def test_shard_map_around_with_tensor_parallel_weights(fmt: Format):
    """Columns of `up` and rows of `down` on each device, as in Megatron: each holds packed codes of its own part."""

    def local(p, x):
        return jax.lax.psum(mlp(p, x), "model")

    q, x = quantized_mlp(fmt), normal(8, 32)
    whole_scale = fmt.block == "channel"  # one scale a row, for all of its parts
    down = jax.tree.map(lambda a: P() if whole_scale and a.shape[-1] == 1 else P(None, "model"), q["down"])
    specs = {"up": P("model"), "down": down}
    f = jax.shard_map(jq.quantized(local), mesh=mesh(), in_specs=(specs, P("data")), out_specs=P("data"))
    assert_same(quick(f)(q, x), quick(mlp)(dequantize(q), x), rtol=1e-5)


def test_gradients_of_sharded_inputs():
    q, x = quantized_mlp(FORMATS[1]), normal(8, 32)
    loss = lambda f, p: lambda x: jnp.sin(f(p, x)).sum()
    sharded = put(q, SPECS["kept"])
    got = quick(lambda q, x: jax.grad(loss(jq.quantized(mlp), q))(x))(
        sharded, jax.device_put(x, NamedSharding(mesh(), P("data")))
    )
    want = quick(lambda p, x: jax.grad(loss(mlp, p))(x))(dequantize(q), x)
    assert_same(jax.device_get(got), jax.device_get(want), rtol=1e-5)


def test_a_scan_over_sharded_layers():
    q = {"w": model_bank.rtn(params(w=(3, 16, 16))["w"], Format("int4", 4), (-2,))}
    apply = lambda p, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]
    on = mesh()
    sharded = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(on, P(None, "model"))), q)
    x = jax.device_put(normal(8, 16), NamedSharding(on, P("data")))
    got = quick(jq.quantized(apply))(sharded, x)
    assert_same(jax.device_get(got), jax.device_get(quick(apply)(dequantize(q), np.asarray(x))), rtol=1e-5)


def test_a_loop_inside_shard_map_with_a_varying_carry():
    def local(p, x):
        total = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]
        return jax.lax.psum(total.sum(), "data")

    q = {"w": model_bank.rtn(params(w=(3, 16, 16))["w"], Format("int4", 4), (-2,))}
    run = lambda f: quick(jax.shard_map(f, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P()))
    x = normal(8, 16)
    assert_same(run(jq.quantized(local))(q, x), run(local)(dequantize(q), x), rtol=1e-5)
