"""Cache formats on SmolLM2-135M: bytes, KL to the float cache, decode tokens per second.

    python benchmarks/kv_cache.py                          every row that has not been run yet
    python benchmarks/kv_cache.py int8 int4-g64-asym-rot   these rows (again); a row is a format in the words of --cache
    python benchmarks/kv_cache.py --text calibration       the same on other text: settings are chosen there, not here
    python benchmarks/kv_cache.py --speed                  decode speed too, at --context tokens
    python benchmarks/kv_cache.py --render                 only print the table

Protocol of "KL": the first two windows of 2048 tokens of data/evaluation.txt; keys and values are rounded as they enter
attention (all of them, but sinks: no residual window); mean over all positions of KL(float cache || cache), nats. "KL in
chunks" feeds 64 tokens at a time into the cache as it is, residual window and all: what decoding reads. The other columns are
means over the 256 positions before a context length. "+eased" behind a format: with the `key_settings` of 4 windows of 2048
tokens of calibration.txt. Results are kept in benchmarks/results/kv_cache.json.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jquant as jq
import jquant.models
from jquant import kv_cache
from jquant.models.generate import State, _decode
from jquant.models.sampling import Sampling

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks/results/kv_cache.json"
ROWS = [
    "float32", "bfloat16", "int8", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3-tensor", "int4-g64-asym", "int4-g32-asym",
    "keys=int4-g64-asym-rot,values=int4-g64-asym", "int4-g64-asym-rot", "lloyd4-rot", "nvfp4", "nvfp4-4o6",
    "int4-g64-asym-rot-search,sinks=4+eased", "keys=int4-t64-asym,values=int4-g64-asym", "kivi4", "kivi2", "turbo2",
]  # fmt: skip
ENDS = (512, 1024, 2048, 4096, 8192)


def windows(model: Any, text: str, count: int, length: int) -> np.ndarray:
    ids = model.tokenizer.encode((ROOT / "data" / f"{text}.txt").read_text(encoding="utf-8"))
    return np.asarray(ids[: count * length], np.int32).reshape(count, 1, length)


def chunks(model: Any, fmt: Any, tokens: np.ndarray, size: int, eased: Any = None):
    """Log probabilities `[size, vocab]` of chunk after chunk, read from a cache of a format."""
    cache = jq.models.init_cache(model.config, 1, tokens.shape[1], fmt, **(eased or {}))

    @jax.jit
    def step(params, part, cache):
        logits, cache = model.apply(params, part, cache=cache)
        return jax.nn.log_softmax(logits[0]), cache

    for start in range(0, tokens.shape[1], size):
        out, cache = step(model.params, jnp.asarray(tokens[:, start : start + size]), cache)
        yield out


@jax.jit
def divergence(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(a) * (a - b), axis=-1)


def kl(model: Any, fmt: Any, all_windows: np.ndarray, references: list, size: int, eased: Any) -> np.ndarray:
    """KL of every position, `[windows, length]`."""
    rows = []
    for tokens, reference in zip(all_windows, references):
        step = min(size, tokens.shape[1])
        parts = [
            np.asarray(divergence(jnp.asarray(reference[i * step : (i + 1) * step]), out))
            for i, out in enumerate(chunks(model, fmt, tokens, step, eased))
        ]
        rows.append(np.concatenate(parts))
    return np.stack(rows)


def bytes_per_token(config: Any, name: Any) -> float:
    """Of all layers, scales included; a float window and sinks are not (they do not grow)."""
    cache = jax.eval_shape(lambda: kv_cache.init(1, 4096, config.num_kv_heads, config.head_dim, name))
    arrays = [a for s in (cache.keys, cache.values) for a in (*s.codes, s.scale, s.zero_point) if a is not None]
    return config.num_layers * sum(a.size * a.dtype.itemsize for a in arrays) / cache.capacity


def quality(model: Any, row: str, all_windows: np.ndarray, references: list) -> dict[str, Any]:
    name, _, how = row.partition("+")
    fmt, eased = kv_cache.parse(name), _eased(model) if how == "eased" else None
    found = kl(model, fmt.replace(residual=0), all_windows, references, 512, eased)
    out: dict[str, Any] = {"kl": float(found[:, :-1].mean())}
    out["at"] = {str(e): float(found[:, max(e - 256, 0) : e].mean()) for e in ENDS if e <= found.shape[1]}
    if fmt.window:
        out["kl_chunks"] = float(kl(model, fmt, all_windows, references, 64, eased)[:, :-1].mean())
    size = bytes_per_token(model.config, fmt)
    return {**out, "bytes": size, "share": size / bytes_per_token(model.config, "bfloat16")}


def _eased(model: Any) -> Any:
    return jq.models.key_settings(model.params, model.config, windows(model, "calibration", 4, 2048))


def speed(model: Any, rows: list[str], context: int, steps: int = 16) -> dict[str, float]:
    """Decode tokens per second of one sequence behind `context` tokens: the best of several runs of each, in turn."""

    def full(row: str) -> State:
        cache = jq.models.init_cache(model.config, 1, context + steps, row)
        layers = {n: c.replace(length=jnp.full(1, context, jnp.int32)) for n, c in cache["layers"].items()}
        start = {"length": jnp.full(1, context, jnp.int32), "layers": layers}
        return State(start, jnp.ones(1, jnp.int32), jax.random.key(0), jnp.int32(1), jnp.zeros(1, bool))

    args = (jnp.int32(steps), jnp.zeros(0, jnp.int32))
    best = dict.fromkeys(rows, 0.0)
    for _ in range(4):
        for row in rows:
            state = jax.block_until_ready(full(row))
            start = time.perf_counter()
            jax.block_until_ready(_decode(model.apply, Sampling(), steps, model.params, state, *args)[1])
            best[row] = max(best[row], steps / (time.perf_counter() - start))
    return best


def table(kept: dict[str, dict[str, Any]]) -> str:
    ends = sorted({int(e) for r in kept.values() for e in r.get("at", {})})
    heads = ["cache", "bytes/token", "of bf16", "KL", "KL in chunks", *(f"KL at {e}" for e in ends), "decode tok/s", "x float32"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    number = lambda x, f: "" if x is None else format(x, f)
    for row, r in sorted(kept.items(), key=lambda item: (-item[1].get("share", 0), item[0])):
        at = [number(r.get("at", {}).get(str(e)), ".4f") for e in ends]
        ratio = r["tok_s"] / r["float_tok_s"] if "tok_s" in r else None
        cells = [
            row, number(r.get("bytes"), ".0f"), number(r.get("share"), ".3f"), number(r.get("kl"), ".5f"), number(r.get("kl_chunks"), ".5f"),
            *at, number(r.get("tok_s"), ".1f"), number(ratio, ".2f"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="FORMAT", help="default: all that have not been run yet")
    parser.add_argument("--text", choices=("evaluation", "calibration"), default="evaluation")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048, help="of a window; the model's limit is 8192")
    parser.add_argument("--speed", action="store_true", help="measure decode speed, not KL")
    parser.add_argument("--context", type=int, default=4096, help="tokens in the cache when speed is measured")
    parser.add_argument("--render", action="store_true", help="run nothing")
    args = parser.parse_args()
    usual = (args.text, args.windows, args.length) == ("evaluation", 2, 2048)
    kept = json.loads(KEPT.read_text()) if KEPT.exists() and usual else {}
    what = "tok_s" if args.speed else "kl"
    rows = [] if args.render else args.rows or [r for r in ROWS if what not in kept.get(r, {})]
    if rows:
        model = jq.models.load("demo")
        run = _speeds if args.speed else _qualities
        for row, found in run(model, rows, args):
            kept[row] = kept.get(row, {}) | found
            print(table({row: kept[row]}).splitlines()[-1], flush=True)
            if usual:
                KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    print(table(kept))
    print(f"\n{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}; {args.windows} windows of {args.length} tokens.")


def _qualities(model: Any, rows: list[str], args: argparse.Namespace):
    texts = windows(model, args.text, args.windows, args.length)
    references = [np.concatenate([np.asarray(x) for x in chunks(model, "float32", w, 512)]) for w in texts]
    for row in rows:
        yield row, quality(model, row, texts, references)


def _speeds(model: Any, rows: list[str], args: argparse.Namespace):
    found = speed(model, list(dict.fromkeys(["float32", *rows])), args.context)
    for row in rows:
        yield row, {"tok_s": found[row], "float_tok_s": found["float32"], "context": args.context}


if __name__ == "__main__":
    main()
