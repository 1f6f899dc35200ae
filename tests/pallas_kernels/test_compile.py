"""Every kernel, compiled for GPUs that are not there: no spills, tensor cores, each byte of the weight read once."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import harness
from pallas_kernels.gpus import gpu
from pallas_kernels.low_precision_matmul import low_precision_matmul
from pallas_kernels.quantized_matmul import Tiling, quantized_matmul, rings
from pallas_kernels.quantized_matmul.elements import element, plane_widths

pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(harness.why_not() is not None, reason=str(harness.why_not())),
]
DECODE = Tiling(16, 64, 128, 4, 4, 5)
PREFILL = Tiling(128, 128, 128, 1, 8, 3)


def compiled(
    device,
    name,
    group,
    m,
    n,
    k,
    tiling,
    *,
    dtype=jnp.bfloat16,
    scale_dtype=jnp.bfloat16,
    asymmetric=False,
    packed=True,
    kernel="quantized_matmul",
    implementation="auto",
):
    blocks = 1 if group is None else -(-k // group)
    shape = jax.ShapeDtypeStruct
    planes = tuple(shape((n, -(-k * w // 8)), jnp.uint8) for w in plane_widths(element(name).bits))
    zero = (shape((n, blocks), jnp.uint8),) if asymmetric else ()

    def product(x, planes, scale, *zero):
        return quantized_matmul(
            x, planes, scale, *zero, element=name, group_size=group, device=device, tiling=tiling, packed=packed,
            implementation=implementation,
        )  # fmt: skip

    program = harness.compile_for(device, product, shape((m, k), dtype), planes, shape((n, blocks), scale_dtype), *zero)
    [found] = program.named(kernel)
    return program, found


def check(program, kernel, device, n, k):
    assert kernel.spill_bytes == 0
    assert kernel.shared_bytes <= gpu(device).shared_per_block
    assert kernel.ptx.counts.get("wgmma.mma_async" if gpu(device).arch == 90 else "mma.sync", 0) > 0
    made = {m[1] for m in re.finditer(r"= (?:bf16|f16|f32)\[([\d,]+)\]", program.hlo)}
    assert not [size for size in made if math.prod(map(int, size.split(","))) >= n * k], "a float copy of the weight"


@pytest.mark.parametrize("device", ["h100", "a100"])
@pytest.mark.parametrize(
    "name, group, scale_dtype, asymmetric",
    [("int4", 128, jnp.bfloat16, False), ("int4", 32, jnp.bfloat16, True), ("int8", None, jnp.float32, False)],
)
def test_decoding_reads_every_byte_of_the_weight_once(device, name, group, scale_dtype, asymmetric):
    n, k, t = 512, 4096, DECODE
    program, kernel = compiled(device, name, group, 16, n, k, t, scale_dtype=scale_dtype, asymmetric=asymmetric)
    check(program, kernel, device, n, k)
    assert kernel.grid[:2] == (n // t.block_n, t.split_k)
    steps = math.ceil(k / t.block_k / t.split_k)
    read = kernel.bytes_of_step(1) * steps * kernel.blocks
    assert read == n * k * element(name).bits // 8
    assert min(load.bytes for load in kernel.ptx.loads if load.parameter == 1) >= (16 if name == "int4" else 8)


TENSOR_CORES = {"l4": "mma.sync", "b200": "tcgen05.mma"}


@pytest.mark.parametrize("device", TENSOR_CORES)
@pytest.mark.parametrize("name, group, m", [("int4", 128, 1), ("int4", 64, 64), ("int8", None, 16), ("nf4", 64, 16)])
def test_kernels_compile_for_ada_and_blackwell(device, name, group, m):
    """With the tilings of the model of a GPU: nothing was tuned there."""
    program, kernel = compiled(device, name, group, m, 1024, 2048, None)
    assert kernel.spill_bytes == 0 and kernel.shared_bytes <= gpu(device).shared_per_block
    assert TENSOR_CORES[device] in kernel.ptx.text
    shape = jax.ShapeDtypeStruct
    f = lambda a, b, s, t: low_precision_matmul(a, b, s, t, device=device)
    dtype = jnp.int8 if name.startswith("int") else jnp.float8_e4m3fn
    scales = shape((m, 1), jnp.float32), shape((1024, 1), jnp.float32)
    args = shape((m, 2048), dtype), shape((1024, 2048), dtype), *scales
    [kernel] = harness.compile_for(device, f, *args).named("low_precision")
    assert kernel.spill_bytes == 0 and TENSOR_CORES[device] in kernel.ptx.text


@pytest.mark.parametrize("device", ["h100", "a100"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_packed_upcast_compiles(device, asymmetric):
    program, kernel = compiled(device, "int4", 128, 16, 512, 1024, DECODE, asymmetric=asymmetric, packed=True)
    check(program, kernel, device, 512, 1024)
    assert kernel.ptx.counts["fma"] >= 32  # two elements each


@pytest.mark.parametrize("name, group, asymmetric", [("int4", 128, False), ("int4", 64, True), ("nf4", 64, False)])
def test_through_mosaic_every_byte_of_the_weight_comes_by_tma_once(name, group, asymmetric):
    """The copies of a turn of the loop are those of one stage, and there are as many turns as stages."""
    m, n, k = 16, 8192, 4096
    how = dict(asymmetric=asymmetric, kernel="mosaic", implementation="mosaic")
    program, kernel = compiled("h100", name, group, m, n, k, None, **how)
    check(program, kernel, "h100", n, k)
    p = rings.planned(name, group, m, n, k, None, 1, gpu("h100"))
    tiles = n // rings.HEIGHT
    assert p.ring.split_k == 1 and tiles * p.steps * rings.HEIGHT * p.ring.stage_bytes == n * k // 2
    asked = re.findall(r"expect_tx[^;]*, (%r\d+);", kernel.ptx.text)  # bytes a thread of 128 waits for
    values = {int(re.search(rf"mov\.b32\s+{r}, (\d+);", kernel.ptx.text)[1]) for r in asked}
    assert {128 * v for v in values} == {rings.HEIGHT * p.ring.stage_bytes, 2 * p.rows * p.stage}
    assert kernel.threads == 128 * (p.ring.workers + 1) and 65536 // kernel.threads >= kernel.registers
    assert kernel.ptx.counts["wgmma.mma_async"] == p.stage // 16


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, group, m, dtype",
    [("int8", None, 1, jnp.float16), ("int2", 128, 64, jnp.bfloat16), ("fp8_e4m3", 64, 40, jnp.bfloat16)],
)
def test_every_element_compiles_through_mosaic(name, group, m, dtype):
    how = dict(dtype=dtype, kernel="mosaic", implementation="mosaic")
    program, kernel = compiled("h100", name, group, m, 512, 1024, None, **how)
    check(program, kernel, "h100", 512, 1024)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["h100", "a100"])
@pytest.mark.parametrize(
    "name, group, scale_dtype",
    [
        ("int4", 128, jnp.bfloat16),
        ("int8", None, jnp.float32),
        ("fp8_e4m3", None, jnp.float32),
        ("nf4", 64, jnp.bfloat16),
    ],
)
def test_prefill_compiles_without_spills(device, name, group, scale_dtype):
    """By the kernel that reads codes; by that which writes the weight out, which is what many rows take."""
    part = name == "nf4"
    tiling = PREFILL._replace(block_k=64) if part else PREFILL
    program, kernel = compiled(device, name, group, 256, 1024, 1024, tiling, scale_dtype=scale_dtype)
    check(program, kernel, device, 1024, 1024)
    _, kernel = compiled(device, name, group, 256, 1024, 1024, None, scale_dtype=scale_dtype, kernel="decode")
    assert kernel.spill_bytes == 0
    assert max(int(n) for n in re.findall(r"st\.global\.v(\d)\.", kernel.ptx.text)) == 4  # 16 bytes at a time


@pytest.mark.slow
@pytest.mark.parametrize("device", ["h100", "a100"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("m", [16, 1024])
def test_products_of_codes_compile(device, dtype, m):
    shape = jax.ShapeDtypeStruct
    f = lambda a, b, s, t: low_precision_matmul(a, b, s, t, device=device)
    args = (
        shape((m, 1024), dtype),
        shape((1024, 1024), dtype),
        shape((m, 1), jnp.float32),
        shape((1024, 1), jnp.float32),
    )
    [kernel] = harness.compile_for(device, f, *args).named("low_precision")
    assert kernel.spill_bytes == 0 and kernel.shared_bytes <= gpu(device).shared_per_block
    # Triton has no wgmma of fp8 whose sums are float32 throughout: it takes mma.sync there.
    wgmma = device == "h100" and dtype == "int8"
    assert kernel.ptx.counts.get("wgmma.mma_async" if wgmma else "mma.sync", 0) > 0
