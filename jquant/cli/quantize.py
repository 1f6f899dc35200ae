"""`jquant quantize`."""

import platform
import shlex
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jquant as jq
from jquant.checkpoint import folder
from jquant.cli.common import Text, check_length, cut_text, default_text, is_saved, load_model, read_text, say
from jquant.cli.options import UsageError
from jquant.core.activation import split_policy
from jquant.core.errors import JQuantError
from jquant.core.method import Method
from jquant.core.paths import flatten_with_paths
from jquant.core.recipe import Recipe
from jquant.models import Model
from jquant.report import bytes_table


def parse_method(text: str, act_order: bool = False, damp: float | None = None) -> Method:
    """`jquant.parse_method` with a UsageError for what can't be read."""
    settings = {**({"act_order": True} if act_order else {}), **({} if damp is None else {"damp": damp})}
    try:
        return jq.parse_method(text, **settings)
    except JQuantError as error:
        said = str(error).replace("no act_order", "no --act-order").replace("no damp", "no --damp")
        raise UsageError(f"--method {said}") from error


def parse_recipe(text: str, paths: list[str]) -> Recipe:
    """`jquant.parse_recipe` with a UsageError for what can't be read."""
    try:
        return jq.parse_recipe(text, paths)
    except JQuantError as error:
        raise UsageError(f"--recipe: {error}") from error


def run(args: Namespace) -> None:
    """The command."""
    method = parse_method(args.method, args.act_order, args.damp)
    recipe = parse_recipe(args.recipe, [])  # a mistake is told before the model is loaded
    _check_paths(args)
    calibration = _calibration_file(args, method, wants_data(method, recipe))
    content = read_text(calibration) if calibration else None
    model = load_model(args.model, args.dtype)
    text = None
    if calibration and content:
        check_length(model, args.length)
        text = cut_text(calibration, content, model.tokenizer, args.length, args.samples)
    args.hint = _hint(args)
    recipe = parse_recipe(args.recipe, [p for p, _ in flatten_with_paths(model.params)[0]])
    started = time.monotonic()
    data = f", {len(text.windows)} windows of {args.length} tokens" if text else ""
    say(f"quantizing to {args.recipe} by {method.name}{data}")
    # The only reference to the float weights is handed over: a fold replaces them, and there is no room for both.
    params, model = [model.params], model._replace(params={})
    qparams = jax.block_until_ready(
        jq.quantize(model.apply, params.pop(), recipe, method, batches(text, args.batch), resume=args.resume)
    )
    _save(args, model, qparams, method, recipe, text, time.monotonic() - started)


def _check_paths(args: Namespace) -> None:
    if is_saved(args.model):
        raise UsageError(f"{args.model} is quantized already; give the float model it was made from")
    out = folder.local_path(args.out)
    if out.exists() and not args.overwrite and (not out.is_dir() or any(out.iterdir())):
        raise JQuantError(f"{args.out} exists; choose another --out, or add --overwrite to replace a saved model")
    folder.check_target(out, args.overwrite)


def wants_data(method: Method, recipe: Recipe) -> bool:
    """Whether a calibration text is needed: by the method, or for the static range of an input."""
    activations = [split_policy(rule)[1] for _, rule in recipe.rules if rule is not None]
    return method.needs_data or any(a is not None and a.static for a in activations)


def _calibration_file(args: Namespace, method: Method, wanted: bool) -> str | None:
    if args.resume and not method.needs:
        raise UsageError(f"--method {args.method} looks at no data, there is nothing to resume: leave out --resume")
    if not wanted:
        if args.calibration:
            raise UsageError(f"--method {args.method} looks at no data: leave out --calibration")
        return None
    file = args.calibration or default_text(args.model, "calibration.txt")
    if file is None:
        raise UsageError(f"--method {args.method} needs data: --calibration FILE, a text like what the model will read")
    return file


def batches(text: Text | None, size: int) -> list[Any]:
    """The windows in batches; without a text, only the shape of one."""
    if text is None:
        return [jax.ShapeDtypeStruct((1, 8), np.int32)]
    return [np.concatenate(text.windows[i : i + size]) for i in range(0, len(text.windows), size)]


def _hint(args: Namespace) -> str:
    if args.resume:
        return f"; the same command goes on where it stopped:\n  {shlex.join(['jquant', *sys.argv[1:]])}"
    return "; nothing was saved. With --resume DIR the same command could go on where it stopped"


def _save(
    args: Namespace, model: Model, qparams: Any, method: Method, recipe: Recipe, text: Text | None, seconds: float
) -> None:
    note = provenance(args.model, args.recipe, method, recipe, text, seconds)
    jq.models.save(args.out, qparams, model.config, model.tokenizer, metadata=note, overwrite=args.overwrite)
    bytes_table(qparams).show()
    say(f"quantized in {seconds:.0f} s, saved to {args.out}")
    if args.resume:
        say(f"{args.resume} is not needed any more")
    say(f"try it:  jquant generate {shlex.quote(args.out)} --prompt 'The'")


def provenance(
    source: str, recipe_text: str, method: Method, recipe: Recipe, text: Text | None, seconds: float
) -> dict[str, Any]:
    """Where a quantized model comes from, for the metadata of its folder."""
    data = None
    if text is not None:
        size = {"windows": len(text.windows), "length": text.windows[0].shape[-1]}
        data = {"file": text.path.name, "sha256": text.sha256, **size}
    return {
        "source": source if source == "demo" else str(Path(source).resolve()),
        "recipe": recipe_text,
        "rules": [[pattern, None if fmt is None else str(fmt)] for pattern, fmt in recipe.rules],
        "method": method.name,
        "calibration": data,
        "seconds": round(seconds, 1),
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "device": jax.devices()[0].device_kind,
    }
