"""Finds tilings on the GPU of this machine: compiles many for each problem, checks and times each, and keeps the fastest.

    python benchmarks/tune.py --what weights   [--formats int4-g128 int8] [--rows 16 64 4096] [--shapes 8192x8192]
    python benchmarks/tune.py --what codes     [--formats int8+int8 fp8+fp8] [--rows 16 4096]
    python benchmarks/tune.py --what attention [--formats int8 kivi4] [--length 32768] [--batch 16]

Programs are compiled by as many threads as there are processors. A time is that of the kernels alone, on the GPU (CUPTI),
the median of several runs, over copies of the weights or caches that exceed the L2 cache. All times go to `--out` (JSON), the
fastest are printed; with `--write` the fastest tiling of each problem goes to pallas_kernels/tuned.json, in the place of
one that was found for the same sizes before. `quantized_matmul` and `decode_attention` read it.
"""

import argparse
import itertools
import json
import math
import random as chance
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import attention as cached
import jax
import jax.numpy as jnp
import kernels as products
from clock import compiled, error_of, in_turns

from jquant.kv_cache import kernel
from pallas_kernels.decode_attention import Coded, Rules, decode_attention, normalized, reference
from pallas_kernels.decode_attention import attention as parts
from pallas_kernels.decode_attention import tilings as attention_tilings
from pallas_kernels.gpus import gpu
from pallas_kernels.low_precision_matmul import low_precision_matmul
from pallas_kernels.quantized_matmul import quantized_matmul, rings, tilings, xla
from pallas_kernels.quantized_matmul.decode import decode
from pallas_kernels.quantized_matmul.elements import element


class Option(NamedTuple):
    """One way to run a problem: what to call it, the function of `(fixed, moving)`, and its tiling, if it has one."""

    name: str
    run: Callable[..., jax.Array]
    tiling: Any = None


class Case(NamedTuple):
    """A problem: its sizes, its options, the argument that stays, those that take turns, and the result that is right."""

    name: str
    sizes: dict[str, int | str]
    options: list[Option]
    fixed: Any
    moving: list[Any]
    want: jax.Array
    floor: float


def weights(args: argparse.Namespace) -> Iterator[Case]:
    def options(f: products.Format, m: int, n: int, k: int) -> list[Option]:
        out = [Option(f"{tuple(t)}", partial(_weight_only, f, t), t) for t in weight_tilings(f, m, n, k, args)]
        out += [Option(f"{r}", partial(_weight_only, f, r), r) for r in weight_rings(f, m, n, k, args)]
        if m > 64:
            out += [Option(f"decoded {tuple(t)}", partial(_written, f, t)) for t in DECODE]
        return [*out, Option("XLA decoded", partial(_decoded, f))]

    sizes = lambda f, m, n, k: tilings.sizes(tilings.Problem(1, m, n, k, element(f.element).bits, 1, f.group or k))
    return _of_products(args, ["int4-g128", "int8"], options, sizes)


def _of_products(
    args: argparse.Namespace,
    formats: list[str],
    options: Callable[..., list[Option]],
    sizes: Callable[..., dict[str, int | str]],
) -> Iterator[Case]:
    """A case for each shape, number of rows and format, by what `options` and `sizes` say of `(format, m, n, k)`."""
    g = gpu(args.device)
    for (n, k), m, name in itertools.product(args.shapes, args.rows, args.formats or formats):
        f = products.FORMATS[name]
        xs, ws = products.arguments(f, m, n, k)
        x, copies = products.random(xs, jax.random.key(0)), products.copies(ws, g)
        want = jax.jit(products.product(f, args.device, right=True))(x, copies[0])
        floor = products.roofline(f, m, n, k, g)
        yield Case(f"{name} {m}x{n}x{k}", sizes(f, m, n, k), options(f, m, n, k), x, copies, want, floor)


def _weight_only(f: products.Format, t: tilings.Tiling, x: jax.Array, w: Any) -> jax.Array:
    return quantized_matmul(x, *w, element=f.element, group_size=f.group, tiling=t)


DECODE = [tilings.Tiling(0, n, k, 1, w, 1) for n in (16, 32, 64) for k in (128, 256, 512) for w in (4, 8)]


def _written(f: products.Format, t: tilings.Tiling, x: jax.Array, w: Any) -> jax.Array:
    decoded = decode(*w, element=f.element, group_size=f.group, k=x.shape[1], dtype=x.dtype, tiling=t)
    return jax.lax.dot_general(x, decoded, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype)


def _decoded(f: products.Format, x: jax.Array, w: Any) -> jax.Array:
    return xla.quantized_matmul(x, *w, element=f.element, group_size=f.group)


def weight_tilings(f: products.Format, m: int, n: int, k: int, args: argparse.Namespace) -> list[tilings.Tiling]:
    """All that may be fast: 16 to 64 rows of the weight for a warp, programs for every core at a time."""
    rows, few = max(16, min(128, 1 << max(m - 1, 0).bit_length())), m <= tilings.FEW
    sizes = itertools.product(
        (rows,) if few else (64, 128, 256), (32, 64, 128, 256), (128, 256, 512) if few else (32, 64, 128),
        (1, 2, 4, 8, 16) if few else (1,), (1, 2, 4, 8), (2, 3, 4), (False, True) if rows > 16 and f.group else (False,),
    )  # fmt: skip
    p = tilings.Problem(1, m, n, k, element(f.element).bits, 1, f.group or k)
    cores, room = gpu(args.device).cores, gpu(args.device).shared_per_block

    def fits(t: tilings.Tiling) -> bool:
        in_registers = t.block_m * t.block_n <= 64 * 32 * t.warps and 16 * t.warps <= t.block_n <= 64 * t.warps
        whole = not f.group or t.block_k % f.group == 0 or f.group % t.block_k == 0
        work = cores * 0.7 <= tilings.programs(p, t) <= 12 * cores or not few
        steps = math.ceil(k / t.block_k) >= 4 * t.split_k
        return in_registers and whole and work and steps and tilings.shared_bytes(p, t) * t.stages <= room

    return [t for t in itertools.starmap(tilings.Tiling, sizes) if fits(t)]


def weight_rings(f: products.Format, m: int, n: int, k: int, args: argparse.Namespace) -> list[rings.Ring]:
    """All that fit, for the kernel through Mosaic; none where it can't do the product."""
    g, group = gpu(args.device), rings.group_of(f.group, k)
    zero = jnp.uint8 if f.asymmetric else None
    if g.arch != 90 or rings.why_not(f.element, f.group, m, n, k, jnp.bfloat16, jnp.dtype(f.scale), zero):
        return []
    sizes = itertools.product((32, 64, 128, 256), (4, 6, 8, 9, 12, 16, 24), (2, 3, 4, 6), (1, 2, 4, 8), (False, True))

    def fits(r: rings.Ring) -> bool:
        small = rings.unit_of(f.element, group) < 64 or element(f.element).bits < 4
        if r.inside and small or r.slots % r.workers or r.stage_bytes * 8 // element(f.element).bits % rings.unit_of(f.element, group):
            return False
        p = rings.planned(f.element, group, m, n, k, r, 1, g)
        blocks = r.split_k * n // rings.HEIGHT
        return rings.shared_bytes(p) <= g.shared_per_block and g.cores * 0.4 <= blocks <= 3 * g.cores and p.steps >= 4 * r.split_k

    return [r for r in itertools.starmap(rings.Ring, sizes) if fits(r)]


def codes(args: argparse.Namespace) -> Iterator[Case]:
    run = lambda t, x, w: low_precision_matmul(x[0], w[0], x[1], w[1], tiling=t)

    def options(f: products.Format, m: int, n: int, k: int) -> list[Option]:
        ours = [Option(f"{tuple(t)}", partial(run, t), t) for t in code_tilings(m, k)]
        return [*ours, Option("XLA", products.xla_of_codes)]

    return _of_products(args, ["int8+int8", "fp8+fp8"], options, lambda *_: {})


def code_tilings(m: int, k: int) -> list[tilings.Tiling]:
    rows = max(16, min(128, 1 << max(m - 1, 0).bit_length()))
    few = m <= 64
    sizes = itertools.product(
        (rows,) if few else (64, 128, 256), (32, 64, 128) if few else (64, 128, 256), (64, 128, 256), (1, 2, 4) if few else (1,),
        (2, 4, 8), (2, 3, 4, 5),
    )  # fmt: skip
    fits = lambda t: (t.block_m + t.block_n) * t.block_k * t.stages < 230000 and t.block_m * t.block_n / t.warps <= 4096
    return [t for t in itertools.starmap(tilings.Tiling, sizes) if fits(t) and (few or t.warps > 2)]


def caches(args: argparse.Namespace) -> Iterator[Case]:
    sizes = argparse.Namespace(batch=args.batch, length=args.length, heads=32, kv_heads=8, head_dim=128)
    for name in args.formats or cached.FORMATS:
        shapes = cached.shapes(name, sizes)
        floor = cached.cache_bytes(shapes) / gpu(args.device).bandwidth
        q = jax.random.normal(jax.random.key(1), (args.batch, 8, 4, 128), jnp.bfloat16)
        copies = [cached.random(shapes, jax.random.key(i)) for i in range(2)]
        want = jax.jit(partial(_cached, reference.decode_attention, {}))(q, copies[0])
        run = lambda t: partial(_cached, decode_attention, {"tiling": t})
        options = [Option(f"{tuple(t)}", run(t), t) for t in attention_options(args)]
        stores = [Coded(*s) for s in (shapes.keys, shapes.values)]
        layouts = kernel.layout(shapes.format.keys), kernel.layout(shapes.format.values)
        p = parts.problem((args.batch, 8, 4, 128), *stores, layouts, args.length, 1 << 20)
        sequences = {**attention_tilings.sizes(p), "sequences": args.batch * 8, "length": args.length}
        yield Case(f"{name} {args.batch}x{args.length}", sequences, options, q, copies, want, floor)


def _cached(how: Any, more: dict[str, Any], q: jax.Array, cache: Any) -> jax.Array:
    """Attention over the codes as they are: a rotation of queries and results is not part of it."""
    fmt = cache.format
    stores = [Coded(*s) for s in (cache.keys, cache.values)]
    layouts = kernel.layout(fmt.keys), kernel.layout(fmt.values)
    rules = Rules(128**-0.5, None, fmt.sinks, None, fmt.sinks, False, 0)
    at = jnp.broadcast_to(cache.length[:, None] - 1, q.shape[:1] + q.shape[2:3])
    return normalized(how(q, *stores, at, cache.length, layouts=layouts, rules=rules, **more))


def attention_options(args: argparse.Namespace) -> list[attention_tilings.Tiling]:
    """All that may be fast: 16 to 64 slots for a warp, one to twelve warps on a core's scheduler."""
    splits = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    sizes = itertools.product((32, 64, 128, 256), splits, (1, 2, 4, 8), (2, 3, 4))

    def wanted(t: attention_tilings.Tiling) -> bool:
        warps = args.batch * 8 * t.splits * t.warps / gpu(args.device).cores
        return 16 <= t.block // t.warps <= 64 and args.length // t.splits >= 4 * t.block and 4 <= warps <= 48

    return [t for t in itertools.starmap(attention_tilings.Tiling, sizes) if wanted(t)]


def measure(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every option: name, error, and microseconds of the longest and of all kernels of its program, the median."""
    tried, others = [o for o in case.options if o.tiling], [o for o in case.options if not o.tiling]
    options = chance.Random(0).sample(tried, min(len(tried), args.limit)) + others
    rows = []
    programs = compiled((option.run, (case.fixed, case.moving[0])) for option in options)
    for option, program in zip(options, programs):
        row: dict[str, Any] = {"name": option.name, "tiling": option.tiling and list(option.tiling)}
        try:
            row["error"] = error_of(products.run_or_raise(program, case.fixed, case.moving[0]), case.want)
            runs = in_turns(program, case.fixed, case.moving, args.repeats)
            row["us"] = statistics.median(sum(t for _, t in run) for run in runs) * 1e6
            row["kernel_us"] = statistics.median(max(t for _, t in run) for run in runs) * 1e6
        except Exception as failure:  # an option that fails must not hide the others
            row["failed"] = f"{type(failure).__name__}: {str(failure)[:300]}"
        rows.append(row)
    return rows


def write(kernel: str, device: str, sizes: dict[str, int | str], best: dict[str, Any]) -> None:
    """Puts the tiling into pallas_kernels/tuned.json."""
    known = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    rows = known.setdefault(device, {}).setdefault(kernel, [])
    rows[:] = [r for r in rows if any(r[name] != value for name, value in sizes.items())]
    rows.append(
        {
            **sizes,
            "tiling": best["tiling"],
            "us": round(best["us"], 1),
            "where": f"{jax.devices()[0].device_kind}, jax {jax.__version__}",
        }
    )
    lines = {d: {k: [json.dumps(r) for r in rows] for k, rows in kernels.items()} for d, kernels in known.items()}
    text = json.dumps(lines, indent=1)
    for kernels in lines.values():
        for row in itertools.chain(*kernels.values()):
            text = text.replace(json.dumps(row), row)
    TUNED.with_suffix(".new").write_text(text + "\n")
    TUNED.with_suffix(".new").replace(TUNED)


def tune(args: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints every problem; all times."""
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    start = time.perf_counter()
    for case in {"weights": weights, "codes": codes, "attention": caches}[args.what](args):
        begun = time.perf_counter()
        rows = measure(case, args)
        found[case.name] = {"floor_us": case.floor * 1e6, "options": rows}
        with open(args.out, "w") as f:
            json.dump(found, f, indent=1)
        right = sorted((r for r in rows if "us" in r), key=lambda r: r["us"])
        failed = [r for r in rows if "failed" in r]
        took = time.perf_counter() - begun
        print(f"{case.name}: floor {case.floor * 1e6:.1f} us, {len(right)} options, {len(failed)} failed, {took:.0f} s")
        for r in [*right[: args.show], *(r for r in right[args.show :] if "XLA" in r["name"])]:
            print(f"  {r['us']:8.1f} us ({r['kernel_us']:.1f}) error {r['error']:.1e}  {r['name']}", flush=True)
        if failed:
            print("  failed:", failed[0], flush=True)
        ours = [r for r in right if r["tiling"]]
        through_mosaic = lambda r: r["name"].startswith("Ring")
        for name, mine in ((NAMES.get(args.what, ""), [r for r in ours if not through_mosaic(r)]), (MOSAIC, filter(through_mosaic, ours))):
            if args.write and case.sizes and (best := next(iter(mine), None)):
                write(name, args.device, case.sizes, best)
        if time.perf_counter() - start > args.seconds:
            break
    return found


MOSAIC = "quantized_matmul through mosaic"
NAMES = {"weights": "quantized_matmul", "attention": "decode_attention"}
TUNED = Path(__file__).resolve().parent.parent / "pallas_kernels/tuned.json"


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
    parser.add_argument("--write", action="store_true", help="put the fastest into pallas_kernels/tuned.json")
    tune(parser.parse_args())


if __name__ == "__main__":
    main()
