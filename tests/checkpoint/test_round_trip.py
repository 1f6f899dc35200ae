"""What is saved comes back, bit for bit, without a template."""

import dataclasses
import json
import re
from typing import Any, NamedTuple

import flax.core
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from jquant.checkpoint import extra_file, is_checkpoint, load, read_manifest, read_metadata, save
from jquant.core.errors import CheckpointError
from jquant.core.formats import Format
from jquant.core.paths import flatten_with_paths, map_with_paths
from jquant.core.qtensor import is_qtensor
from tests.checkpoint.cases import every_leaf, small_tree
from tests.core.cases import EVERY_FORMAT, PRESET_FORMATS, any_bits, normal, rtn, same_bits, same_tree


@pytest.mark.slow(optimized=False)
def test_every_format(tmp_path):
    """All formats in one tree; contracted axes of every kind among them."""
    axes = [((11, 3), (0,)), ((3, 11), (-1,)), ((2, 3, 5), (0, 2)), ((7,), (0,)), ((4, 3), ())]
    tree = {
        f"{i}-{fmt}": any_bits(fmt, *axes[i % 5], ["float32", "bfloat16"][i % 2])
        for i, fmt in enumerate([*EVERY_FORMAT, *PRESET_FORMATS])
    }
    save(tmp_path / "c", tree)
    again = load(tmp_path / "c")
    assert same_tree(again, tree)
    assert all(is_qtensor(q) and q.shape == tree[k].shape for k, q in again.items())
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(again))


def test_every_kind_of_leaf(tmp_path):
    tree = every_leaf()
    save(tmp_path / "c", tree)
    again = load(tmp_path / "c")
    for name in ("arrays", "scalars", "empty", "a/b.c d:é*?", "nothing"):
        assert same_tree(again[name], jax.tree.map(jnp.asarray, tree[name])), name
    assert again["empty"] == {**again["empty"], "none": None, "dict": {}, "list": []}
    assert repr(again["python"]) == repr(tree["python"])  # NaN is not equal to itself
    assert [type(x) for x in again["python"]] == [type(x) for x in tree["python"]]
    assert again["key"].dtype == tree["key"].dtype and again["keys"].dtype == tree["keys"].dtype
    assert same_bits(jax.random.normal(again["key"], (3,)), jax.random.normal(tree["key"], (3,)))
    assert same_bits(jax.random.key_data(again["keys"]), jax.random.key_data(tree["keys"]))


def test_64_bits_are_not_cut_to_32(tmp_path):
    tree = every_leaf()["numpy"]
    save(tmp_path / "c", tree)
    again = load(tmp_path / "c")
    assert all(same_bits(again[k], tree[k]) for k in tree)
    assert isinstance(again["f32"], jax.Array) and isinstance(again["f64"], np.ndarray)
    with jax.enable_x64(True):
        again = load(tmp_path / "c")
        assert all(same_bits(again[k], tree[k]) and isinstance(again[k], jax.Array) for k in tree)


def test_arrays_come_back_uncommitted(tmp_path):
    """So that they go where the other operands of a program are."""
    save(tmp_path / "c", small_tree())
    assert not any(x.committed for x in jax.tree.leaves(load(tmp_path / "c")))


def name_of(value):
    """The id of a case: its repr, without the address of an object, which differs from process to process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@pytest.mark.parametrize("tree", [{}, [], None, {"a": {}}, 3, (1, [2])], ids=repr)
def test_trees_without_arrays(tmp_path, tree):
    save(tmp_path / "c", tree)
    assert load(tmp_path / "c") == tree


def test_a_single_leaf(tmp_path):
    q = rtn(normal((8, 3)), Format("int4"), (0,))
    save(tmp_path / "q", q)
    save(tmp_path / "a", jnp.ones(3))
    assert same_tree(load(tmp_path / "q"), q)
    assert same_tree(load(tmp_path / "a"), jnp.ones(3))


def test_integer_keys_stay_integers(tmp_path):
    save(tmp_path / "c", {"a": {0: jnp.ones(1), 12: jnp.zeros(2)}})
    assert same_tree(load(tmp_path / "c"), {"a": {0: jnp.ones(1), 12: jnp.zeros(2)}})


# --- other nodes -----------------------------------------------------------------------------------------------------


class Attention(NamedTuple):
    query: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    attention: Any
    value: Any


def quantized(tree):
    return map_with_paths(lambda p, x: rtn(x, Format("int4", 4), (0,)) if p.endswith("kernel") else x, tree)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.head = nnx.Linear(4, 3, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])


def test_nodes_come_back_as_dicts_with_the_same_paths(tmp_path):
    tree = {
        "named": Attention(normal((2,)), normal((3,))),
        "data": [Block({"w": normal((2,))}, normal((1,)))],
        "frozen": flax.core.freeze({"kernel": normal((2, 2))}),
        "boxed": linen.Partitioned(normal((2, 3)), names=("x", None)),
    }
    save(tmp_path / "c", tree)
    again = load(tmp_path / "c")
    want = {
        "named": tree["named"]._asdict(),
        "data": [{"attention": {"w": normal((2,))}, "value": normal((1,))}],
        "frozen": {"kernel": normal((2, 2))},
        "boxed": normal((2, 3)),
    }
    assert same_tree(again, want)
    assert sorted(p for p, _ in flatten_with_paths(again)[0]) == sorted(p for p, _ in flatten_with_paths(tree)[0])
    assert same_tree(load(tmp_path / "c", like=tree), tree)


def test_nnx_state_comes_back_as_a_dict_or_as_itself(tmp_path):
    graph, state = nnx.split(Model(nnx.Rngs(0)))
    tree = quantized(state)
    save(tmp_path / "c", tree)
    again = load(tmp_path / "c")
    assert same_tree(again, nnx.to_pure_dict(tree))
    state = load(tmp_path / "c", like=jax.eval_shape(lambda: tree))
    assert isinstance(state, nnx.State) and same_tree(state, tree)
    x = normal((2, 4))
    model, other = nnx.merge(graph, state), nnx.merge(graph, tree)
    assert same_bits(model.head(x), other.head(x))


def test_like_takes_the_float_tree_of_the_model(tmp_path):
    """A leaf of `like` says where a leaf goes and its shape, not whether it is quantized."""
    tree = small_tree()
    save(tmp_path / "c", tree)
    floats = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree, is_leaf=is_qtensor))
    assert same_tree(load(tmp_path / "c", like=floats), tree)


@pytest.mark.parametrize(
    ("like", "says"),
    [
        (lambda t: {**t, "more": jnp.ones(1)}, "'more'"),
        (lambda t: {"step": t["step"]}, "were saved that `like` does not have: 'layers/0/bias'"),
        (lambda t: {**t, "step": jnp.ones(3)}, r"step was saved with shape \(\), and `like` has \(3,\)"),
        (lambda t: {**t, "step": t["layers"][0]["kernel"]}, "step was saved"),
        (
            lambda t: jax.tree.map(
                lambda q: q.replace(format=Format("int3", 8)) if is_qtensor(q) else q, t, is_leaf=is_qtensor
            ),
            "was saved",
        ),
    ],
)
def test_like_that_does_not_fit(tmp_path, like, says):
    tree = small_tree()
    save(tmp_path / "c", tree)
    with pytest.raises(CheckpointError, match=says):
        load(tmp_path / "c", like=like({"layers": tree["layers"], "step": tree["step"]}))


# --- what cannot be saved --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"a": object()}, "a: a object can't be saved"),
        ({"a": np.asarray(["x"])}, "a: a ndarray can't be saved"),
        ({"a": 1j}, "a: a complex can't be saved"),
        ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, "a: a ShapeDtypeStruct can't be saved"),
        ({(1, 2): jnp.ones(1)}, "only strings and integers"),
        ({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, "two leaves .* the path 'a/b'"),
    ],
    ids=name_of,
)
def test_trees_that_cannot_be_saved(tmp_path, tree, says):
    with pytest.raises(CheckpointError, match=says):
        save(tmp_path / "c", tree)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_qtensor_is_not_saved(tmp_path):
    tree = jax.tree.map(lambda a: a.astype(jnp.bfloat16), small_tree())
    with pytest.raises(CheckpointError, match="layers/0/kernel: .*cast was mapped"):
        save(tmp_path / "c", tree)


# --- metadata, extra files, self-description -------------------------------------------------------------------------


def test_metadata_and_extra_files(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    metadata = {"config": {"layers": 2, "rope": [1.5, None]}, "name": "é"}
    files = {"tokenizer.json": b"\x00bytes", "more/vocab.json": tmp_path / "vocab.json"}
    save(tmp_path / "c", small_tree(), metadata=metadata, extra_files=files)
    assert read_metadata(tmp_path / "c") == metadata
    assert (tmp_path / "c" / "tokenizer.json").read_bytes() == b"\x00bytes"
    assert extra_file(tmp_path / "c", "more/vocab.json").read_text() == "{}"
    with pytest.raises(CheckpointError, match=r"no extra file 'x' .*it has tokenizer.json, more/vocab.json"):
        extra_file(tmp_path / "c", "x")
    (tmp_path / "c" / "tokenizer.json").write_bytes(b"\x01bytes")
    with pytest.raises(CheckpointError, match="its bytes have changed"):
        extra_file(tmp_path / "c", "tokenizer.json")
    save(tmp_path / "d", {})
    assert read_metadata(tmp_path / "d") == {}


@pytest.mark.parametrize(
    "metadata", [{"a": object()}, {"a": float("nan")}, {"a": np.ones(2)}, {(1, 2): 3}], ids=name_of
)
def test_metadata_that_json_cannot_hold(tmp_path, metadata):
    with pytest.raises(CheckpointError, match="what JSON can hold"):
        save(tmp_path / "c", {}, metadata=metadata)


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../b", "jquant.json", "arrays/x", "a\\b", "./x"])
def test_names_of_extra_files(tmp_path, name):
    with pytest.raises(CheckpointError, match="extra file"):
        save(tmp_path / "c", {}, extra_files={name: b""})


def test_an_extra_file_that_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="can't be written: .*missing"):
        save(tmp_path / "c", {}, extra_files={"x": tmp_path / "missing"})
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_says_what_is_inside(tmp_path):
    tree = small_tree()
    save(tmp_path / "c", tree)
    assert is_checkpoint(tmp_path / "c") and not is_checkpoint(tmp_path)
    manifest = read_manifest(tmp_path / "c")
    assert manifest["format_version"] == 1 and manifest["jquant_version"]
    assert list(manifest["leaves"]) == [p for p, _ in flatten_with_paths(tree)[0]]
    entry = manifest["leaves"]["layers/1/kernel"]
    assert {k: entry[k] for k in ("kind", "shape", "dtype", "contracted", "inner", "pad")} == {
        "kind": "qtensor", "shape": [4, 4, 6], "dtype": "bfloat16", "contracted": [-3, -2], "inner": [4], "pad": 0
    }  # fmt: skip
    assert Format(**entry["format"]) == tree["layers"][1]["kernel"].format
    files = {p.relative_to(tmp_path / "c").as_posix() for p in (tmp_path / "c").rglob("*") if p.is_file()}
    assert files == {*manifest["files"], "jquant.json"}
    json.loads((tmp_path / "c" / "jquant.json").read_text())


def test_orbax_alone_reads_the_arrays(tmp_path):
    """Whoever has no jquant has the arrays still."""
    q = rtn(normal((8, 3)), Format("int4"), (0,))
    save(tmp_path / "c", {"w": q})
    entry = read_manifest(tmp_path / "c")["leaves"]["w"]
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(tmp_path / "c" / "arrays")
    assert same_bits(arrays[entry["codes"][0]["array"]], q.codes[0])
    assert same_bits(arrays[entry["scale"]["array"]], q.scale)
