"""Quantized programs that are written by `jax.export` and read again: what they take, and the kernels in them."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jquant as jq
from jquant.core.activation import POLICIES
from jquant.core.errors import TraceError
from jquant.core.exported import static_from_bytes, static_to_bytes
from jquant.core.format_type import PRESETS
from jquant.ops.platform import on_cuda
from tests.models.cases import CONFIGS, make_params, make_tokens
from tests.ops.test_gpu import TARGET

ALLOWED = [jax.export.DisabledSafetyCheck.custom_call(TARGET)]
CONFIG = dataclasses.replace(CONFIGS["llama"], hidden_size=64, intermediate_size=128, head_dim=16)
RECIPE = jq.Recipe({"*embed*": jq.INT8, "*mlp*": jq.W8A8_STATIC, "*attention/q*": jq.FP8, "*": jq.INT4_G64_ASYM})


@pytest.fixture(scope="module")
def model():
    """Apply, quantized parameters, tokens."""
    apply, tokens = jq.models.build(CONFIG), make_tokens(CONFIG, 8)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), make_params(CONFIG))
    return apply, jq.quantize(apply, params, RECIPE, jq.rtn(), [tokens]), tokens


def exported(run, platforms, *args):
    """Written and read again."""
    pytest.importorskip("flatbuffers")
    data = jax.export.export(jax.jit(run), platforms=platforms, disabled_checks=ALLOWED)(*args).serialize()
    return jax.export.deserialize(data)


@pytest.mark.parametrize("platforms", [("cuda",), ("cpu", "cuda"), ("cpu",)])
def test_an_exported_model_has_the_kernels_and_on_a_cpu_the_same_numbers(model, platforms):
    apply, q, tokens = model
    reads = [r for r in jq.explain(apply, q, tokens) if r.kernel]
    assert len(reads) == 7 * CONFIG.num_layers + 1
    run = jq.quantized(apply)
    program = exported(run, platforms, q, tokens)
    assert program.platforms == platforms
    assert program.mlir_module().count(TARGET) == ("cuda" in platforms) * len(reads)
    if "cpu" in platforms:
        np.testing.assert_array_equal(program.call(q, tokens), jax.jit(run)(q, tokens))


def test_a_decoding_step_over_a_quantized_cache_too(model):
    apply, q, tokens = model
    cache = jq.models.init_cache(CONFIG, len(tokens), 64, "int8")
    step = lambda q, tokens, cache: jq.quantized(apply)(q, tokens, cache=cache)[0]
    one = tokens[:, :1]
    count = lambda platforms: (
        jax.export.export(jax.jit(step), platforms=platforms, disabled_checks=ALLOWED)(q, one, cache)
        .mlir_module().count(TARGET)
    )  # fmt: skip
    assert count(("cuda",)) == count(("cpu", "cuda")) > 7 * CONFIG.num_layers + 1
    assert count(("cpu",)) == 0


def test_what_is_static_in_a_qtensor_is_read_back_as_it_was(model):
    q = jax.tree.leaves(model[1], is_leaf=jq.is_qtensor)[0]
    for policy in (*PRESETS.values(), *POLICIES.values()):
        fmt, act = (policy.weight, policy.activation) if isinstance(policy, jq.Policy) else (policy, None)
        static = q.replace(format=fmt, activation=act).tree_flatten()[1]
        again = static_from_bytes(static_to_bytes(static))
        assert again == static and hash(again) == hash(static)
    unknown = static_to_bytes(static).replace(b"fp8_e4m3", b"fp9")
    with pytest.raises(TraceError, match=r"does not know.*fp9"):
        static_from_bytes(unknown)


def test_other_leaves_are_written_too():
    """The sides of `lowrank` and `lowrank_inputs`, and the tied table that a rotation leaves as one."""
    x = jnp.ones((2, 32))
    apply = lambda p, x: x @ p["w"]
    params = {"w": jax.random.normal(jax.random.key(0), (32, 8))}
    for method in (jq.lowrank(2), jq.chain(jq.lowrank_inputs(2), jq.rtn())):
        q = jq.quantize(apply, params, jq.INT4_G32, method, [x])
        assert q["w"].side is not None
        program = exported(jq.quantized(apply), ("cpu", "cuda"), q, x)
        np.testing.assert_array_equal(program.call(q, x), jax.jit(jq.quantized(apply))(q, x))
    tied = jq.PerUse(params["w"], lookup=jnp.ones(8), product=None)
    program = exported(lambda p, i: p.value[i], ("cpu",), tied, 1)
    np.testing.assert_array_equal(program.call(tied, 1), params["w"][1])


def test_what_is_for_gpus_is_itself_where_nothing_else_is_lowered():
    """Under jit, vmap and alone; the branch of another platform is never taken."""
    f, a, b = partial(on_cuda, lambda a, b: (a @ b, a + 1)), jnp.ones((4, 2, 3)), jnp.ones((3, 5))
    for got in (f(a, b), jax.jit(f)(a, b), jax.vmap(jax.vmap(f, (0, None)), (0, None))(a, b)):
        np.testing.assert_array_equal(got[0], a @ b)
        np.testing.assert_array_equal(got[1], a + 1)
    choose = lambda a, b: jax.lax.platform_dependent(a, b, cuda=f, default=lambda a, b: (a @ b * 2, a))
    program = jax.export.export(jax.jit(choose), platforms=("cpu", "cuda"))(a, b)
    np.testing.assert_array_equal(program.call(a, b)[0], a @ b * 2)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_a_program_for_several_devices_is_written_without_kernels(model):
    """JAX does not write how a kernel is cut over a mesh; without kernels there is nothing to be cut."""
    apply, q, tokens = model
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    q, tokens = jax.device_put((q, tokens), NamedSharding(mesh, P()))
    program = exported(jq.quantized(apply, kernels="never"), ("cuda",), q, tokens)
    assert program.nr_devices == 8 and TARGET not in program.mlir_module()
    assert re.search("dot_general", program.mlir_module())
