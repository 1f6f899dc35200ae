"""Method x format on SmolLM2-135M: bytes, KL, perplexity, top-1, seconds, peak memory; llm-compressor's numbers beside ours.

    python benchmarks/quality.py                                     every row that has not been run yet
    python benchmarks/quality.py rotate+gptq-act-order:int4-g64-f32  these rows (again)
    python benchmarks/quality.py rtn:int4-g64-f32 --peer-python PY   and the peer's same method right after each
    python benchmarks/quality.py --list                              the rows there are
    python benchmarks/quality.py --tried                             chains that were tried, on text that no solver saw
    python benchmarks/quality.py --render                            only write the table and the plot anew

A row is METHOD:FORMAT, in the words of `jquant quantize --method` and `--recipe`. Each runs in a process of its own. Results
are kept in benchmarks/results/quality.json, so that rows can be added run by run; benchmarks/results/quality.md and
quality.png are written from it. Protocol: benchmarks/README.md.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

from gptq import ROOT, matmul_rate, peer, run, windows

RESULTS = ROOT / "benchmarks/results"
KEPT, KEPT_TRIED = RESULTS / "quality.json", RESULTS / "quality-tried.json"

INT4, INT4A, INT3A = "int4-g64-f32", "int4-g64-asym-f32", "int3-g64-asym-f32"
W8A8, FP8, W4A8 = "int8+int8", "fp8_e4m3+fp8_e4m3", "int4-g64-f32+int8"
GPTQ, BEST, BEST8 = "gptq-act-order", "rotate+best", "rotate+smoothquant-tokens+best"
GPTQ_SEARCH = "gptq(act_order=True,search=True)"
APART = f"lowrank_inputs(2)+{GPTQ_SEARCH}"

# llm-compressor 0.14.0.1, measured once by benchmarks/peers/llm_compressor.py NAME: perplexity, KL, top-1, seconds, peak GB.
PEER = {
    f"rtn:{INT4}": ("rtn4_sym_g64", 34.29, 0.4165, 0.671, 1, 1.0),
    f"rtn:{INT4A}": ("rtn4_asym_g64", 31.33, 0.3035, 0.710, 1, 1.0),
    f"rtn:{INT3A}": ("rtn3_asym_g64", 69.12, 1.1624, 0.440, 1, 1.0),
    f"rtn:{W8A8}": ("rtn_w8a8", 25.06, 0.0295, 0.892, 1, 1.0),
    f"rtn:{FP8}": ("fp8_dyn", 25.04, 0.0270, 0.910, 1, 1.0),
    "rtn:nvfp4-4o6": ("nvfp4a16", 30.41, 0.2196, 0.745, 1, 1.1),
    "rtn:mxfp4-even": ("mxfp4a16", 35.42, 0.4345, 0.653, 1, 1.0),
    f"{GPTQ}:{INT4}": ("gptq4_sym_g64", 30.17, 0.2182, 0.769, 288, 1.5),
    f"{GPTQ}:{INT4A}": ("gptq4_asym_g64", 27.91, 0.1311, 0.805, 260, 1.5),
    f"{GPTQ}:{INT3A}": ("gptq3_asym_g64", 40.02, 0.5037, 0.641, 263, 1.7),
    f"awq:{INT4A}": ("awq4_asym_g64", 27.59, 0.1358, 0.792, 2040, 3.2),
    f"rotate+{GPTQ}:{INT4}": ("quarot_gptq4_sym_g64", 26.71, 0.1078, 0.826, 248, 1.9),
    f"rotate+{GPTQ}:{INT4A}": ("quarot_gptq4_asym_g64", 26.38, 0.0830, 0.849, 265, 1.9),
    f"rotate+{GPTQ}:{INT3A}": ("quarot_gptq3_asym_g64", 37.04, 0.4418, 0.671, 266, 1.8),
    f"rotate+rtn:{W8A8}": ("quarot_rtn_w8a8", 24.89, 0.0141, 0.936, 6, 2.0),
    f"smoothquant+rtn:{W8A8}": ("sq_rtn_w8a8", 24.82, 0.0158, 0.931, 159, 1.7),
    f"smoothquant+{GPTQ}:{W8A8}": ("sq_gptq_w8a8", 24.77, 0.0141, 0.931, 418, 1.7),
}
# Formats in families of equal bytes.
FAMILIES = {
    "int4 symmetric g64": (INT4,),
    "int4 asymmetric g64": (INT4A,),
    "int3 asymmetric g64": (INT3A,),
    "W8A8 int8, dynamic": (W8A8,),
    "fp8 W8A8, dynamic": (FP8,),
    "NVFP4, weights only": ("nvfp4", "nvfp4-4o6"),
    "MXFP4, weights only": ("mxfp4", "mxfp4-even"),
}
ROWS = list(dict.fromkeys([
    *(f"{BEST}:{f}" for f in (INT4, INT4A, INT3A, W8A8, FP8, "nvfp4-4o6", "mxfp4")), *PEER,
    f"{BEST8}:{W8A8}", f"{GPTQ}:{FP8}", f"{GPTQ_SEARCH}:{FP8}", f"lowrank_inputs(2)+{GPTQ}:{FP8}", f"{APART}:{FP8}", "rtn:mxfp4", "rtn:nvfp4", "rtn:int8+int8-mse-asym", *(f"{m}:{W4A8}" for m in ("smoothquant+rtn", f"rotate+{GPTQ}", BEST)),
]))  # fmt: skip


# Settings are chosen on windows 65 to 80 of the calibration text, which no solver sees, never on the evaluation text. What
# was tried to get further, and beside it what it was compared with:
TRIED = [
    f"rotate+{GPTQ}:{INT4}", f"rotate+{GPTQ_SEARCH}:{INT4}", f"{BEST}:{INT4}",
    f"{BEST}:{W8A8}", f"rotate+smoothquant-search+best:{W8A8}", f"rotate+smoothquant-search(everywhere=True)+best:{W8A8}",
    f"{BEST8}:{W8A8}",
    f"rtn:{FP8}", f"{BEST}:{FP8}", f"rotate+smoothquant-search+best:{FP8}", f"best:{FP8}", f"qronos(act_order=True):{FP8}",
    f"{GPTQ}:{FP8}", f"{GPTQ_SEARCH}:{FP8}", f"lowrank_inputs(2)+{GPTQ}:{FP8}", f"{APART}:{FP8}",
    f"lowrank_inputs(2)+rtn-weighted+{GPTQ}:{FP8}", f"lowrank_inputs(1)+{GPTQ_SEARCH}:{FP8}",
]  # fmt: skip


def measure(row: str, batch: int, tried: bool) -> dict:
    """One row in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jquant as jq
    import jquant.models

    method, fmt = jq.parse_method(row.split(":")[0]), row.split(":")[1]
    model = jq.models.load("demo")
    apply = model.apply
    seen, unseen = np.split(windows(model, "calibration", 80), [64])
    held = [jnp.asarray(w)[None] for w in (unseen if tried else windows(model, "evaluation", 16))]
    batches = [jnp.asarray(seen[i : i + batch]) for i in range(0, len(seen), batch)]
    recipe = jq.Recipe({"*embed*": None, "*": jq.parse_policy(fmt)})
    # The only reference to the float parameters is handed over: a fold replaces them, and they are not needed twice.
    params = [model.params]
    del model
    start = time.perf_counter()
    qparams = jax.block_until_ready(jq.quantize(apply, params.pop(), recipe, method, batches))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    e = jq.evaluate(apply, jq.models.load("demo").params, qparams, held)
    return {
        "seconds": seconds, "peak_gb": peak, "kl": e.kl, "kl_stderr": e.kl_stderr, "ppl": e.perplexity,
        "top1": e.top1_agreement, "float": e.perplexity_reference, "bytes": e.bytes, **_bytes(jq, qparams),
        "jax": jax.__version__, "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d"), "method": method.name,
    }  # fmt: skip


def _bytes(jq, qparams) -> dict:
    """Bytes of the quantized leaves, and of the maps of leaves that hold one table for two uses; numbers that they store."""
    import jax

    from jquant.core.per_use import is_node

    nodes = [x for x in jax.tree.leaves(qparams, is_leaf=is_node) if is_node(x)]
    maps = sum(x.nbytes - x.value.nbytes for x in nodes if not jq.is_qtensor(x))
    weights = [x for x in nodes if jq.is_qtensor(x)]
    return {"weight_bytes": sum(x.nbytes for x in weights) + maps, "weights": sum(x.size for x in weights)}


def _seconds(r: dict) -> str:
    text = _short(r["seconds"])
    return f"({text})" if r.get("busy") else text


def _short(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}"


def _peer(row: str, r: dict) -> str:
    """The peer's cells: of the same run, or of an earlier one with the seconds in brackets."""
    if p := r.get("peer"):
        return f"{p['kl']:.4f} | {p['ppl']:.2f} | {p['top1']:.1%} | {_short(p['seconds'])} | {p['peak_gb']:.1f}"
    if row not in PEER:
        return " | | | |"
    _, ppl, kl, top1, seconds, peak = PEER[row]
    return f"{kl:.4f} | {ppl:.2f} | {top1:.1%} | [{seconds}] | {peak:.1f}"


def table(kept: dict[str, dict]) -> str:
    """Markdown: ours and the peer's."""
    lines = [
        "| format | method | MB | bytes/weight | KL | perplexity | top-1 | seconds | peak GB | matmul GFLOP/s before "
        "| peer KL | peer perplexity | peer top-1 | peer seconds | peer GB |",
        "|" + "---|" * 15,
    ]
    for row in sorted(kept, key=lambda r: (r.split(":")[1], -kept[r]["kl"])):
        r, (method, fmt) = kept[row], row.split(":")
        lines.append(
            f"| {fmt} | {method} | {r['bytes'] / 1e6:.1f} | {r['weight_bytes'] / r['weights']:.4f} | {r['kl']:.4f} ± {r['kl_stderr']:.4f} "
            f"| {r['ppl']:.2f} | {r['top1']:.1%} | {_seconds(r)} | {r['peak_gb']:.2f} | {'' if r.get('busy') else round(r['gflops'])} | {_peer(row, r)} |"
        )
    some = next(iter(kept.values()))
    return "\n".join([*lines, "", *_goals(kept)]) + (
        f"\n\nFloat32 perplexity {some['float']:.2f}, {some['cores']} cores, jax {some['jax']}, llm-compressor 0.14.0.1. MB are of all "
        "parameters, the float embedding among them; bytes/weight of the quantized ones, with the maps that `rotate` leaves on a "
        "tied embedding. Peer's seconds are of a run right after ours (`--peer-python`), in brackets of another day's; the machine is "
        "shared, and the rate of a matmul just before each of our runs says how much of it was left. Seconds in parentheses: "
        "beside other work.\n"
    )


def _peer_kls(row: str, r: dict | None) -> list[float]:
    """The peer's KL with the method of a row: of another day, and of the run beside ours."""
    beside = (r or {}).get("peer")
    return [PEER[row][2], *([beside["kl"]] if beside else [])]


def _goals(kept: dict[str, dict]) -> list[str]:
    """Markdown: for each family of formats, our best row and the peer's best, in any of its runs."""
    lines = ["| format | jquant's best | KL | llm-compressor's best | ratio |", "|" + "---|" * 5]
    for name, formats in FAMILIES.items():
        mine = [(kept[r]["kl"], r) for r in kept if r.split(":")[1] in formats]
        theirs = min(kl for r in PEER if r.split(":")[1] in formats for kl in _peer_kls(r, kept.get(r)))
        if mine:
            kl, row = min(mine)
            lines.append(f"| {name} | {row.split(':')[0]} | {kl:.4f} | {theirs:.4f} | {kl / theirs:.2f} |")
    return lines


def _tried(kept: dict[str, dict]) -> str:
    """Markdown: what was tried."""
    lines = ["", "## What was tried", "", "On 16 windows of the calibration text that no solver saw; settings are chosen here. Seconds in parentheses: beside other work.", ""]
    lines += ["| format | method | KL | seconds |", "|" + "---|" * 4]
    rows = [(*row.split(":")[::-1], kept[row]) for row in TRIED if row in kept]
    return "\n".join(lines + [f"| {f} | {m} | {r['kl']:.4f} ± {r['kl_stderr']:.4f} | {_seconds(r)} |" for f, m, r in rows]) + "\n"


def plot(kept: dict[str, dict], path: Path) -> None:
    """KL against bytes per weight: a colour for each method, crosses for the peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(10.5, 5))
    methods = sorted({row.split(":")[0] for row in kept})
    colors = plt.get_cmap("tab20").colors
    assert len(methods) <= len(colors), "two methods would look alike"
    for i, method in enumerate(methods):
        mine = sorted(
            (r["weight_bytes"] / r["weights"], r["kl"], row) for row, r in kept.items() if row.split(":")[0] == method
        )
        ax.plot([x for x, _, _ in mine], [y for _, y, _ in mine], "o-", color=colors[i], label=method, alpha=0.9, lw=1)
        theirs = [(x, _peer_kls(row, kept[row])[-1]) for x, _, row in mine if row in PEER]
        ax.plot([x for x, _ in theirs], [y for _, y in theirs], "x", color=colors[i], ms=9, mew=2)
    ax.plot([], [], "x", color="0.4", ms=9, mew=2, label="llm-compressor, same method")
    ax.set(xlabel="bytes per quantized weight, scales included", ylabel="KL(float || quantized), nats per token")
    ax.set_yscale("log")
    ticks = [t for t in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if ax.get_ylim()[0] <= t <= ax.get_ylim()[1]]
    ax.set_yticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.set_title("SmolLM2-135M, 64 x 512 calibration tokens")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    fig.tight_layout()
    fig.savefig(path, dpi=140)


def render(kept: dict[str, dict], tried: dict[str, dict]) -> None:
    (RESULTS / "quality.md").write_text(
        "# Quality on SmolLM2-135M\n\n![KL against bytes](quality.png)\n\n" + table(kept) + _tried(tried)
    )
    plot(kept, RESULTS / "quality.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="METHOD:FORMAT", help="default: all that have not been run yet")
    parser.add_argument("--batch", type=int, default=2, help="windows to a batch")
    parser.add_argument("--list", action="store_true", help="print the rows, and stop")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--tried", action="store_true", help="run what was tried, on held-out calibration text")
    parser.add_argument("--peer-python", help="a Python that has llmcompressor 0.14.0.1, torch 2.13.0 and gguf")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT", json.dumps(measure(args.one, args.batch, args.tried)))
        return
    file, all_rows = (KEPT_TRIED, TRIED) if args.tried else (KEPT, ROWS)
    kept = _read(file)
    if args.list:
        print("\n".join(f"{row}{'  (done)' if row in kept else ''}" for row in dict.fromkeys([*all_rows, *kept])))
        return
    if wrong := [row for row in args.rows if row.count(":") != 1]:
        parser.error(f"{wrong[0]!r} is no METHOD:FORMAT, as in rotate+gptq:int4-g64-f32")
    for row in [] if args.render else args.rows or [r for r in all_rows if r not in kept]:
        rate = matmul_rate()
        flags = ["--tried"] if args.tried else []
        done = run([sys.executable, __file__, "--one", row, "--batch", str(args.batch), *flags], JAX_PLATFORMS="cpu")
        if args.peer_python and row in PEER:
            done["peer"] = peer(args.peer_python, PEER[row][0])
        kept = {**_read(file), row: {**done, "gflops": rate}}
        file.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        print(table({row: kept[row]}).splitlines()[2], flush=True)
    if not _read(KEPT):
        parser.error("there are no results yet")
    render(_read(KEPT), _read(KEPT_TRIED))


def _read(file: Path) -> dict[str, dict]:
    return json.loads(file.read_text()) if file.exists() else {}


if __name__ == "__main__":
    main()
