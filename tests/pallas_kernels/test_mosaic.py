"""The kernel through Mosaic GPU: its numbers in Pallas' simulator, which looks for races, and what it does not run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import compat
from pallas_kernels.gpus import gpu, named
from pallas_kernels.quantized_matmul import mosaic, mosaic_registers, packed, quantized_matmul, rings, upcast
from pallas_kernels.quantized_matmul.elements import ELEMENTS, element
from pallas_kernels.quantized_matmul.rings import Ring
from tests.pallas_kernels import cases
from tests.pallas_kernels.test_upcast import run_ptx

ELEMENT_NAMES = ("int2", "int4", "int8", "nf4", "fp4_e2m1", "fp8_e4m3")


def simulated(case, ring=None, **how):
    """In the simulator, or on a GPU where there is one (`make test-gpu`)."""
    here = dict(implementation="mosaic", tiling=ring, interpret=cases.interpreted())
    out = quantized_matmul(*case.arrays, **case.options, **here, **how)
    out.block_until_ready()
    assert not cases.interpreted() or not compat.races_found()
    return out


def check(case, ring, rounded=2.0**-8):
    want, size = cases.exact(case)
    got = np.asarray(simulated(case, ring, out_dtype=jnp.float32), np.float64)
    assert np.max(np.abs(got - want) / size) < rounded


# float32 sums of exact products: only the table's entries are rounded, to bfloat16.
@pytest.mark.parametrize(
    "name, group, ring",
    [("int4", 128, Ring(64, 2, 2, 1, True)), ("int8", None, Ring(64, 1, 1)), ("nf4", 64, Ring(32, 1, 1))],
)
def test_the_product_is_that_of_float64(name, group, ring):
    check(cases.make(name, 3, 64, 256, group), ring, 2.0**-9 if name == "nf4" else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, m, n, k, group, how, ring",
    [
        ("int4", 1, 64, 1024, 128, {}, Ring(64, 4, 2)),
        ("int4", 16, 64, 1024, 128, {"asymmetric": True}, Ring(128, 4, 2, 2, True)),
        ("nf4", 1, 64, 512, 64, {"dtype": "float16"}, Ring(128, 2, 2, 1, True)),
        ("int8", 9, 64, 512, 64, {}, Ring(128, 2, 1, 4, True)),
        ("int4", 9, 128, 1152, 128, {"asymmetric": True}, Ring(128, 4, 2, 2)),
        ("int4", 2, 64, 512, 64, {"dtype": "float16", "scale_dtype": "float32"}, Ring(64, 3, 3)),
        ("int2", 2, 64, 512, 128, {"asymmetric": True, "dtype": "float16"}, Ring(64, 2, 2)),
        ("int8", 9, 64, 448, 64, {"scale_dtype": "float16"}, Ring(64, 2, 1, 3)),
        ("fp8_e4m3", 2, 64, 256, None, {"dtype": "float16"}, Ring(128, 2, 2)),
        ("fp4_e2m1", 2, 64, 256, 64, {}, Ring(64, 2, 1)),
    ],
)
def test_every_format_at_every_edge(name, m, n, k, group, how, ring):
    """Rows and codes that fill no tile, more stages than slots and fewer, parts of the contracted axis, zero points."""
    check(cases.make(name, m, n, k, group, **how), ring, 2.0**-9 if name == "nf4" else 1e-6)


@pytest.mark.slow
def test_experts_are_one_more_axis_of_the_grid_and_gradients_are_xlas():
    case = cases.make("int4", 2, 64, 256, 128, lead=(2,))
    want, size = cases.exact(case)
    how = dict(implementation="mosaic", tiling=Ring(64, 2, 2), interpret=cases.interpreted(), out_dtype=jnp.float32)
    run = lambda how: lambda x: jax.vmap(lambda *a: quantized_matmul(*a, **case.options, **how))(x, *case.arrays[1:3])
    got = np.asarray(run(how)(case.x), np.float64)
    assert not cases.interpreted() or not compat.races_found()
    assert np.max(np.abs(got - want) / size) < 1e-6
    slope = lambda how: jax.grad(lambda x: jnp.sum(run(how)(x) ** 2))(case.x).astype(jnp.float32)
    theirs = slope(dict(implementation="xla", out_dtype=jnp.float32))
    np.testing.assert_allclose(slope(how), theirs, rtol=0.02, atol=0.02 * float(jnp.max(jnp.abs(theirs))))


# --- which code comes into which register ---


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ELEMENT_NAMES)
def test_the_upcast_of_a_word_gives_the_pairs_that_the_order_counts_on(name, dtype):
    e = element(name)
    words = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    codes = np.stack([(words >> np.uint32(e.bits * i)) & np.uint32(2**e.bits - 1) for i in range(32 // e.bits)], -1)
    if e.kind == "table":
        ran = [run_ptx(packed.table_asm(e.table, half, dtype), {"$2": words}) for half in range(2)]
        registers = [r[f"${j}"] for r in ran for j in range(2)]
        numbers = upcast.table(jnp.asarray(codes, jnp.uint16), e.table, dtype)
    elif e.kind == "float":
        registers = [run_ptx(packed.float_asm(e, lane, dtype), {"$1": words})["$0"] for lane in range(16 // e.bits)]
        numbers = upcast.small_floats(jnp.asarray(codes, jnp.uint16), e, dtype)
    else:
        asm = [packed.int_asm(e.bits, lane, True, dtype) for lane in range(16 // e.bits)]
        registers = [run_ptx(text, {"$1": words})["$0"] for text in asm]
        numbers = upcast.integers(jnp.asarray(codes, jnp.uint16), e.bits, None, dtype)
    for register, (low, high) in zip(registers, mosaic_registers.pairs(e), strict=True):
        two = register.view(np.dtype(dtype)).reshape(-1, 2)
        np.testing.assert_array_equal(two, np.asarray(numbers)[:, [low, high]])


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(ELEMENT_NAMES), st.sampled_from([None, 32, 64, 96, 256]), st.integers(1, 9), st.integers(1, 40))
def test_activations_are_arranged_as_codes_come(name, group, m, sixteens):
    """Column by column of every unit, padded with zeros; and the order is one of all columns."""
    bits = element(name).bits
    k = sixteens * 512 // bits
    g = rings.group_of(group, k)
    if not rings.unit_of(name, g):
        return
    p = rings.planned(name, g, m, 64, k, None, 1, gpu("h100"))
    x = np.random.default_rng(0).integers(1, 100, (m, k)).astype(np.float32)
    padded = np.pad(x, [(0, p.rows - m), (0, p.steps * p.stage - k)])
    at = mosaic_registers.order(p.element, p.unit)
    assert sorted(at) == list(range(p.unit))
    want = padded.reshape(p.rows, -1, p.unit)[:, :, at].reshape(padded.shape)
    np.testing.assert_array_equal(mosaic.arranged(jnp.asarray(x), p), want)


# --- what is chosen, and for what ---


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(ELEMENT_NAMES), st.sampled_from([None, 64, 128]), st.integers(1, 64), st.integers(64, 200000),
    st.integers(1, 256), st.integers(1, 64),
)  # fmt: skip
def test_a_ring_fits_into_shared_memory_and_every_worker_has_slots_of_its_own(name, group, m, n, blocks, batch):
    k = blocks * 512
    g = rings.group_of(group, k)
    if not rings.unit_of(name, g):
        return
    p = rings.planned(name, g, m, n, k, None, batch, gpu("h100"))
    assert rings.shared_bytes(p) <= gpu("h100").shared_per_block
    assert p.ring.slots % p.ring.workers == 0 and p.ring.stage_bytes % p.unit_bytes == 0
    assert p.steps * p.stage >= k and (p.steps - 1) * p.stage < k
    assert (p.ring.split_k - 1) * -(-p.steps // p.ring.split_k) < p.steps or p.ring.split_k == 1


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(m=65), "65 rows of activations"), (dict(m=0), "0 rows"), (dict(name="int3"), "codes of 3 bits"),
        (dict(name="fp8_e5m2"), "infinities"), (dict(dtype=jnp.float32), "float32, not bfloat16"),
        (dict(n=96), "a multiple of 64 x 128"), (dict(k=1088), "a multiple of 64 x 128"),
        (dict(group_size=32, k=1024), "groups of 32"), (dict(scale_dtype=jnp.float8_e8m0fnu), "scales are float8"),
        (dict(zero=jnp.float32), "zero points are float32"), (dict(name="int8", zero=jnp.uint8), "8 bits"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_it_says(change, reason):
    usual = dict(
        name="int4", group_size=128, m=16, n=64, k=1024, dtype=jnp.bfloat16, scale_dtype=jnp.bfloat16, zero=None
    )
    assert rings.why_not(**usual) is None
    assert reason in rings.why_not(**usual | change)


def test_a_ring_whose_slots_its_workers_do_not_share_evenly_is_refused():
    case = cases.make("int4", 2, 64, 256, 128)
    with pytest.raises(ValueError, match="slots"):
        simulated(case, Ring(64, 3, 2))
    with pytest.raises(ValueError, match="stage"):
        simulated(case, Ring(96, 2, 2))


def test_on_a_hopper_gpu_it_is_taken_where_it_was_faster():
    shape = jax.ShapeDtypeStruct

    def taken(device="h100", name="int4", group=128, m=16, n=8192, k=8192, zero=None, lead=()):
        bits, blocks = element(name).bits, k // group
        codes, scale = shape((*lead, n, k * bits // 8), jnp.uint8), shape((*lead, n, blocks), jnp.bfloat16)
        x = shape((*lead, m, k), jnp.bfloat16)
        return rings.preferred(device, name, group, x, (codes,), scale, zero and shape((n, blocks), zero))

    assert taken() and taken("h200") and taken(m=64) and taken(name="nf4", group=64) and taken(lead=(2,))
    assert taken(n=1024, k=4096) and taken(zero=jnp.uint8) and taken(name="int8") and taken(name="fp8_e4m3", m=1)
    for device in ("a100", "l4", "b200", "any"):
        assert not taken(device)
    assert not taken(m=65) and not taken(name="int8", m=17) and not taken(name="int2") and not taken(group=32)


def test_the_program_is_triton_where_the_gpu_is_not_known():
    case = cases.make("int4", 16, 8192, 256, 128)
    run = jax.jit(lambda *a: quantized_matmul(*a, **case.options))
    text = run.trace(*case.arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text and "mosaic_gpu" not in text
    with compat.lowering_on("h200"):
        text = jax.jit(lambda *a: run(*a)).trace(*case.arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text  # traced before
    with compat.lowering_on("h200"):
        again = jax.jit(lambda *a: quantized_matmul(*a, **case.options))
        text = again.trace(*case.arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "triton" not in text


def test_gpus_are_known_by_what_jax_calls_them():
    assert named("NVIDIA H100 80GB HBM3") == named("NVIDIA H100 NVL") == "h100"
    assert named("NVIDIA H200") == named("NVIDIA GH200 480GB") == "h200"
    assert named("NVIDIA A100-SXM4-80GB") == "a100" and named("NVIDIA L4") == "l4"
    assert named("cpu") is None and named("NVIDIA L40S") is None


def test_elements_that_are_listed_are_those_that_it_takes():
    fits = lambda name: rings.why_not(name, None, 1, 64, 1024, jnp.bfloat16, jnp.bfloat16, None) is None
    assert {name for name in ELEMENTS if fits(name)} == set(ELEMENT_NAMES)
