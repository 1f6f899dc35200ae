"""`jquant inspect`."""

from argparse import Namespace
from typing import Any

import jax
import numpy as np

from jquant import checkpoint, models
from jquant.checkpoint.tree import abstract
from jquant.cli.common import is_saved
from jquant.cli.options import UsageError
from jquant.cli.quantize import parse_recipe
from jquant.core.formats import compute_params
from jquant.core.paths import map_with_paths
from jquant.core.qtensor import encode_array, to_rows
from jquant.models.decoder import nest
from jquant.ranges import with_activation
from jquant.report import bytes_table, sites_table
from jquant.trace.sites import find_sites
from jquant.trace.targets import Target, plan_targets


def run(args: Namespace) -> None:
    """The command. No parameter is read: shapes and formats are enough."""
    config = models.load_config(args.model)
    shapes = models.param_shapes(config)
    tree = nest({path: _shape_only(shape, args.dtype) for path, shape in shapes.items()})
    sites = find_sites(models.build(config), tree, jax.ShapeDtypeStruct((1, 8), np.int32))
    if is_saved(args.model):
        if args.recipe:
            raise UsageError(f"{args.model} is quantized already; --recipe is for float models")
        _show_provenance(checkpoint.read_metadata(args.model))
        tree = {p: abstract(p, entry) for p, entry in checkpoint.read_manifest(args.model)["leaves"].items()}
    elif args.recipe:
        recipe = parse_recipe(args.recipe, list(shapes))
        tree = _as_quantized(tree, plan_targets(sites, tree, recipe))
    if args.all:
        print(sites)
    else:
        sites_table(sites, tree).show()
    print()
    bytes_table(tree).show()


def _shape_only(shape: tuple[int, ...], dtype: str) -> Any:
    """An array of a shape that takes the memory of one number."""
    return np.broadcast_to(np.zeros((), jax.numpy.dtype(dtype)), shape)


def _as_quantized(tree: Any, targets: dict[str, Target]) -> Any:
    """The shapes of the tree that quantizing would give."""

    def one(path: str, leaf: Any) -> Any:
        target = targets.get(path)
        return leaf if target is None else jax.eval_shape(lambda w: _round(w, target), leaf)

    def _round(w: jax.Array, t: Target) -> Any:
        q = encode_array(w, compute_params(to_rows(w, t.contracted), t.format), t.format, t.contracted)
        return with_activation(q, t)

    return map_with_paths(one, tree)


def _show_provenance(note: dict[str, Any]) -> None:
    data = note.get("calibration")
    lines = {
        "made from": note.get("source"),
        "recipe": note.get("recipe"),
        "method": note.get("method"),
        "calibration": data and f"{data['windows']} windows of {data['length']} tokens of {data['file']}",
        "with": ", ".join(f"{name} {version}" for name, version in note.get("versions", {}).items()),
    }
    for name, value in lines.items():
        if value:
            print(f"{name + ':':<13}{value}")
    print()
