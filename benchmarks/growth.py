"""Time and memory of a GPTQ run against width and depth, plotted: no term may grow faster than the algorithm's own.

    python benchmarks/growth.py [--widths 512 1024 2048 4096] [--depths 4 8 16 32]

A random decoder (jquant.models), int4 in groups of 128, 4 windows of 256 tokens. Each point is a process of its own. The
algorithm's own operations are counted: forward 2 P T, Gram matrices 2 T n^2 for every distinct input, factor n^3 / 3 and sweep
m n^2 for every solve. Writes benchmarks/results/growth.md and growth.png.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 4 * 256


def config(width: int, depth: int):
    from jquant.models import Config

    heads = width // 64
    return Config(
        vocab_size=1024, hidden_size=width, intermediate_size=2 * width, num_layers=depth, num_heads=heads,
        num_kv_heads=heads, head_dim=64, tied=True,
    )  # fmt: skip


def operations(width: int, depth: int) -> float:
    """Floating-point operations of one run."""
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (2 * width, width)]  # (n, rows m) of each solve
    layer = sum(2 * n * m * TOKENS + 2 * TOKENS * n * n + n**3 / 3 + m * n * n for n, m in shapes)
    return depth * layer


def point(width: int, depth: int) -> dict:
    import jax

    import jquant as jq
    from jquant import models

    cfg = config(width, depth)
    params = jax.block_until_ready(models.init(cfg, jax.random.key(0)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    batches = list(jax.random.randint(jax.random.key(1), (4, 1, 256), 0, 1024))
    start = time.perf_counter()
    recipe = {"*embed*": None, "*": jq.INT4_G128}
    jax.block_until_ready(jq.quantize(models.build(cfg), params, recipe, jq.gptq(), batches))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parameters = sum(a.nbytes for a in jax.tree.leaves(params)) / 2**30
    return {"seconds": seconds, "peak": peak, "before": before, "parameters": parameters}


def run(width: int, depth: int) -> dict:
    command = [sys.executable, __file__, "--point", str(width), str(depth)]
    out = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    lines = [x for x in out.stdout.splitlines() if x.startswith("RESULT ")]
    if not lines:
        raise SystemExit(out.stderr[-4000:])
    return json.loads(lines[-1].removeprefix("RESULT "))


def table(rows: list[tuple[int, int, dict]]) -> str:
    head = "| width | depth | seconds | TFLOP of the algorithm | GFLOP/s | parameters GiB | peak GiB |\n|---|---|---|---|---|---|---|"
    lines = []
    for w, d, r in rows:
        work = operations(w, d)
        rate = work / r["seconds"] / 1e9
        lines.append(
            f"| {w} | {d} | {r['seconds']:.1f} | {work / 1e12:.2f} | {rate:.0f} | {r['parameters']:.2f} | {r['peak']:.2f} |"
        )
    return "\n".join([head, *lines]) + "\n"


def plot(by_width: list[tuple[int, int, dict]], by_depth: list[tuple[int, int, dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, rows, at, name in ((axes[0], by_width, 0, "width"), (axes[1], by_depth, 1, "depth")):
        x = [r[at] for r in rows]
        ax.loglog(x, [r[2]["seconds"] for r in rows], "o-", label="seconds")
        ax.loglog(x, [r[2]["peak"] for r in rows], "s-", label="peak GiB")
        ax.loglog(x, [operations(r[0], r[1]) / 1e11 for r in rows], "--", color="gray", label="operations / 100 GFLOP")
        other = f"depth {rows[0][1]}" if at == 0 else f"width {rows[0][0]}"
        ax.set(xlabel=f"{name} ({other})", xticks=x, xticklabels=[str(v) for v in x])
        ax.minorticks_off()
        ax.legend()
        ax.grid(alpha=0.3)
    figure.suptitle("GPTQ of a random decoder: time and memory")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--point", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print("RESULT", json.dumps(point(*args.point)))
        return
    by_width = [(w, 4, run(w, 4)) for w in args.widths]
    by_depth = [(512, d, run(512, d)) for d in args.depths]
    text = table([*by_width, *by_depth])
    print(text)
    results = ROOT / "benchmarks/results"
    (results / "growth.md").write_text(text)
    plot(by_width, by_depth, results / "growth.png")


if __name__ == "__main__":
    main()
