"""From named tensors in a file to the parameter tree: one tensor at a time, everything checked."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jquant.models.config import Config, param_shapes
from jquant.models.decoder import Params, nest
from jquant.models.errors import ModelError


def fill(
    config: Config,
    names: dict[str, str],
    available: Iterable[str],
    read: Callable[[str], np.ndarray],
    dtype: Any,
    where: str,
) -> Params:
    """Reads every parameter of `config`; holds the parameters and one tensor at a time.

    `names` maps the parts of a path to the file's (see `source_name`), `read` returns a tensor in the file's [out, in]
    order, `where` is the file or folder for messages. ModelError for a missing, an extra or a misshapen tensor.
    """
    shapes = param_shapes(config)
    sources = {path: source_name(path, names) for path in shapes}
    _check_names(set(sources.values()), set(available), where)
    return nest({path: _leaf(read, sources[path], path, shapes[path], dtype, where) for path in shapes})


def source_name(path: str, names: dict[str, str]) -> str:
    """`layers/3/attention/q/kernel` in a file's words, `model.layers.3.self_attn.q_proj.weight`."""
    module, _, leaf = path.rpartition("/")
    suffix = "bias" if leaf == "bias" else "weight"
    layer = re.fullmatch(r"layers/(\d+)/(.*)", module)
    if layer is None:
        return f"{names[module]}.{suffix}"
    return f"{names['layers']}.{layer[1]}.{names[layer[2]]}.{suffix}"


def _leaf(read: Callable, source: str, path: str, shape: tuple[int, ...], dtype: Any, where: str) -> Any:
    array = read(source)
    array = array.T if path.endswith("kernel") else array
    if array.shape != shape:
        in_file = shape[::-1] if path.endswith("kernel") else shape
        found = array.shape[::-1] if path.endswith("kernel") else array.shape
        raise ModelError(f"{where}: tensor {source} ({path}) has shape {found}, its config asks for {in_file}")
    # A copy on purpose: the array may look into a mapped file, which JAX would otherwise alias on the CPU.
    return jnp.asarray(array.astype(jnp.dtype(dtype), order="C"))


def _check_names(wanted: set[str], available: set[str], where: str) -> None:
    missing, extra = sorted(wanted - available), sorted(available - wanted)
    if missing:
        raise ModelError(f"{where}: missing {_some(missing)}; is the file complete, and does its config belong to it?")
    if extra:
        raise ModelError(f"{where}: {_some(extra)} not part of this architecture; it would be left out of the results")


def _some(names: list[str]) -> str:
    count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
    return f"{count} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
