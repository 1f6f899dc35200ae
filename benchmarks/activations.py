"""Weights and activations of SmolLM2-135M rounded together, beside llm-compressor's numbers.

    python benchmarks/activations.py [--rows w8a8 fp8 w4a8]

Protocol: benchmarks/README.md. Each row runs in a process of its own. Writes benchmarks/results/activations.md.
"""

import argparse
import json
import sys
import time

from gptq import ROOT, run, windows

# name: policy, method, llm-compressor's KL for the same (PEERS in benchmarks/README.md), None where it has no such row
ROWS = {
    "w8a8": ("int8+int8", "rtn", 0.0295),
    "w8a8-static": ("int8+int8-max-asym", "rtn", None),
    "w8a8-static-mse": ("int8+int8-mse-asym", "rtn", None),
    "fp8": ("fp8_e4m3+fp8_e4m3", "rtn", 0.0270),
    "w4a8": ("int4-g64+int8", "gptq", None),
    "w4a16": ("int4-g64", "gptq", None),
}


def ours(name: str, batch: int) -> dict:
    """One row in this process."""
    import jax
    import jax.numpy as jnp

    import jquant as jq
    import jquant.models

    policy, method, _ = ROWS[name]
    model = jq.models.load("demo")
    text = windows(model, "calibration", 64)
    batches = [jnp.asarray(text[i : i + batch]) for i in range(0, len(text), batch)]
    how = {"rtn": jq.rtn(), "gptq": jq.gptq(act_order=True)}[method]
    recipe = jq.Recipe({"*embed*": None, "*": jq.parse_policy(policy)})
    start = time.perf_counter()
    qparams = jax.block_until_ready(jq.quantize(model.apply, model.params, recipe, how, batches))
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    e = jq.evaluate(model.apply, model.params, qparams, [jnp.asarray(w)[None] for w in windows(model, "evaluation", 16)])
    return {"seconds": seconds, "evaluated": time.perf_counter() - start, "jax": jax.__version__, **e._asdict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["w8a8", "fp8", "w4a8"], choices=list(ROWS))
    parser.add_argument("--batch", type=int, default=2, help="windows to a batch")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT", json.dumps(ours(args.one, args.batch)))
        return
    lines = [
        "| policy | method | perplexity | KL | llm-compressor's KL | top-1 | seconds |", "|---|---|---|---|---|---|---|"
    ]  # fmt: skip
    print("\n".join(lines), flush=True)
    for name in args.rows:
        r = run([sys.executable, __file__, "--one", name, "--batch", str(args.batch)], JAX_PLATFORMS="cpu")
        policy, method, peer = ROWS[name]
        lines.append(
            f"| {policy} | {method} | {r['perplexity']:.2f} | {r['kl']:.4f} | {peer or ''} | {r['top1_agreement']:.1%} | "
            f"{r['seconds']:.0f} |"
        )
        print(lines[-1], flush=True)
    note = f"Float32 perplexity {r['perplexity_reference']:.2f}, jax {r['jax']}, {time.strftime('%Y-%m-%d')}."
    (ROOT / "benchmarks/results/activations.md").write_text("\n".join([*lines, "", note, ""]))


if __name__ == "__main__":
    main()
