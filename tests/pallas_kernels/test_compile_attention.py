"""Flash decoding over quantized codes, compiled for an H100 that is not there: no spills, every byte read once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jquant import kv_cache
from pallas_kernels import compat, harness
from pallas_kernels.decode_attention import Coded, Rules, decode_attention
from pallas_kernels.decode_attention import attention as parts
from pallas_kernels.gpus import gpu
from tests.pallas_kernels.attention_cases import KINDS, shapes

pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(harness.why_not() is not None, reason=str(harness.why_not())),
]
B, K, T = 16, 8, 32768
FAST = ["int8", "int4-g32-asym"]


def compiled(name, dim, rows, device="h100", **rules):
    """The kernel at 32k positions x 16 sequences, its arrays and its tiling."""
    kinds = [KINDS[name], KINDS[name.replace("-t32", "-g32")]]
    keys, values = (shapes(kind, (B, K, T, dim)) for kind in kinds)
    shape = jax.ShapeDtypeStruct
    how = dict(layouts=tuple(k.layout for k in kinds), rules=Rules(dim**-0.5, **rules), device=device)
    program = harness.compile_for(
        device, lambda *args: decode_attention(*args, **how), shape((B, K, rows, dim), jnp.float32), keys, values,
        shape((B, rows), jnp.int32), shape((B,), jnp.int32),
    )  # fmt: skip
    [kernel] = program.named("decode_attention")
    t = parts.choose(parts.problem((B, K, rows, dim), keys, values, how["layouts"], T, 1 << 20), device, gpu(device))
    return kernel, (keys, values), t


def nbytes(store: Coded) -> int:
    return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(store._replace(static=None)))


def check(kernel, device="h100"):
    assert kernel.spill_bytes == 0
    assert kernel.shared_bytes <= gpu(device).shared_per_block
    assert kernel.ptx.counts.get("mma.sync", 0) > 0


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in KINDS if n != "int3-g32-asym"]
)
def test_every_byte_of_the_cache_is_read_once_and_nothing_spills(name, rows):
    """A step of the loop asks for the bytes of a block, within 3 %; the codes by 8 or 16 bytes at a time."""
    kernel, cache, t = compiled(name, 128, rows)
    check(kernel)
    assert kernel.grid == (t.splits, K, B)
    steps = math.ceil(T / t.block / t.splits)
    read, held = kernel.bytes_of_step() * steps * kernel.blocks, sum(map(nbytes, cache))
    assert held <= read <= 1.03 * held
    codes = [load.bytes for load in kernel.ptx.loads if load.in_loop and load.kind == "cp.async"]
    assert codes and min(codes) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("device", ["h100", "a100"])
@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize("name", [n for n in KINDS if n != "int3-g32-asym"])
def test_nothing_spills_at_any_head_dim(name, dim, device):
    check(compiled(name, dim, 4, device)[0], device)


@pytest.mark.parametrize("device", ["l4", "b200"])
def test_it_compiles_for_ada_and_blackwell(device):
    check(compiled("int4-g32-asym", 128, 4, device)[0], device)


def test_windows_and_caps_do_not_spill():
    check(compiled("int4-g32-asym", 128, 4, window=4096, sink_tokens=4, soft_cap=50.0)[0])


@pytest.mark.parametrize("pages", [None, 40])
def test_a_cache_over_four_gpus_stays_where_it_is(pages):
    """Batch and heads over the devices: each has the kernel over its own part, and nothing of the cache is sent."""
    mesh = topologies.make_mesh(harness.topology("h100", (1, 1, 4)), (2, 2), ("batch", "heads"))
    paged = {} if pages is None else dict(pages=pages, page_size=64)
    cache = jax.eval_shape(lambda: kv_cache.init(4, 1024, 4, 64, "nvfp4", **paged))

    def place(a):
        heads = P("heads") if a.shape == (4,) and a.dtype == jnp.float32 else P(None if pages else "batch", "heads")
        spec = heads if a.ndim >= 3 or a.dtype == jnp.float32 else P("batch")
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

    q = jax.ShapeDtypeStruct((4, 1, 16, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P("batch", None, "heads")))
    with compat.lowering_for(gpu("h100").kind):
        lowered = jax.jit(lambda cache, q: kv_cache.attend(q, cache)).lower(jax.tree.map(place, cache), q)
    text = lowered.compile().as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1
    for moved in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert f"{moved}(" not in text and f"{moved}-start(" not in text
