"""`jquant eval`."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from jquant import checkpoint
from jquant.cli.common import check_length, cut_text, default_text, is_saved, load_model, read_text
from jquant.cli.options import UsageError
from jquant.core.errors import JQuantError
from jquant.evaluate import evaluate_all
from jquant.models import Model, param_shapes
from jquant.report import Row, evaluation_table, reference_row, row


def run(args: Namespace) -> None:
    """The command."""
    source = _reference(args)
    file = args.text or default_text(source, "evaluation.txt")
    if file is None:
        raise UsageError("--text FILE is needed: a text that the model has not been calibrated on")
    content = read_text(file)
    reference = load_model(source, args.dtype)
    check_length(reference, args.length)
    text = cut_text(file, content, reference.tokenizer, args.length, args.windows)
    trees = _trees(args, source, reference)
    found = evaluate_all(reference.apply, reference.params, trees, text.windows)
    first = next(iter(found.values()))
    rows = [reference_row(source, first, reference.params)]
    rows += [row(name, e, trees[name]) for name, e in found.items() if trees[name] is not reference.params]
    _print(rows, args.format)


def _print(rows: list[Row], how: str) -> None:
    if how == "json":
        print(json.dumps([r._asdict() for r in rows], indent=1))
    elif how == "markdown":
        print(evaluation_table(rows).markdown())
    else:
        evaluation_table(rows).show()


def _reference(args: Namespace) -> str:
    """The float model to compare with: as given, what the first saved folder was made from, or the first model."""
    for name in (args.reference, *args.models):
        if name is not None and name != "demo" and not Path(name).exists():
            raise JQuantError(f"{name} does not exist; give a saved folder, a model's folder, a .gguf file, or demo")
    if args.reference:
        if is_saved(args.reference):
            raise UsageError(f"--reference {args.reference} is a quantized model; give the float one")
        return args.reference
    saved = [name for name in args.models if is_saved(name)]
    if not saved:
        return args.models[0]
    source = checkpoint.read_metadata(saved[0]).get("source")
    if source is None or (source != "demo" and not Path(source).exists()):
        was = "it does not say what it was made from" if source is None else f"it was made from {source}, which is gone"
        raise JQuantError(f"{saved[0]}: {was}; give the float model: --reference MODEL")
    return source


def _trees(args: Namespace, source: str, reference: Model) -> dict[str, Any]:
    """The parameters of every model, by name."""
    trees: dict[str, Any] = {}
    for name in args.models:
        if name == source:
            trees[name] = reference.params
            continue
        model = load_model(name, args.dtype, text=False)
        if param_shapes(model.config) != param_shapes(reference.config):
            raise JQuantError(f"{name} and {source} are not the same model; give the right one: --reference MODEL")
        trees[name] = model.params
    return trees
