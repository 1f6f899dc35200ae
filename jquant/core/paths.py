"""Paths of leaves: the key path joined by "/", the same for linen, nnx and plain trees."""

import collections
from collections.abc import Callable
from typing import Any

import jax

from jquant.core.per_use import is_node


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _boxed(keys: tuple[Any, ...]) -> bool:
    return len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name in ("value", "raw_value")


def path_of(keys: tuple[Any, ...], alone: bool = True) -> str:
    """The path of a leaf, `layers/3/attention/q/kernel`.

    A box around the leaf (an nnx Variable, linen's Partitioned) adds an attribute `value` to the key path, which is no
    part of the name the user gave; it is dropped. Not where the leaf has siblings (`alone` is False), as in a dataclass
    with the fields query, key and value.
    """
    return "/".join(_key_name(k) for k in (keys[:-1] if alone and _boxed(keys) else keys))


def flatten_with_paths(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Leaves of `tree` with their paths (a QTensor or a PerUse is one leaf), and the tree's structure."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)
    below = collections.Counter(keys[:end] for keys, _ in flat for end in range(len(keys)))
    return [(path_of(keys, alone=below[keys[:-1]] == 1), leaf) for keys, leaf in flat], treedef


def map_with_paths(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """Maps `fn(path, leaf)` over the leaves of `tree`; a QTensor is one leaf."""
    flat, treedef = flatten_with_paths(tree)
    return treedef.unflatten([fn(path, leaf) for path, leaf in flat])
