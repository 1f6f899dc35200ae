"""Decoding attention over a quantized cache, by the kernel: checked, timed and tabled; one command.

    python benchmarks/attention.py [--length 32768] [--batch 16] [--formats int8 kivi4] [--device h100]

The shape is Llama-3.1-8B's by default: 32 query heads, 8 kv heads, head_dim 128, one token for each sequence.

On a GPU: the error against the plain path, microseconds of all kernels of attention over the codes on the GPU (CUPTI;
launches and gaps are not in it, nor is the rotation of queries) and of XLA's attention over bfloat16 keys and values by the same clock in the same run, the ratio,
and the rate at which the cache is read over that of a large copy, measured first.

Elsewhere: what the compiler says, for `--device`: registers, spills, shared memory, occupancy, programs, instructions of
a step of the loop for each token, bytes that are read over those of the cache. No speed is claimed there.
"""

import argparse
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from clock import ceilings, compiled, error_of, on_gpu
from kernels import run_or_raise

from jquant import kv_cache
from jquant.kv_cache import attention, kernel
from jquant.kv_cache.cache import read_ranges
from jquant.kv_cache.softmax import Rules
from pallas_kernels import harness
from pallas_kernels.decode_attention import attention as parts
from pallas_kernels.gpus import GPUS, gpu

FORMATS = [
    "bfloat16", "fp8_e4m3", "fp8_e4m3-tensor", "fp8_e5m2", "int8", "int4-g64-asym", "int4-g32-asym-rot", "kivi4", "kivi2",
    "nvfp4", "turbo4", "turbo2",
]  # fmt: skip


def shapes(name: str, args: argparse.Namespace) -> kv_cache.KVCache:
    make = lambda: kv_cache.init(args.batch, args.length, args.kv_heads, args.head_dim, name)
    return jax.eval_shape(make)


def cache_bytes(cache: kv_cache.KVCache) -> int:
    """Of codes, scales and zero points."""
    stores = [s._replace(static=None) for s in (cache.keys, cache.values)]
    return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(stores))


def run(which, q: jax.Array, cache: kv_cache.KVCache):
    """Attention over the codes, by the kernel or the plain path; q `[B, 1, H, D]`."""
    batch, _, heads, dim = q.shape
    kv_heads = cache.keys.codes[0].shape[1]
    q5 = q.astype(jnp.float32).reshape(batch, 1, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    rules = Rules(cache.length[:, None] - 1, None, 0, dim**-0.5, None)
    more = dict(shift=None, table=None, page_size=0, ring=False)
    if which is attention.codes_attention:
        more["capacity"] = cache.capacity
    state = which(q5, cache.keys, cache.values, cache.format, rules, read_ranges(cache), **more)
    return (state.out / state.total).astype(q.dtype)


# --- on a GPU ---


def random(cache: kv_cache.KVCache, key: jax.Array) -> kv_cache.KVCache:
    """Codes of any bits (of 8-bit floats: finite ones), scales near one, full to the last position."""

    def one(a, key):
        if a.dtype == jnp.bool:
            return jnp.zeros(a.shape, bool)
        if a.dtype == jnp.int32:
            return jnp.full(a.shape, cache.capacity, jnp.int32)
        if a.dtype == jnp.uint8:
            return jax.random.bits(key, a.shape, jnp.uint8) & np.uint8(0xBB)
        return jax.random.uniform(key, a.shape, jnp.float32, 0.01, 0.02).astype(a.dtype)

    leaves, tree = jax.tree.flatten(cache)
    return tree.unflatten([one(a, k) for a, k in zip(leaves, jax.random.split(key, len(leaves)))])


def timed(args: argparse.Namespace) -> None:
    """Prints the lines."""
    copy, _ = ceilings()
    q = jax.random.normal(jax.random.key(1), (args.batch, 1, args.heads, args.head_dim), jnp.bfloat16)
    of = jax.ShapeDtypeStruct((args.batch, args.length, args.kv_heads, args.head_dim), jnp.bfloat16)
    plain = lambda q, kv: jax.nn.dot_product_attention(q, *kv)
    [program] = compiled([(plain, (q, (of, of)))])
    kv = tuple(jax.random.normal(jax.random.key(i), of.shape, of.dtype) for i in (2, 3))
    xla = on_gpu(program, q, [kv])
    del kv
    print(f"A copy moves {copy / 1e12:.2f} TB/s; XLA's attention takes {xla * 1e6:.0f} us.\n\n{head(True)}", flush=True)
    ways = kernel.codes_attention, attention.codes_attention
    programs = compiled((partial(run, way), (q, shapes(name, args))) for name in args.formats for way in ways)
    for name, ours, right in zip(args.formats, programs, programs):
        try:
            cache = random(shapes(name, args), jax.random.key(0))
            got, want = (run_or_raise(p, q, cache) for p in (ours, right))
            error = error_of(got, want)
            mine = on_gpu(ours, q, [cache])
        except Exception as failure:  # one kernel that fails must not hide the others
            print(f"| {name} | {type(failure).__name__}: {str(failure)[:200]} |", flush=True)
            continue
        rate = cache_bytes(cache) / mine / copy
        print(f"| {name} | {cache_bytes(cache) / 1e6:.0f} | {error:.1e} | {mine * 1e6:.1f} | {xla / mine:.2f} | {rate:.0%} |", flush=True)


# --- without ---


def static(name: str, args: argparse.Namespace) -> str:
    cache = shapes(name, args)
    q = jax.ShapeDtypeStruct((args.batch, 1, args.heads, args.head_dim), jnp.bfloat16)
    program = harness.compile_for(args.device, lambda q, c: run(kernel.codes_attention, q, c), q, cache)
    [k] = program.named("decode_attention")
    rows = (args.batch, args.kv_heads, args.heads // args.kv_heads, args.head_dim)
    stores = [parts.Coded(*s) for s in (cache.keys, cache.values)]
    layouts = kernel.layout(cache.format.keys), kernel.layout(cache.format.values)
    t = parts.choose(parts.problem(rows, *stores, layouts, cache.capacity, 1 << 20), args.device, gpu(args.device))
    steps = math.ceil(cache.capacity / t.block / t.splits)
    read = k.bytes_of_step() * steps * k.blocks / cache_bytes(cache)
    held = cache_bytes(cache)
    return (
        f"| {name} | {t.block} x {t.splits} | {t.warps}, {t.stages} | {k.registers} | {k.spill_bytes} | {k.shared_bytes} "
        f"| {k.occupancy(args.device):.0%} | {k.blocks} | {k.ptx.counts['all']} | {k.ptx.counts.get('mma.sync', 0)} "
        f"| {read:.3f} | {held / 1e6:.0f} | {held / gpu(args.device).bandwidth * 1e6:.0f} |"
    )


HEADS = {
    True: "| format | cache, MB | error | kernels, us | ratio to XLA's bf16 | of the bandwidth |",
    False: "| format | block x splits | warps, stages | registers | spills | shared memory | occupancy | blocks "
    "| PTX instructions | tensor core products | bytes read / cache | cache, MB | roofline, us |",
}


def head(on_gpu: bool) -> str:
    return HEADS[on_gpu] + "\n|" + "---|" * (HEADS[on_gpu].count("|") - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("length", 32768), ("batch", 16), ("heads", 32), ("kv_heads", 8), ("head_dim", 128)):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--device", default="h100", choices=list(GPUS))
    args = parser.parse_args()
    here = jax.default_backend() == "gpu"
    kind = jax.devices()[0].device_kind if here else "compiled for " + gpu(args.device).kind
    print(f"{kind}, jax {jax.__version__}; {args.batch} sequences of {args.length}, {args.heads} heads, ", end="")
    print(f"{args.kv_heads} kv heads, head_dim {args.head_dim}")
    if here:
        return timed(args)
    print("\n" + head(False), flush=True)
    for name in args.formats:
        try:
            row = static(name, args)
        except Exception as error:  # one kernel that fails must not hide the others
            row = f"| {name} | {type(error).__name__}: {str(error)[:200]} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
