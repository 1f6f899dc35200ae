"""Decoding and prefill of a decoder with float and quantized weights on this device, tokens per second.

    python benchmarks/decode.py [--model demo] [--prefill 512] [--tokens 48]

Every variant runs in the same process, in turn, several times; the best of each counts. Beside it: the bytes of weights that
a decoded token reads and the rate at which they were read, next to the rate of a plain reduction over the same bytes.
Writes benchmarks/results/decode-<device>.md.
"""

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jquant as jq
import jquant.models

ROOT = Path(__file__).resolve().parent.parent
FORMATS = {"int8": "int8", "int4 g64": "int4-g64"}


def variants(model: Any) -> dict[str, tuple[Any, Any]]:
    """Name -> (apply, params): the float model in two dtypes, then quantized ones in float32 and bfloat16."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.params)
    out: dict[str, tuple[Any, Any]] = {"float32": (model.apply, model.params), "bfloat16": (model.apply, half)}
    for name, fmt in FORMATS.items():
        recipe = jq.Recipe({"*embed*": None, "*": jq.parse_format(fmt)})
        for dtype, params in (("float32", model.params), ("bfloat16", half)):
            q = jq.quantize(model.apply, params, recipe, jq.rtn(), [tokens])
            out[f"{name}, {dtype}"] = (jq.quantized(model.apply), q)
    return out


def best(fn: Any, repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(time.perf_counter() - start)
    return min(times)


def measure(model: Any, apply: Any, params: Any, prefill: int, tokens: int) -> dict[str, float]:
    prompt = jnp.asarray(np.arange(prefill)[None] % 1000 + 1, jnp.int32)
    forward = jax.jit(lambda p, t: apply(p, t, logits_at=jnp.full((1, 1), prefill - 1, jnp.int32)))
    jax.block_until_ready(forward(params, prompt))
    run = lambda: jq.models.generate(apply, params, prompt[:, :8], model.config, max_tokens=tokens)
    run()
    decode = max(run().decode_tokens_per_second for _ in range(3))
    return {"prefill": prefill / best(lambda: forward(params, prompt), 5), "decode": float(decode)}


def read_rate(params: Any) -> float:
    """GB/s of one plain pass over the arrays of `params`."""
    arrays = [a for a in jax.tree.leaves(params) if a.size > 1 << 16]
    total = jax.jit(lambda xs: sum(jnp.sum(x.reshape(-1, x.shape[-1]), axis=0, dtype=jnp.float32)[0] for x in xs))
    jax.block_until_ready(total(arrays))
    return sum(a.nbytes for a in arrays) / best(lambda: total(arrays), 5) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    model = jq.models.load(args.model)
    rate = read_rate(model.params)
    head = "| weights, compute | MB | prefill tok/s | x bf16 | decode tok/s | x bf16 | weights read GB/s | of a plain read |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    base: dict[str, float] = {}
    results = {}
    for name, (apply, params) in variants(model).items():
        results[name] = measure(model, apply, params, args.prefill, args.tokens)
        results[name]["bytes"] = sum(a.nbytes for a in jax.tree.leaves(params))
        print(name, {k: round(v, 1) for k, v in results[name].items()}, flush=True)
    base = results["bfloat16"]
    for name, r in results.items():
        gbs = r["bytes"] * r["decode"] / 1e9
        lines.append(
            f"| {name} | {r['bytes'] / 1e6:.0f} | {r['prefill']:.0f} | {r['prefill'] / base['prefill']:.2f} | {r['decode']:.1f} | "
            f"{r['decode'] / base['decode']:.2f} | {gbs:.1f} | {gbs / rate:.0%} |"
        )
    device = jax.devices()[0].device_kind
    text = "\n".join(lines) + (
        f"\n\n{device}, {os.cpu_count()} cores, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}. Prefill of {args.prefill} tokens, "
        f"decoding of {args.tokens}, batch 1. A plain read of the float32 weights: {rate:.1f} GB/s.\n"
    )
    print(text)
    name = f"decode-{jax.devices()[0].platform}-jax{'.'.join(jax.__version__.split('.')[:2])}.md"
    (ROOT / "benchmarks/results" / name).write_text(text)
    assert math.isfinite(rate)


if __name__ == "__main__":
    main()
