"""A tree as JSON: its structure, and one entry for each leaf. No template is needed to read it back.

What comes back is made of dicts, lists and tuples. A node of another kind (nnx.State, FrozenDict, a dataclass, a
NamedTuple) comes back as a dict of its keys or fields, and a box (nnx.Param, linen's Partitioned) as what is in it; the
paths of the leaves stay the same.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core.activation import Activation
from jquant.core.errors import CheckpointError, JQuantError
from jquant.core.formats import BlockParams, Format
from jquant.core.paths import flatten_with_paths
from jquant.core.per_use import PerUse, is_node, is_per_use
from jquant.core.qtensor import QTensor, is_qtensor
from jquant.core.side import Side

# Types that Orbax can't store, and the one that holds their values in the file.
_WIDENED = {"uint4": "uint8", "uint2": "uint8", "int2": "int8"}
_PYTHON = {"bool": bool, "int": int, "float": float, "str": str}


# --- structure -------------------------------------------------------------------------------------------------------


def _children(node: Any) -> list[tuple[Any, Any]]:
    """Keys and children one level down."""
    flat, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(keys[0] if keys else None, child) for keys, child in flat]


def _is_leaf(node: Any) -> bool:
    return is_node(node) or jax.tree_util.all_leaves([node])


def _name(key: Any) -> str | int:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            name = getattr(key, attribute)
            if isinstance(name, (str, int)) and not isinstance(name, bool):
                return name
    raise CheckpointError(f"a key of the tree is {key!r}; only strings and integers can be saved")


def structure(tree: Any, paths: list[str]) -> Any:
    """The JSON of a tree's structure; its leaves' paths are taken from the front of `paths`."""
    if tree is None:
        return None
    if _is_leaf(tree):
        return {"leaf": paths.pop(0)}
    children = _children(tree)
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [structure(child, paths) for _, child in children]}
    if (
        len(children) == 1
        and getattr(children[0][0], "name", "") in ("value", "raw_value")
        and _is_leaf(children[0][1])
    ):
        return structure(children[0][1], paths)
    return {"dict": [[_name(key), structure(child, paths)] for key, child in children]}


def rebuild(node: Any, leaves: dict[str, Any]) -> Any:
    """The inverse of `structure`."""
    if node is None:
        return None
    [(kind, content)] = node.items()
    if kind == "leaf":
        return leaves[content]
    if kind == "dict":
        return {key: rebuild(child, leaves) for key, child in content}
    return {"list": list, "tuple": tuple}[kind](rebuild(child, leaves) for child in content)


def leaves_with_paths(tree: Any) -> dict[str, Any]:
    """Leaves by path, in flattening order.

    Raises:
      CheckpointError: two leaves have the same path.
    """
    flat, _ = flatten_with_paths(tree)
    leaves: dict[str, Any] = {}
    for path, leaf in flat:
        if path in leaves:
            raise CheckpointError(
                f"two leaves of the tree have the path {path!r}; rename one of the keys it is made of"
            )
        leaves[path] = leaf
    return leaves


# --- leaves ----------------------------------------------------------------------------------------------------------


class Arrays:
    """Numbers the arrays of a tree as its leaves are described: `stored` is what goes to Orbax."""

    def __init__(self) -> None:
        self.stored: dict[str, Any] = {}

    def add(self, array: Any) -> dict[str, Any]:
        dtype = np.dtype(array.dtype)
        entry = {"shape": list(array.shape), "dtype": dtype.name, "array": None}
        if array.size:  # Orbax refuses arrays without elements; shape and dtype say all of them
            entry["array"] = f"a{len(self.stored)}"
            self.stored[entry["array"]] = array.astype(_WIDENED.get(dtype.name, dtype))
        return entry


def describe(path: str, leaf: Any, arrays: Arrays) -> dict[str, Any]:
    """The manifest's entry for a leaf; its arrays are added to `arrays`.

    Raises:
      CheckpointError: a leaf that can't be stored, or a damaged QTensor.
    """
    if is_qtensor(leaf):
        return _describe_qtensor(path, leaf, arrays)
    if is_per_use(leaf):
        maps = {k: getattr(leaf, k) for k in ("lookup", "product")}
        parts = {"value": describe(path, leaf.value, arrays)}
        return {"kind": "per_use", **parts, **{k: None if m is None else arrays.add(m) for k, m in maps.items()}}
    if type(leaf).__name__ in _PYTHON and type(leaf) in _PYTHON.values():
        value = leaf.hex() if isinstance(leaf, float) else leaf  # JSON has no NaN, and must not round
        return {"kind": "python", "type": type(leaf).__name__, "value": value}
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(leaf))
        return {"kind": "key", "impl": impl, **arrays.add(jax.random.key_data(leaf))}
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)) and np.dtype(leaf.dtype).kind not in "OSUMm":
        return {"kind": "array", **arrays.add(leaf)}
    raise CheckpointError(
        f"{path}: a {type(leaf).__name__} can't be saved; leaves are arrays, QTensors, PerUses, PRNG keys, and "
        "Python's bool, int, float and str"
    )


def _describe_qtensor(path: str, q: QTensor, arrays: Arrays) -> dict[str, Any]:
    try:
        q.check()
    except JQuantError as e:
        raise CheckpointError(f"{path}: {e}") from e
    return {
        "kind": "qtensor",
        "shape": list(q.shape),
        "dtype": q.dtype.name,
        "format": dataclasses.asdict(q.format),
        "contracted": list(q.contracted),
        "inner": list(q.inner),
        "pad": q.pad,
        "codes": [arrays.add(c) for c in q.codes],
        "scale": arrays.add(q.scale),
        "zero_point": None if q.zero_point is None else arrays.add(q.zero_point),
        "outer": [arrays.add(a) for a in q.outer],
        **_describe_activation(q, arrays),
        **({} if q.side is None else {"side": [arrays.add(a) for a in q.side if a is not None]}),
    }


def _describe_activation(q: QTensor, arrays: Arrays) -> dict[str, Any]:
    """Only where there is one: what older versions wrote has none."""
    if q.activation is None:
        return {}
    params = q.activation_params
    pair = () if params is None else (params.scale, params.zero_point)
    stored = [None if a is None else arrays.add(a) for a in pair] or None
    return {"activation": dataclasses.asdict(q.activation), "activation_params": stored}


def _read_format(path: str, fields: dict[str, Any]) -> Format:
    try:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return Format(**values)
    except (TypeError, JQuantError) as e:
        raise CheckpointError(f"{path}: this jquant does not know its format {fields}; update jquant ({e})") from e


def _read_activation(path: str, fields: dict[str, Any] | None) -> Activation | None:
    try:
        return None if fields is None else Activation(**fields)
    except (TypeError, JQuantError) as e:
        raise CheckpointError(f"{path}: this jquant does not know its activation {fields}; update jquant ({e})") from e


def abstract(path: str, entry: dict[str, Any]) -> Any:
    """A leaf as its entry says it is, with `jax.ShapeDtypeStruct` for arrays (not for Python's numbers: themselves)."""

    def one(e: dict[str, Any]) -> Any:
        return jax.ShapeDtypeStruct(tuple(e["shape"]), np.dtype(e["dtype"]))

    if entry["kind"] == "qtensor":
        return QTensor(
            tuple(one(e) for e in entry["codes"]),
            one(entry["scale"]),
            entry["zero_point"] and one(entry["zero_point"]),
            _read_format(path, entry["format"]),
            tuple(entry["contracted"]),
            tuple(entry["inner"]),
            entry["pad"],
            entry["dtype"],
            _read_activation(path, entry.get("activation")),
            BlockParams(*(e and one(e) for e in stored)) if (stored := entry.get("activation_params")) else None,
            tuple(one(e) for e in entry.get("outer", [])),
            Side(*map(one, stored)) if (stored := entry.get("side")) else None,
        )
    if entry["kind"] == "per_use":
        return PerUse(abstract(path, entry["value"]), *[entry[k] and one(entry[k]) for k in ("lookup", "product")])
    if entry["kind"] == "python":
        value = entry["value"]
        return float.fromhex(value) if entry["type"] == "float" else _PYTHON[entry["type"]](value)
    return one(entry)


def array_entries(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a leaf's arrays, in the order of `jax.tree.leaves`."""
    if entry["kind"] == "python":
        return []
    if entry["kind"] == "qtensor":
        more = [entry["zero_point"], *entry.get("outer", ()), *(entry.get("activation_params") or ())]
        more += entry.get("side", [])
        return [*entry["codes"], entry["scale"], *(e for e in more if e)]
    if entry["kind"] == "per_use":
        return [*array_entries(entry["value"]), *[entry[k] for k in ("lookup", "product") if entry[k]]]
    return [entry]


def stored_dtype(entry: dict[str, Any]) -> np.dtype:
    """The dtype of an array in the file."""
    return np.dtype(_WIDENED.get(entry["dtype"], entry["dtype"]))
