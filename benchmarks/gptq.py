"""The whole GPTQ run on SmolLM2-135M, beside llm-compressor's with the same settings, in one run.

    python benchmarks/gptq.py [--formats int4-g64-f32 int3-g64-asym-f32] [--peer-python .venv-peer/bin/python]

Protocol: benchmarks/README.md. Each side runs in a process of its own, one after the other, so that seconds and peak memory
are its own. Writes benchmarks/results/gptq.md.
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
PEERS = {"int4-g64-f32": "gptq4_sym_g64", "int4-g64-asym-f32": "gptq4_asym_g64", "int3-g64-asym-f32": "gptq3_asym_g64"}


def windows(model, name: str, count: int, length: int = 512):
    import numpy as np

    ids = model.tokenizer.encode((ROOT / "data" / f"{name}.txt").read_text())
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)


def ours(fmt: str, batch: int) -> dict:
    """One run in this process."""
    import jax
    import jax.numpy as jnp

    import jquant as jq
    import jquant.models

    model = jq.models.load("demo")
    text = windows(model, "calibration", 64)
    batches = [jnp.asarray(text[i : i + batch]) for i in range(0, len(text), batch)]
    recipe = jq.Recipe({"*embed*": None, "*": jq.parse_format(fmt)})
    start = time.perf_counter()
    qparams = jax.block_until_ready(
        jq.quantize(model.apply, model.params, recipe, jq.gptq(act_order=True), batches)
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    held = [jnp.asarray(w)[None] for w in windows(model, "evaluation", 16)]
    e = jq.evaluate(model.apply, model.params, qparams, held)
    return {
        "seconds": seconds, "peak_gb": peak, "kl": e.kl, "ppl": e.perplexity, "top1": e.top1_agreement, "jax": jax.__version__,
        "float": e.perplexity_reference, "mb": e.bytes / 1e6,
    }  # fmt: skip


def run(command: list[str], **env: str) -> dict:
    """The RESULT line of a process."""
    out = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, cwd=ROOT)
    lines = [x for x in out.stdout.splitlines() if x.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{' '.join(command)} failed:\n{out.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def peer(python: str, name: str) -> dict:
    r = run([python, str(ROOT / "benchmarks/peers/llm_compressor.py"), name])
    e = r["evaluation"]
    return {"seconds": r["seconds"], "peak_gb": r["peak_gb"], "kl": e["kl"], "ppl": e["ppl"], "top1": e["top1"]}


def matmul_rate() -> float:
    """GFLOP/s of a 2048-cube float32 matmul now: the machine is shared, so it is told beside every number."""
    code = (
        "import jax, jax.numpy as jnp, time\nx = jnp.ones((2048, 2048))\nf = jax.jit(jnp.dot)\nf(x, x).block_until_ready()\n"
        "t = min((lambda s: (f(x, x).block_until_ready(), time.perf_counter() - s)[1])(time.perf_counter()) for _ in range(9))\n"
        "print('RESULT', 2 * 2048**3 / t / 1e9)"
    )
    return run([sys.executable, "-c", code], JAX_PLATFORMS="cpu")  # type: ignore[return-value]


def table(rows: list[tuple[str, str, dict, float]]) -> str:
    head = "| format | by | perplexity | KL | top-1 | seconds | peak GB | matmul GFLOP/s before |\n|---|---|---|---|---|---|---|---|"
    lines = [
        f"| {fmt} | {who} | {r['ppl']:.2f} | {r['kl']:.4f} | {r['top1']:.1%} | {r['seconds']:.0f} | {r['peak_gb']:.2f} | {rate:.0f} |"
        for fmt, who, r, rate in rows
    ]
    return "\n".join([head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["int4-g64-f32", "int3-g64-asym-f32"], choices=list(PEERS))
    parser.add_argument("--peer-python", help="a Python that has llmcompressor 0.14.0.1, torch 2.13.0 and gguf")
    parser.add_argument("--batch", type=int, default=4, help="windows to a batch")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT", json.dumps(ours(args.one, args.batch)))
        return
    rows = []
    for fmt in args.formats:
        rate = matmul_rate()
        mine = run([sys.executable, __file__, "--one", fmt, "--batch", str(args.batch)], JAX_PLATFORMS="cpu")
        rows.append((fmt, f"jquant (jax {mine['jax']})", mine, rate))
        print(table(rows[-1:]), flush=True)
        if args.peer_python:
            rows.append((fmt, "llm-compressor 0.14.0.1", peer(args.peer_python, PEERS[fmt]), matmul_rate()))
            print(table(rows[-1:]), flush=True)
    text = table(rows) + f"\n\nFloat32 perplexity {mine['float']:.2f}. {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores.\n"
    print(text)
    (ROOT / "benchmarks/results/gptq.md").write_text(text)


if __name__ == "__main__":
    main()
