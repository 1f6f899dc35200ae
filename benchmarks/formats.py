"""What the 4-bit float formats cost SmolLM2-135M, weights only: round to nearest, searched, and GPTQ.

    python benchmarks/formats.py [--formats nvfp4 mxfp4 ...] [--methods rtn rtn-search gptq]

Protocol: benchmarks/README.md. Writes benchmarks/results/formats.md.
"""

import argparse
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from gptq import windows

import jquant as jq
from jquant.core import memory

RESULT = Path(__file__).resolve().parent / "results/formats.md"
FORMATS = ["mxfp4", "mxfp4-even", "mxfp4-ceil", "nvfp4", "nvfp4-4o6", "nf4-dq"]
METHODS = {"rtn": jq.rtn(), "rtn-search": jq.rtn(search=True), "gptq": jq.gptq(act_order=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    memory.give_back_at_once()
    model = jq.models.load("demo")
    text = windows(model, "calibration", 64)
    batches = [jnp.asarray(text[i : i + 2]) for i in range(0, len(text), 2)]
    held = [jnp.asarray(w)[None] for w in windows(model, "evaluation", 16)]
    lines = ["| format | method | bits/weight | KL | perplexity | top-1 | seconds |", "|---|---|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    for method in args.methods:
        for fmt in args.formats:
            recipe = jq.Recipe({"*embed*": None, "*": jq.parse_format(fmt)})
            start = time.perf_counter()
            q = jax.block_until_ready(jq.quantize(model.apply, model.params, recipe, METHODS[method], batches))
            seconds = time.perf_counter() - start
            e, bits = jq.evaluate(model.apply, model.params, q, held), jq.report.bits_per_weight(q)
            row = f"| {fmt} | {method} | {bits:.2f} | {e.kl:.4f} | {e.perplexity:.2f} | {e.top1_agreement:.1%} | {seconds:.0f} |"
            print(row, flush=True)
            lines.append(row)
            note = f"Float32 perplexity {e.perplexity_reference:.2f}. {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, jax {jax.__version__}."
            RESULT.write_text("\n".join(lines) + f"\n\n{note}\n")  # after every row: an interrupted run leaves its rows


if __name__ == "__main__":
    main()
