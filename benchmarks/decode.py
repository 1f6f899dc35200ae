"""Decoding and prefill of a decoder with float and quantized weights on this device, tokens per second.

    python benchmarks/decode.py [--model demo] [--prefill 512] [--tokens 48]
    python benchmarks/decode.py --shape Llama-3.1-8B --layers 8 --batch 1 --cache int8    random weights, in 16 bits: for a GPU

Every variant runs in the same process, in turn, several times; the best of each counts. Beside it: the bytes of weights that
a decoded token reads and the rate at which they were read, next to the rate of a plain reduction over the same bytes.
Writes benchmarks/results/decode-<device>.md.
"""

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clock import best

import jquant as jq
import jquant.models
from jquant.models.decoder import nest

ROOT = Path(__file__).resolve().parent.parent
FORMATS = {"int8": "int8", "int4 g64": "int4-g64"}
GPU_FORMATS = {"int8": "int8", "int4 g128": "int4-g128"}
CONFIGS = {
    "Llama-3.1-8B": jq.models.Config(128256, 4096, 14336, 32, 32, 8, 128),
    "Qwen3-8B": jq.models.Config(151936, 4096, 12288, 36, 32, 8, 128, family="qwen3", qk_norm=True),
}  # fmt: skip


def random_model(name: str, layers: int) -> Any:
    """A decoder of a real one's shape, with so many layers, in bfloat16."""
    config = dataclasses.replace(CONFIGS[name], num_layers=layers)
    make = jax.jit(lambda key, shape: (jax.random.normal(key, shape) * shape[0] ** -0.5).astype(jnp.bfloat16), static_argnums=1)
    shapes = jq.models.param_shapes(config)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = nest({path: make(key, shape) for key, (path, shape) in zip(keys, shapes.items())})
    return jq.models.Model(jq.models.build(config), params, None, config)


def variants(model: Any, dtypes: tuple[str, ...], formats: dict[str, str]) -> Iterator[tuple[str, Any, Any]]:
    """(Name, apply, params): the float model in each dtype, then quantized ones."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    of = {dtype: jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), model.params) for dtype in dtypes}
    yield from ((dtype, model.apply, params) for dtype, params in of.items())
    for name, fmt in formats.items():
        recipe = jq.Recipe({"*embed*": None, "*": jq.parse_format(fmt)})
        for dtype, params in of.items():
            q = jq.quantize(model.apply, params, recipe, jq.rtn(), [tokens])
            yield f"{name}, {dtype}", jq.quantized(model.apply), q


def measure(model: Any, apply: Any, params: Any, args: argparse.Namespace, cache: str) -> dict[str, float]:
    prompt = jnp.asarray(np.arange(args.batch * args.prefill).reshape(args.batch, -1) % 1000 + 1, jnp.int32)
    at = jnp.full((args.batch, 1), args.prefill - 1, jnp.int32)
    forward = jax.jit(lambda p, t: apply(p, t, logits_at=at))
    jax.block_until_ready(forward(params, prompt))
    start = prompt[:, : args.context or 8]
    run = lambda: jq.models.generate(apply, params, start, model.config, max_tokens=args.tokens, cache_format=cache)
    run()
    decode = max(run().decode_tokens_per_second for _ in range(3))
    return {"prefill": prompt.size / best(forward, params, prompt, repeats=5), "decode": float(decode)}


def read_rate(params: Any) -> float:
    """GB/s of one plain pass over the arrays of `params`."""
    arrays = [a for a in jax.tree.leaves(params) if a.size > 1 << 16]
    total = jax.jit(lambda xs: sum(jnp.sum(x.reshape(-1, x.shape[-1]), axis=0, dtype=jnp.float32)[0] for x in xs))
    jax.block_until_ready(total(arrays))
    return sum(a.nbytes for a in arrays) / best(total, arrays, repeats=5) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--shape", choices=CONFIGS, help="random weights of this shape, in place of --model")
    parser.add_argument("--layers", type=int, default=8, help="of --shape")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, help="tokens in the cache when decoding begins; 8 by default, --prefill at most")
    parser.add_argument("--cache", help="format of the cache of quantized models; of float ones it has the dtype of the model")
    args = parser.parse_args()
    model = random_model(args.shape, args.layers) if args.shape else jq.models.load(args.model)
    rate = read_rate(model.params)
    head = "| weights, compute | MB | prefill tok/s | x bf16 | decode tok/s | x bf16 | weights read GB/s | of a plain read |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    results = {}
    kinds = (("bfloat16",), GPU_FORMATS) if args.shape else (("float32", "bfloat16"), FORMATS)
    for name, apply, params in variants(model, *kinds):
        cache = args.cache if args.cache and "," in name else "bfloat16" if args.shape else "float32"
        results[name] = measure(model, apply, params, args, cache)
        results[name]["bytes"] = sum(a.nbytes for a in jax.tree.leaves(params))
        if not model.config.tied:  # the table is looked up, not read
            results[name]["bytes"] -= sum(a.nbytes for a in jax.tree.leaves(params["embed"]))
        print(name, {k: round(v, 1) for k, v in results[name].items()}, flush=True)
    base = results["bfloat16"]
    for name, r in results.items():
        gbs = r["bytes"] * r["decode"] / args.batch / 1e9
        lines.append(
            f"| {name} | {r['bytes'] / 1e6:.0f} | {r['prefill']:.0f} | {r['prefill'] / base['prefill']:.2f} | {r['decode']:.1f} | "
            f"{r['decode'] / base['decode']:.2f} | {gbs:.1f} | {gbs / rate:.0%} |"
        )
    device = jax.devices()[0].device_kind
    what = f"{args.layers} layers of {args.shape}'s shape, caches bfloat16 and {args.cache or 'bfloat16'}. " if args.shape else ""
    text = "\n".join(lines) + (
        f"\n\n{device}, {os.cpu_count()} cores, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}. {what}Prefill of {args.prefill} tokens, "
        f"decoding of {args.tokens} behind {args.context or 8}, batch {args.batch}. A plain read of the float weights: {rate:.1f} GB/s.\n"
    )
    print(text)
    shape = f"-{args.shape}-{args.batch}" if args.shape else ""
    name = f"decode-{jax.devices()[0].platform}{shape}-jax{'.'.join(jax.__version__.split('.')[:2])}.md"
    (ROOT / "benchmarks/results" / name).write_text(text)
    assert math.isfinite(rate)


if __name__ == "__main__":
    main()
