"""Cache formats on SmolLM2-135M: bytes, KL to the float cache, decode tokens per second.

    python benchmarks/kv_cache.py                          every row that has not been run yet
    python benchmarks/kv_cache.py int8 int4-g64-asym-rot   these rows (again); a row is a format in the words of --cache
    python benchmarks/kv_cache.py --text calibration       the same on other text: settings are chosen there, not here
    python benchmarks/kv_cache.py --windows 1 --length 8192 int8   the same at longer contexts; kept as "int8 @8192"
    python benchmarks/kv_cache.py --speed                  decode speed too, at --context tokens
    python benchmarks/kv_cache.py --peer-python PYTHON     transformers' QuantizedCache too (benchmarks/peers/transformers_cache.py)
    python benchmarks/kv_cache.py --render                 only write the table, benchmarks/results/kv_cache.md

Protocol of "KL": the first two windows of 2048 tokens of data/evaluation.txt; keys and values are rounded as they enter
attention (all of them, but sinks: no residual window); mean over all positions of KL(float cache || cache), nats. "KL in
chunks" feeds 64 tokens at a time into the cache as it is, residual window and all: what decoding reads. The other columns are
means over the 256 positions before a context length. Behind a format: "+eased", with the `key_settings` of the first 8 windows
of 2048 tokens of calibration.txt; "+scaled", with the `static_scales` of the same; "+folded", the values' rotation is merged into
the weights (`rotate(stream=False)`). Results are kept in benchmarks/results/kv_cache.json.

The best formats and how `key_settings` reads a text were chosen on calibration.txt alone: settings from its first windows, KL on
windows 40 to 43 of 2048 tokens, keys and values rounded as they enter attention; evaluation.txt was read once, for the table.
"""

import argparse
import functools
import json
import os
import subprocess
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
    "float32", "bfloat16", "int8", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3-tensor", "fp8_e4m3-tensor+scaled", "int4-g64-asym",
    "int4-g32-asym", "keys=int4-g64-asym-rot,values=int4-g64-asym", "int4-g64-asym-rot",
    "keys=int4-g64-asym-rot,values=int4-g64-asym+folded", "lloyd4-rot", "nvfp4", "nvfp4-4o6", "fine4", "fine4+eased",
    "fine4,residual=128+eased", "int4-g64-asym,residual=128", "kivi4", "kivi2", "turbo2", "fine2+eased", "fine2,residual=128+eased",
    "keys=int4-t64-asym,values=int4-g64-asym,residual=128", "keys=int2-t64-asym,values=int2-g64-asym,residual=128",
    "keys=int4-t64-asym-ze3m4-search,values=int4-g64-asym-ze3m4-search,residual=128",
    "keys=int4-g32-asym-ze3m4-e4m3-search-rot,values=int4-g64-asym-ze3m4-e4m3-search-rot,sinks=4,residual=128+eased",
]  # fmt: skip
PEERS = {
    f"transformers {backend}, {bits} bits, {axes}": (backend, str(bits), axes)
    for backend in ("quanto", "hqq") for bits in (4, 2) for axes in ("tt", "ct")
}  # fmt: skip
ENDS = (512, 1024, 2048, 4096, 8192)


def windows(model: Any, text: str, count: int, length: int) -> np.ndarray:
    ids = model.tokenizer.encode((ROOT / "data" / f"{text}.txt").read_text(encoding="utf-8"))
    return np.asarray(ids[: count * length], np.int32).reshape(count, 1, length)


def chunks(model: Any, fmt: Any, tokens: np.ndarray, size: int, eased: Any = None):
    """Log probabilities `[size, vocab]` of chunk after chunk, read from a cache of a format."""
    cache = jq.models.init_cache(model.config, 1, tokens.shape[1], fmt, **(eased or {}))
    for start in range(0, tokens.shape[1], size):
        out, cache = _step(model.apply, model.params, jnp.asarray(tokens[:, start : start + size]), cache)
        yield out


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(apply, params, part, cache):
    logits, cache = apply(params, part, cache=cache)
    return jax.nn.log_softmax(logits[0]), cache


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
    fmt = kv_cache.parse(name)
    model, eased = MODES[how](model, fmt)
    found = kl(model, fmt.replace(residual=0), all_windows, references, 512, eased)
    out: dict[str, Any] = {"kl": float(found[:, :-1].mean())}
    out["at"] = {str(e): float(found[:, max(e - 256, 0) : e].mean()) for e in ENDS if e <= found.shape[1]}
    if fmt.window:
        out["kl_chunks"] = float(kl(model, fmt, all_windows, references, 64, eased)[:, :-1].mean())
    size = bytes_per_token(model.config, fmt)
    return {**out, "bytes": size, "share": size / bytes_per_token(model.config, "bfloat16")}


def _eased(model: Any, fmt: Any) -> tuple[Any, Any]:
    return model, jq.models.key_settings(model.params, model.config, windows(model, "calibration", 8, 2048))


def _scaled(model: Any, fmt: Any) -> tuple[Any, Any]:
    return model, jq.models.static_scales(model.params, model.config, windows(model, "calibration", 8, 2048), fmt)


def _folded(model: Any, fmt: Any) -> tuple[Any, Any]:
    batches = list(windows(model, "calibration", 1, 512))
    params = jq.quantize(model.apply, model.params, jq.Recipe({"*": None}), jq.rotate(stream=False), batches)
    return model._replace(params=params, apply=jq.quantized(model.apply)), None


MODES = {"": lambda model, fmt: (model, None), "eased": _eased, "scaled": _scaled, "folded": _folded}


def speed(model: Any, rows: list[str], context: int, steps: int = 4) -> dict[str, float]:
    """Decode tokens per second of one sequence behind `context` tokens: the best of many short runs of each, in turn."""

    def full(row: str) -> State:
        cache = jq.models.init_cache(model.config, 1, context + steps, row)
        layers = {n: c.replace(length=jnp.full(1, context, jnp.int32)) for n, c in cache["layers"].items()}
        start = {"length": jnp.full(1, context, jnp.int32), "layers": layers}
        return State(start, jnp.ones(1, jnp.int32), jax.random.key(0), jnp.int32(1), jnp.zeros(1, bool))

    args = (jnp.int32(steps), jnp.zeros(0, jnp.int32))
    best = dict.fromkeys(rows, 0.0)
    for _ in range(24):
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
    parser.add_argument("--peer-python", metavar="PYTHON", help="run the peers' rows with it, and nothing else")
    parser.add_argument("--render", action="store_true", help="run nothing")
    args = parser.parse_args()
    usual = args.text == "evaluation" and (args.windows, args.length) in ((2, 2048), (1, 8192))
    kept = read() if usual else {}
    mark = "" if args.length == 2048 else f" @{args.length}"
    what = "tok_s" if args.speed else "kl"
    rows = [] if args.render else args.rows or [r for r in ROWS if what not in kept.get(r + mark, {})]
    for row, found in _peers(args, kept) if args.peer_python else _ours(args, rows):
        kept = read() if usual else kept  # another process may have added rows
        kept[row + mark] = kept.get(row + mark, {}) | found
        print(table({row + mark: kept[row + mark]}).splitlines()[-1], flush=True)
        if usual:
            KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    if usual:
        KEPT.with_suffix(".md").write_text(page(kept))
    print(table(kept))


def read() -> dict[str, dict[str, Any]]:
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def page(kept: dict[str, dict[str, Any]]) -> str:
    """benchmarks/results/kv_cache.md."""
    protocol = __doc__[__doc__.index("Protocol of") :].strip()
    versions = next((r["versions"] for r in kept.values() if "versions" in r), {})
    peers = ", ".join(f"{n} {v}" for n, v in versions.items())
    where = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    return (
        f"# The quantized KV cache: SmolLM2-135M\n\n{table(kept)}\n\n{protocol}\n\n\"of bf16\" is of the bytes of bfloat16, scales "
        'included; sinks and float windows do not grow and are not counted. A row "@8192" is one window of 8192 tokens. "fine4" and '
        '"fine2" are presets of `jq.kv_cache.parse`. Peers: transformers\' `QuantizedCache`, residual length 128, groups of 64, "t" a '
        'scale for a token and head, "c" for a channel of 64 tokens, for keys and for values; compare "KL in chunks" with the rows of '
        f"residual=128 (and kivi4, kivi2).\n\n{where}. Peers: {peers}.\n"
    )


def _ours(args: argparse.Namespace, rows: list[str]):
    if rows:
        yield from (_speeds if args.speed else _qualities)(jq.models.load("demo"), rows, args)


def _peers(args: argparse.Namespace, kept: dict[str, dict[str, Any]]):
    for row, how in PEERS.items():
        if (args.rows and row not in args.rows) or (not args.rows and row in kept):
            continue
        command = [args.peer_python, str(ROOT / "benchmarks/peers/transformers_cache.py"), *how, str(args.windows), str(args.length)]
        out = subprocess.run(command, capture_output=True, text=True)
        found = [x for x in out.stdout.splitlines() if x.startswith("RESULT ")]
        if not found:
            raise SystemExit(f"{' '.join(command)} failed:\n{out.stderr[-4000:]}")
        yield row, json.loads(found[-1].removeprefix("RESULT "))


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
