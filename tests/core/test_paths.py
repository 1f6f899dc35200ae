"""Paths: the key path joined by "/", the same whatever the tree is made of."""

import dataclasses
from typing import Any, NamedTuple

import flax.core
import flax.linen as linen
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jquant.core.formats import Format
from jquant.core.paths import flatten_with_paths, map_with_paths
from jquant.core.qtensor import is_qtensor
from tests.core.cases import normal, rtn, same_tree


def paths(tree: Any) -> list[str]:
    return [path for path, _ in flatten_with_paths(tree)[0]]


class Attention(NamedTuple):
    query: Any
    key: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    key: Any
    value: Any


def test_dicts_lists_tuples():
    tree = {"layers": [{"w": 1, "b": 2}, ({"w": 3},)], "x": 4}
    assert paths(tree) == ["layers/0/b", "layers/0/w", "layers/1/0/w", "x"]
    assert paths({3: {0: 1}}) == ["3/0"]
    assert paths(1) == [""]


def test_dataclasses_and_named_tuples():
    assert paths({"a": Attention(1, 2, 3)}) == ["a/query", "a/key", "a/value"]
    assert paths({"a": Block(1, {"w": 2})}) == ["a/key", "a/value/w"]


def test_a_field_called_value_keeps_its_name():
    """Its siblings tell it from the box of an nnx Variable; without the name it would have its parent's path."""
    assert paths({"a": Block(1, 2)}) == ["a/key", "a/value"]
    assert paths({"a": Block({"w": 1}, 2)}) == ["a/key/w", "a/value"]


def test_linen():
    params = linen.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    assert paths(params) == paths(flax.core.freeze(params)) == ["bias", "kernel"]
    boxed = {"kernel": linen.Partitioned(jnp.ones((2, 3)), names=("x", None))}
    assert paths(boxed) == ["kernel"]


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.head = nnx.Linear(2, 3, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(2, 2, use_bias=False, rngs=rngs) for _ in range(2)])


def test_nnx_state_has_the_paths_of_its_attributes():
    _, state = nnx.split(Model(nnx.Rngs(0)))
    want = ["head/bias", "head/kernel", "layers/0/kernel", "layers/1/kernel"]
    assert sorted(paths(state)) == want
    assert sorted(paths(nnx.to_pure_dict(state))) == want


@pytest.mark.parametrize("kind", ["dict", "nnx"])
def test_a_qtensor_is_one_leaf(kind):
    fmt = Format("int4", 4)

    def quantize(path, leaf):
        return rtn(leaf, fmt, (0,)) if path.endswith("kernel") else leaf

    _, state = nnx.split(Model(nnx.Rngs(0)))
    tree = nnx.to_pure_dict(state) if kind == "dict" else state
    out = map_with_paths(quantize, tree)
    assert paths(out) == paths(tree)
    assert type(out) is type(tree)
    assert sum(is_qtensor(leaf) for _, leaf in flatten_with_paths(out)[0]) == 3


def test_map_sees_every_path_and_rebuilds_the_tree():
    tree = {"a": [normal((2,)), Attention(normal((3,)), None, rtn(normal((8, 2)), Format("int8"), (0,)))]}
    seen = []
    out = map_with_paths(lambda path, leaf: seen.append(path) or leaf, tree)
    assert seen == ["a/0", "a/1/query", "a/1/value"]
    assert same_tree(out, tree)
    leaves, treedef = flatten_with_paths(tree)
    assert same_tree(treedef.unflatten([leaf for _, leaf in leaves]), tree)
