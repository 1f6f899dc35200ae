"""Times one GPTQ solve, int4 symmetric in groups of 128, the Gram matrix given, beside what the machine could do.

    python benchmarks/solver.py [--sizes 512 1024 2048 4096] [--peer-python PYTHON]

For every size n it prints, for an n x n weight: the float32 matmul rate that this machine reaches at this size right
now; our first call (compilation included) and the fastest of three further ones; how many times longer than its
floating-point operations, at that rate, the solve takes; and the objective, relative to round to nearest.

The operations: n^3 / 3 for the factorization of H and m n^2 for the feedback, without which no GPTQ can do. (The
comparison with round to nearest, at most m n^2 more, and everything else that we do counts as our time only.)

Writes benchmarks/results/solver.md. With --peer-python (or JQUANT_PEER_PYTHON), a Python that has llm-compressor, its `quantize_weight` gets the same weight
and Gram matrix, in a process of its own, right after ours; --act-order compares with both visiting columns by diag(H).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

GROUP = 128
RESULT = Path(__file__).resolve().parent / "results/solver.md"


class Run(NamedTuple):
    """Seconds of the first call and of the fastest later one, and what the call returned."""

    first: float
    warm: float
    out: Any


def clock(call: Callable[[], Any], repeats: int) -> Run:
    """Times a call; `call` returns when the work is done."""
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        out = call()
        seconds.append(time.perf_counter() - start)
    return Run(seconds[0], min(seconds[1:]), out)


def problem(n: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the Gram matrix of 2n correlated tokens whose channels differ in size, float32."""
    rng = np.random.default_rng(n)
    mix = np.eye(n, dtype=np.float32) + 0.5 * rng.standard_normal((n, n), np.float32) / np.sqrt(n).astype(np.float32)
    x = rng.standard_normal((2 * n, n), np.float32) @ mix * np.exp(0.5 * rng.standard_normal(n, np.float32))
    return 0.02 * rng.standard_normal((n, n), np.float32), x.T @ x


def relative_objective(w: np.ndarray, h: np.ndarray, q: np.ndarray, plain: np.ndarray) -> float:
    """tr(E H E^T) of q, relative to that of round to nearest."""
    cost = lambda e: float(np.sum((e @ h) * e, dtype=np.float64))
    return cost(w - q) / cost(w - plain)


def ours(w: np.ndarray, h: np.ndarray, act_order: bool, repeats: int) -> tuple[Run, Run, float]:
    """The matmul, the solve, the relative objective."""
    import jax
    import jax.numpy as jnp

    import jquant as jq
    from jquant.core.formats import compute_params, decode, encode
    from jquant.core.method import Rounding
    from jquant.core.stats import Stats

    fmt = jq.INT4_G128
    method = jq.gptq(act_order=act_order)

    @jax.jit
    def solve(rows, gram):
        zeros = jnp.zeros(gram.shape[:-1])
        out = method.solve(Rounding(rows), Stats(gram, zeros, zeros, zeros[:, 0]), fmt)
        return out.codes, out.params

    rows, gram = jnp.asarray(w)[None], jnp.asarray(h)[None]
    matmul = jax.jit(lambda a, b: a @ b)
    rate = clock(lambda: matmul(rows[0], gram[0]).block_until_ready(), repeats)
    run = clock(lambda: jax.block_until_ready(solve(rows, gram)), repeats)
    params = compute_params(rows, fmt)
    plain = decode(encode(rows, params, fmt), params, fmt)
    return rate, run, relative_objective(w, h, np.asarray(decode(*run.out, fmt))[0], np.asarray(plain)[0])


def peer(python: str, w: np.ndarray, h: np.ndarray, act_order: bool, repeats: int) -> tuple[float, float, np.ndarray]:
    """llm-compressor's first and warm seconds, and its quantized weight, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given, answer = os.path.join(folder, "in.npz"), os.path.join(folder, "out.npz")
        np.savez(given, w=w, h=h, act_order=act_order, repeats=repeats)
        subprocess.run([python, "-P", os.path.abspath(__file__), "--be-peer", given, answer], check=True)
        with np.load(answer) as out:
            return float(out["first"]), float(out["warm"]), out["q"]


def be_peer(given: str, answer: str) -> None:
    """Runs in the peer's Python."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    with np.load(given) as data:
        w, h = torch.from_numpy(data["w"]), torch.from_numpy(data["h"])
        order, repeats = "static" if data["act_order"] else None, int(data["repeats"])
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=True, actorder=order)
    groups = w.reshape(w.shape[0], -1, GROUP)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)

    def call() -> torch.Tensor:  # its arguments are disposable: it works in them
        return quantize_weight(w[None].clone(), h[None].clone(), scale[None], zero[None], None, args)[0][0]

    with torch.no_grad():
        run = clock(call, repeats)
    np.savez(answer, first=run.first, warm=run.warm, q=run.out.numpy())


HEAD = "| n | matmul GFLOP/s | first | warm | times the floor | objective |"
PEER_HEAD = " llm-compressor: first | warm | of ours | objective |"


def row(n: int, python: str | None, act_order: bool, repeats: int, peer_repeats: int) -> str:
    """One line of the table."""
    w, h = problem(n)
    rate, run, objective = ours(w, h, act_order, repeats)
    floor = (n**3 / 3 + n**3) / (2 * n**3 / rate.warm)
    gflops = 2e-9 * n**3 / rate.warm
    line = f"| {n} | {gflops:.0f} | {run.first:.2f} | {run.warm:.3f} | {run.warm / floor:.1f} | {objective:.4f} |"
    if python:
        first, warm, q = peer(python, w, h, act_order, peer_repeats)
        groups = w.reshape(n, -1, GROUP)
        scale = np.abs(groups).max(-1, keepdims=True) / 7.5
        plain = (np.clip(np.round(groups / scale), -8, 7) * scale).reshape(n, n)
        line += f" {first:.2f} | {warm:.2f} | {warm / run.warm:.1f} | {relative_objective(w, h, q, plain):.4f} |"
    return line


def table(sizes: list[int], python: str | None, act_order: bool, repeats: int, peer_repeats: int) -> str:
    """Markdown, each line printed as it is known."""
    import jax

    head = HEAD + PEER_HEAD * bool(python)
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    print("\n".join(lines), flush=True)
    for n in sizes:
        lines.append(row(n, python, act_order, repeats, peer_repeats))
        print(lines[-1], flush=True)
    what = f"int4 symmetric, groups of {GROUP}, n x n, act_order={act_order}; seconds; objectives relative to round to nearest"
    when = f"{os.cpu_count()} cores, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}"
    return "\n".join([f"# One GPTQ solve\n\n{what}.\n", *lines, f"\n{when}.\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-repeats", type=int, default=1)
    parser.add_argument("--peer-python", default=os.environ.get("JQUANT_PEER_PYTHON"))
    parser.add_argument("--be-peer", nargs=2, metavar=("GIVEN", "ANSWER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.be_peer:
        be_peer(*args.be_peer)
    else:
        text = table(args.sizes, args.peer_python, args.act_order, args.repeats, args.peer_repeats)
        RESULT.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
