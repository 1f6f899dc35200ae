"""Programs of whole models for an H100, lowered here: one kernel for each quantized product, none of them in floats."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jquant as jq
from jquant.core.paths import map_with_paths
from pallas_kernels import compat, harness
from pallas_kernels.gpus import gpu
from tests.ops.shapes_only import LLAMA_8B, SMOLLM2, quantized_shapes, shape
from tests.ops.test_gpu import HOPPERS, TARGET

FLOATS = "(bf16|f16|f32)"


def products(config):
    """Of every layer q, k, v, o, gate, up and down; the head."""
    return 7 * config.num_layers + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, policy, tokens",
    [
        (SMOLLM2, jq.INT4_G64, (1, 1)), (SMOLLM2, jq.W8A8, (2, 512)), (LLAMA_8B, jq.INT4_G128, (1, 1)),
        (LLAMA_8B, jq.INT4_G128, (1, 2048)), (LLAMA_8B, jq.W8A8, (4, 1)), (LLAMA_8B, jq.W4A8, (1, 2048)),
    ],
    ids=["SmolLM2-1", "SmolLM2-W8A8-1024", "8B-1", "8B-2048", "8B-W8A8-4", "8B-W4A8-2048"],
)  # fmt: skip
def test_every_quantized_product_of_a_model_is_a_kernel(config, policy, tokens):
    """As many as `explain` says, in decoding and for a prompt; and no array of floats is of the size of a weight.

    The latter for one token, and for products of codes. Kernels are required: many rows of int8 are XLA's otherwise.
    """
    q, tokens = quantized_shapes(config, policy), shape(*tokens, dtype=jnp.int32)
    apply = jq.models.build(config)
    reads = [r for r in jq.explain(apply, q, tokens, kernels="require") if r.kind == "dot"]
    assert len(reads) == products(config) and all(r.kernel and r.fused for r in reads)
    lowered = jax.jit(jq.quantized(apply, kernels="require")).trace(q, tokens).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count(TARGET) == len(reads)
    if not isinstance(policy, jq.Policy) and tokens.size > 64:  # a kernel may write the weight out for many rows
        return
    leaves = jax.tree.leaves(q, is_leaf=jq.is_qtensor)
    sizes = {s for w in leaves if jq.is_qtensor(w) for s in (w.shape, w.shape[::-1])}
    activations = {(tokens.size, n) for n in (config.hidden_size, config.intermediate_size)}
    sizes -= activations | {a[::-1] for a in activations}
    assert not [s for s in sizes if re.search(rf"tensor<(1x)*{s[0]}x{s[1]}x{FLOATS}>", text)]


# --- meshes: tensor parallel over four devices, data parallel over two ---

SMALL = dataclasses.replace(
    LLAMA_8B, hidden_size=512, intermediate_size=1024, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=64,
    vocab_size=1024,
)  # fmt: skip
# Rows of the weight where the next product contracts them, parts of rows there, and rows of the head.
BY_ROWS, BY_PARTS = re.compile("/(q|k|v|gate|up)/|lm_head"), re.compile("/(o|down)/")


def placed(tree, mesh, place):
    """Each array of a tree by `place(array, its sharding)`."""

    def one(path, leaf):
        def spec(a):
            if BY_ROWS.search(path):
                return P("model")
            return P(None, "model") if BY_PARTS.search(path) and a.shape[-1] > 1 else P()  # a row has one scale

        return jax.tree.map(lambda a: place(a, NamedSharding(mesh, spec(a))), leaf)

    return map_with_paths(one, tree)


def moved(text):
    """What is sent between devices, by operation, and of which dtypes."""
    kinds = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
    return [(op, set(re.findall(r"\b([a-z]+\d+\w*)\[", result)))
            for result, op in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)]  # fmt: skip


def check_moved(text):
    """Codes stay where they are; a sum follows each product of parts of rows: two a layer."""
    found = moved(text)
    assert not [m for m in found if m[1] & {"u8", "s8", "u16", "u4", "s4"}]
    assert sum(op in ("all-reduce", "reduce-scatter") for op, _ in found) >= 2 * SMALL.num_layers
    return found


@pytest.mark.gpu_compile
@pytest.mark.skipif(harness.why_not() is not None, reason=str(harness.why_not()))
@pytest.mark.parametrize("policy, tokens, most", [(jq.INT4_G64, 1, 2), (jq.W8A8, 64, 6)], ids=["decode", "W8A8"])
def test_a_model_on_eight_gpus_sends_no_codes(policy, tokens, most):
    """Compiled for H100s that are not there. A sum for each cut product; of rounded inputs also their extremes."""
    mesh = topologies.make_mesh(harness.topology("h100", (1, 1, 8)), (2, 4), ("data", "model"))
    q, apply = quantized_shapes(SMALL, jq.Recipe({"embed*": None, "*": policy})), jq.models.build(SMALL)
    place = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    args = placed(q, mesh, place), place(shape(4, tokens, dtype=jnp.int32), NamedSharding(mesh, P("data")))
    with compat.lowering_for(gpu("h100").kind):
        lowered = jax.jit(jq.quantized(apply, kernels="require")).lower(*args)
    text = lowered.compile().as_text()
    assert text.count(TARGET) + text.count(HOPPERS) == products(SMALL)
    assert len(check_moved(text)) <= most * SMALL.num_layers + 2  # and the head's logits, the embedding's rows


MOSAIC = "on a Hopper GPU the one through Mosaic"


@pytest.mark.gpu_compile
@pytest.mark.skipif(harness.why_not() is not None, reason=str(harness.why_not()))
@pytest.mark.parametrize("device, devices", [("h100", 2), ("a100", 1)])
def test_the_gpu_that_a_program_is_compiled_for_has_its_own_kernels(device, devices):
    """Of an 8B layer as many through Mosaic as `explain` says, on a Hopper GPU alone; the weights are cut over two."""
    mesh = topologies.make_mesh(harness.topology(device, (1, 1, devices)), (devices,), ("model",))
    config = dataclasses.replace(LLAMA_8B, num_layers=1)
    q, apply, tokens = quantized_shapes(config, jq.INT4_G128), jq.models.build(config), shape(1, 1, dtype=jnp.int32)
    here = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    args = placed(q, mesh, here), here(tokens, NamedSharding(mesh, P()))
    with compat.lowering_for(gpu(device).kind):
        text = jax.jit(jq.quantized(apply)).lower(*args).compile().as_text()
    reads = [r for r in jq.explain(apply, q, tokens) if r.kind == "dot"]
    many = sum(MOSAIC in r.how for r in reads)
    assert many == len(reads)
    wanted = many if device == "h100" else 0
    assert text.count(HOPPERS) == wanted
    assert text.count(TARGET) == len(reads) - wanted


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_a_model_on_eight_cpu_devices_sends_no_codes():
    """What XLA makes of the plain products."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    config = dataclasses.replace(SMALL, num_layers=1, hidden_size=256, intermediate_size=512, num_heads=4)
    q, apply = quantized_shapes(config, jq.Recipe({"embed*": None, "*": jq.W8A8})), jq.models.build(config)
    place = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    args = placed(q, mesh, place), place(shape(4, 2, dtype=jnp.int32), NamedSharding(mesh, P("data")))
    found = moved(jax.jit(jq.quantized(apply)).lower(*args).compile().as_text())
    assert found and not [m for m in found if m[1] & {"u8", "s8"}]


def test_the_model_that_is_compiled_for_many_devices_is_that_of_one():
    """The paths that are cut are the model's."""
    q = quantized_shapes(SMALL, jq.INT4_G64)
    cut = []
    placed(q, jax.make_mesh((1,), ("model",)), lambda a, s: cut.append(s.spec != P()))
    assert sum(cut) == 2 * products(SMALL)  # codes and scales
    assert np.prod(q["lm_head"]["kernel"].shape) == 512 * 1024
