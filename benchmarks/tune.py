"""Finds tilings on the GPU of this machine: compiles many for each problem, checks and times each, and keeps the fastest.

    python benchmarks/tune.py --what weights   [--formats int4-g128 int8] [--rows 16 64 4096] [--shapes 8192x8192]
    python benchmarks/tune.py --what codes     [--formats int8+int8 fp8+fp8] [--rows 16 4096]
    python benchmarks/tune.py --what attention [--formats int8 kivi4] [--length 32768] [--batch 16]

Programs are compiled by as many threads as there are processors. A time is that of the kernels alone, on the GPU (CUPTI),
the median of several runs, over copies of the weights or caches that exceed the L2 cache. What is wrong by more than the
rest of its kind is left out. All times go to `--out` (JSON); the fastest of each problem is printed.
"""

import argparse
import itertools
import json
import math
import os
import random as chance
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import attention as cached
import jax
import jax.numpy as jnp
import kernels as products
from clock import kernel_times

from jquant.kv_cache import kernel
from pallas_kernels.decode_attention import Coded, Rules, decode_attention, normalized, reference
from pallas_kernels.decode_attention import tilings as attention_tilings
from pallas_kernels.gpus import gpu
from pallas_kernels.low_precision_matmul import low_precision_matmul
from pallas_kernels.quantized_matmul import quantized_matmul, tilings, xla
from pallas_kernels.quantized_matmul.decode import decode
from pallas_kernels.quantized_matmul.elements import element


class Option(NamedTuple):
    """One way to run a problem: what to call it, and the function of `(fixed, moving)`."""

    name: str
    run: Callable[..., jax.Array]


class Case(NamedTuple):
    """A problem: its options, the argument that stays, those that take turns, and the result that is right."""

    name: str
    options: list[Option]
    fixed: Any
    moving: list[Any]
    want: jax.Array
    floor: float


def weights(args: argparse.Namespace) -> Iterator[Case]:
    g = gpu(args.device)
    for (n, k), m, name in itertools.product(args.shapes, args.rows, args.formats or ["int4-g128", "int8"]):
        f = products.FORMATS[name]
        xs, ws = products.arguments(f, m, n, k)
        x, copies = products.random(xs, jax.random.key(0)), products.copies(ws, g)
        want = jax.jit(products.product(f, args.device, right=True))(x, copies[0])
        options = [
            Option(f"{tuple(t)} {'packed' * packed}", partial(_weight_only, f, t, packed))
            for t, packed in weight_tilings(f, m, n, k, args)
        ]
        if m > 64:
            options += [Option(f"decoded {tuple(t)}", partial(_written, f, t)) for t in DECODE]
        options.append(Option("XLA decoded", partial(_decoded, f)))
        yield Case(f"{name} {m}x{n}x{k}", options, x, copies, want, products.roofline(f, m, n, k, g))


def _weight_only(f: products.Format, t: tilings.Tiling, packed: bool, x: jax.Array, w: Any) -> jax.Array:
    return quantized_matmul(x, *w, element=f.element, group_size=f.group, tiling=t, packed=packed)


DECODE = [tilings.Tiling(0, n, k, 1, w, 1) for n in (16, 32, 64) for k in (128, 256, 512) for w in (4, 8)]


def _written(f: products.Format, t: tilings.Tiling, x: jax.Array, w: Any) -> jax.Array:
    decoded = decode(*w, element=f.element, group_size=f.group, k=x.shape[1], dtype=x.dtype, tiling=t)
    return jax.lax.dot_general(x, decoded, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).astype(x.dtype)


def _decoded(f: products.Format, x: jax.Array, w: Any) -> jax.Array:
    return xla.quantized_matmul(x, *w, element=f.element, group_size=f.group)


def weight_tilings(f: products.Format, m: int, n: int, k: int, args: argparse.Namespace) -> list[Any]:
    rows = max(16, min(128, 1 << max(m - 1, 0).bit_length()))
    few = m <= 64
    sizes = itertools.product(
        (rows,) if few else (64, 128, 256),
        (32, 64, 128, 256) if few else (64, 128, 256),
        (64, 128, 256, 512) if few else (32, 64, 128),
        (1, 2, 4, 8, 16) if few else (1,),
        (2, 4, 8),
        (2, 3, 4, 5) if few else (2, 3, 4),
    )
    bits = element(f.element).bits
    out = []
    for t in itertools.starmap(tilings.Tiling, sizes):
        p = tilings.Problem(1, m, n, k, bits, 1, f.group or k)
        per_thread = t.block_m * t.block_n / (32 * t.warps)
        if tilings.shared_bytes(p, t) * t.stages > gpu(args.device).shared_per_block or per_thread > (64 if few else 128):
            continue
        if few and (t.warps > 2 * max(1, t.block_n // 16) or t.block_n // t.warps > 32):
            continue
        if f.group and t.block_k % f.group and f.group % t.block_k:
            continue
        if math.ceil(k / t.block_k) < 4 * t.split_k:
            continue
        out += [(t, packed) for packed in (True,)]
    return out


def codes(args: argparse.Namespace) -> Iterator[Case]:
    g = gpu(args.device)
    for (n, k), m, name in itertools.product(args.shapes, args.rows, args.formats or ["int8+int8", "fp8+fp8"]):
        f = products.FORMATS[name]
        xs, ws = products.arguments(f, m, n, k)
        x, copies = products.random(xs, jax.random.key(0)), products.copies(ws, g)
        want = jax.jit(products.product(f, args.device, right=True))(x, copies[0])
        run = lambda t, x, w: low_precision_matmul(x[0], w[0], x[1], w[1], tiling=t)
        options = [Option(f"{tuple(t)}", partial(run, t)) for t in code_tilings(m, k)]
        options += [Option("XLA", _xla_codes), Option("XLA bf16", _xla_bf16)]
        yield Case(f"{name} {m}x{n}x{k}", options, x, copies, want, products.roofline(f, m, n, k, g))


def code_tilings(m: int, k: int) -> list[tilings.Tiling]:
    rows = max(16, min(128, 1 << max(m - 1, 0).bit_length()))
    few = m <= 64
    sizes = itertools.product(
        (rows,) if few else (64, 128, 256), (32, 64, 128) if few else (64, 128, 256), (64, 128, 256), (1, 2, 4) if few else (1,),
        (2, 4, 8), (2, 3, 4, 5),
    )  # fmt: skip
    fits = lambda t: (t.block_m + t.block_n) * t.block_k * t.stages < 230000 and t.block_m * t.block_n / t.warps <= 4096
    return [t for t in itertools.starmap(tilings.Tiling, sizes) if fits(t) and (few or t.warps > 2)]


def _xla_codes(x: Any, w: Any) -> jax.Array:
    kind = jnp.int32 if x[0].dtype == jnp.int8 else jnp.float32
    sums = jax.lax.dot_general(x[0], w[0], (((1,), (1,)), ((), ())), preferred_element_type=kind)
    return (sums.astype(jnp.float32) * x[1] * w[1][:, 0]).astype(jnp.bfloat16)


def _xla_bf16(x: Any, w: Any) -> jax.Array:
    sums = jnp.matmul(x[0].astype(jnp.bfloat16), w[0].astype(jnp.bfloat16).T, preferred_element_type=jnp.float32)
    return (sums * x[1] * w[1][:, 0]).astype(jnp.bfloat16)


def caches(args: argparse.Namespace) -> Iterator[Case]:
    sizes = argparse.Namespace(batch=args.batch, length=args.length, heads=32, kv_heads=8, head_dim=128)
    for name in args.formats or cached.FORMATS:
        shapes = cached.shapes(name, sizes)
        floor = cached.cache_bytes(shapes) / gpu(args.device).bandwidth
        q = jax.random.normal(jax.random.key(1), (args.batch, 8, 4, 128), jnp.bfloat16)
        copies = [cached.random(shapes, jax.random.key(i)) for i in range(2)]
        want = jax.jit(partial(_cached, reference.decode_attention, {}))(q, copies[0])
        run = lambda t: partial(_cached, decode_attention, {"tiling": t})
        options = [Option(f"{tuple(t)}", run(t)) for t in attention_options(args)]
        yield Case(f"{name} {args.batch}x{args.length}", options, q, copies, want, floor)


def _cached(how: Any, more: dict[str, Any], q: jax.Array, cache: Any) -> jax.Array:
    """Attention over the codes as they are: a rotation of queries and results is not part of it."""
    fmt = cache.format
    stores = [Coded(*s) for s in (cache.keys, cache.values)]
    layouts = kernel.layout(fmt.keys), kernel.layout(fmt.values)
    rules = Rules(128**-0.5, None, fmt.sinks, None, fmt.sinks, False, 0)
    at = jnp.broadcast_to(cache.length[:, None] - 1, q.shape[:1] + q.shape[2:3])
    return normalized(how(q, *stores, at, cache.length, layouts=layouts, rules=rules, **more))


def attention_options(args: argparse.Namespace) -> list[attention_tilings.Tiling]:
    sizes = itertools.product((32, 64, 128, 256), (1, 2, 3, 4, 6, 8, 12, 16, 24), (1, 2, 4, 8), (2, 3, 4))
    wanted = lambda t: 8 <= t.block // t.warps <= 64 and args.length // t.splits >= 4 * t.block
    return [t for t in itertools.starmap(attention_tilings.Tiling, sizes) if wanted(t)]


def programs(options: list[Option], fixed: Any, moving: Any, pool: ThreadPoolExecutor) -> Iterator[tuple[Option, Any]]:
    """Each option and its program, or why there is none. Compiled by all processors while the first ones are timed."""

    def finished(lowered: Any) -> Any:
        try:
            return lowered.compile()
        except Exception as error:
            return error

    waiting = []
    for option in options:
        try:
            waiting.append((option, pool.submit(finished, jax.jit(option.run).lower(fixed, moving)).result))
        except Exception as error:
            waiting.append((option, lambda error=error: error))
    for option, result in waiting:
        yield option, result()


def error_of(got: jax.Array, want: jax.Array) -> float:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2)))


def measure(case: Case, args: argparse.Namespace, pool: ThreadPoolExecutor) -> list[dict[str, Any]]:
    """Every option: name, error, and microseconds of the kernel and of all kernels of its program, the median."""
    options = case.options
    if sum(o.name.startswith("(") for o in options) > args.limit:
        kept = [o for o in options if not o.name.startswith("(")]
        tried = [o for o in options if o.name.startswith("(")]
        options = chance.Random(0).sample(tried, args.limit) + kept
    rows = []
    for option, program in programs(options, case.fixed, case.moving[0], pool):
        if isinstance(program, Exception):
            rows.append({"name": option.name, "failed": f"{type(program).__name__}: {str(program)[:300]}"})
            continue
        try:
            error = error_of(program(case.fixed, case.moving[0]), case.want)
            runs = [kernel_times(program, case.fixed, w) for w in (case.moving * args.repeats)[: max(args.repeats, len(case.moving))]]
        except Exception as failure:
            rows.append({"name": option.name, "failed": f"{type(failure).__name__}: {str(failure)[:300]}"})
            continue
        every = statistics.median(sum(t for _, t in run) for run in runs) * 1e6
        main = statistics.median(max(t for _, t in run) for run in runs) * 1e6
        rows.append({"name": option.name, "error": error, "us": every, "kernel_us": main, "kernels": len(runs[0])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("weights", "codes", "attention"), required=True)
    parser.add_argument("--formats", nargs="+")
    parser.add_argument("--rows", type=int, nargs="+", default=[16])
    size = lambda text: tuple(int(s) for s in text.split("x"))
    parser.add_argument("--shapes", type=size, nargs="+", default=[(8192, 8192)], metavar="NxK")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="h100", help="whose roofline and shared memory")
    parser.add_argument("--limit", type=int, default=200, help="options of a problem, drawn by chance, at most")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--show", type=int, default=3, help="options that are printed")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no problem after this time")
    parser.add_argument("--out", default="tuned.json")
    args = parser.parse_args()
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for case in {"weights": weights, "codes": codes, "attention": caches}[args.what](args):
            begun = time.perf_counter()
            rows = measure(case, args, pool)
            found[case.name] = {"floor_us": case.floor * 1e6, "options": rows}
            with open(args.out, "w") as f:
                json.dump(found, f, indent=1)
            right = sorted((r for r in rows if "us" in r), key=lambda r: r["us"])
            failed = len(rows) - len(right)
            print(f"{case.name}: floor {case.floor * 1e6:.1f} us, {len(right)} options, {failed} failed, {time.perf_counter() - begun:.0f} s")
            for r in [*right[: args.show], *(r for r in right[args.show :] if "XLA" in r["name"])]:
                print(f"  {r['us']:8.1f} us ({r['kernel_us']:.1f} in {r['kernels']}) error {r['error']:.1e}  {r['name']}", flush=True)
            if failed:
                print("  failed:", next(r for r in rows if "failed" in r), flush=True)
            if time.perf_counter() - start > args.seconds:
                break


if __name__ == "__main__":
    main()
