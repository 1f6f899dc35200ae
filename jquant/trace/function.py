"""A user's function and its arguments, traced: the jaxpr with one input for each parameter leaf and each array."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np

from jquant.core.errors import DamagedQTensorError, TraceError
from jquant.core.paths import flatten_with_paths
from jquant.core.per_use import is_node
from jquant.trace import compat


class Traced(NamedTuple):
    """A traced call.

    Attributes:
      jaxpr: inputs: the parameter leaves, then the arrays among the arguments.
      paths, leaves: the parameters; a QTensor is one leaf and one input of the shape it stands for.
      arrays: the arrays among the arguments.
      out_tree: structure of the outputs.
    """

    jaxpr: compat.Closed
    paths: list[str]
    leaves: list[Any]
    arrays: list[Any]
    out_tree: Any


def is_array(x: Any) -> bool:
    """What is traced of a function's arguments; Python scalars, strings, modules stay what they are."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays in a tree, and the function that puts others in their place; what else it holds stays."""
    flat, treedef = jax.tree.flatten(tree)

    def rebuild(arrays: Sequence[Any]) -> Any:
        it = iter(arrays)
        return jax.tree.unflatten(treedef, [next(it) if is_array(x) else x for x in flat])

    return [x for x in flat if is_array(x)], rebuild


def _check(path: str, leaf: Any) -> None:
    try:
        leaf.check()
    except DamagedQTensorError as error:
        raise DamagedQTensorError(f"{path}: {error}") from None


_known: ContextVar[dict[Any, Any] | None] = ContextVar("known", default=None)


@contextmanager
def tracing_once() -> Iterator[None]:
    """Inside, `trace_call` traces a function once for all parameters and arguments of the same shapes."""
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def trace_call(apply: Callable[..., Any], params: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Traced:
    """Traces `apply(params, *args, **kwargs)` at its arguments' shapes. Nothing is run, nothing is patched.

    Raises:
      TraceError: a parameter leaf is no array.
      DamagedQTensorError: the arrays of a leaf are not what its format says.
    """
    flat, treedef = flatten_with_paths(params)
    paths, leaves = [p for p, _ in flat], [v for _, v in flat]
    for path, leaf in flat:
        if not (is_array(leaf) or is_node(leaf) or isinstance(leaf, float | int | complex)):
            raise TraceError(f"{path}: a parameter leaf must be an array or a QTensor, not {type(leaf).__name__}")
        if is_node(leaf):
            _check(path, leaf)
    arrays, rebuild = split_arrays((tuple(args), kwargs))

    def call(leaves: list[Any], arrays: list[Any]) -> Any:
        args, kwargs = rebuild(arrays)
        return apply(treedef.unflatten(leaves), *args, **kwargs)

    known = _known.get()
    key = None if known is None else _trace_key(apply, paths, leaves, args, kwargs)
    if known is not None and key in known:
        jaxpr, out_tree, _ = known[key]
        return Traced(jaxpr, paths, leaves, arrays, out_tree)
    shapes = [compat.stand_in(v.arrays, v.shape, v.dtype) if is_node(v) else v for v in leaves]
    jaxpr, out_tree = compat.trace(call, shapes, arrays)
    if known is not None and key is not None:
        known[key] = jaxpr, out_tree, apply  # an id is the function's while it lives
    return Traced(jaxpr, paths, leaves, arrays, out_tree)


def _trace_key(
    apply: Any, paths: list[str], leaves: list[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Equal for calls of equal traces; None where that can't be told."""
    arrays, key = call_key(tuple(args), kwargs)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((leaves, arrays))):
        return None
    kinds = tuple(map(_kind, (*leaves, *arrays)))
    return jax.config.read("jax_enable_x64"), id(apply), tuple(paths), kinds, key


def _kind(x: Any) -> tuple[Any, ...]:
    """What a trace can depend on in an array."""
    shape = compat.abstract(x)
    sharding = None if is_node(x) or isinstance(x, jax.ShapeDtypeStruct) else getattr(jax.typeof(x), "sharding", None)
    return shape.shape, shape.dtype, getattr(shape, "weak_type", False), str(sharding)


def call_key(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The arrays among the arguments, and a key: calls of equal keys have the same trace."""
    rest, tree = jax.tree.flatten((tuple(args), kwargs))
    arrays = [x for x in rest if is_array(x)]
    shapes = tuple((x.shape, str(x.dtype)) if is_array(x) else repr(x) for x in rest)
    return arrays, (tree, shapes)


def call_args(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch, an array or a tuple or dict of arguments, as positional and keyword arguments."""
    if isinstance(batch, dict):
        return (), batch
    if isinstance(batch, tuple):
        return batch, {}
    return (batch,), {}
