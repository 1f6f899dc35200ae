"""`save` and `load`: trees of arrays and QTensors in a folder, with Orbax."""

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jquant.checkpoint import folder as _folder
from jquant.checkpoint import tree as _tree
from jquant.checkpoint.sharding import qtensor_sharding
from jquant.core.errors import CheckpointError
from jquant.core.paths import flatten_with_paths, path_of
from jquant.core.per_use import PerUse, is_node
from jquant.core.qtensor import QTensor, is_qtensor

PathLike = str | os.PathLike[str]


def save(
    path: PathLike,
    tree: Any,
    *,
    metadata: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, bytes | PathLike] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a tree of arrays and QTensors to the folder `path`, whole or not at all.

    The folder is written under a temporary name beside `path` and renamed when all of it is on the disk. A process
    killed on the way leaves what was at `path` untouched.

    Args:
      path: the folder; its parents are made.
      tree: any pytree with string or integer keys. Leaves are arrays of any dtype and shape (sharded ones too),
        QTensors, PRNG keys, and Python's bool, int, float and str. `jquant.checkpoint.tree` says what kinds of nodes
        come back as what.
      metadata: a JSON-able dict, given back by `read_metadata` without reading an array.
      extra_files: files to put into the folder, by name: their bytes, or the path of a file to copy.
      overwrite: replace a checkpoint that is there, in one atomic step. Nothing but a checkpoint is ever replaced.

    Raises:
      CheckpointError: the path is taken, a leaf, key or the metadata can't be stored, or the disk refuses.
    """
    if jax.process_count() > 1:
        raise CheckpointError(
            "jquant.save writes from one process; in a program of several use orbax.checkpoint itself"
        )
    target = _folder.local_path(path)
    leaves, arrays = _tree.leaves_with_paths(tree), _tree.Arrays()
    extra_files = dict(extra_files or {})
    manifest = {
        "format": _folder.FORMAT_NAME,
        "format_version": _folder.version_needed(leaves.values()),
        "jquant_version": _version(),
        "metadata": _as_json(target, dict(metadata or {})),
        "extra_files": [_check_name(name) for name in extra_files],
        "tree": _tree.structure(tree, list(leaves)),
        "leaves": {p: _tree.describe(p, leaf, arrays) for p, leaf in leaves.items()},
    }
    try:
        with _folder.writing(target, overwrite) as temporary:
            _write_arrays(temporary / _folder.ARRAYS, arrays.stored)
            for name, content in extra_files.items():
                _write_extra(temporary / name, content)
            _folder.write_manifest(temporary, {**manifest, "files": _folder.checksums(temporary)})
    except OSError as e:
        raise CheckpointError(f"{target}: can't be written: {e}") from e


def load(
    path: PathLike,
    sharding: Any = None,
    *,
    like: Any = None,
    verify: bool = True,
) -> Any:
    """Reads a checkpoint that `save` wrote: the same leaves bit for bit, no template needed.

    Args:
      path: the folder.
      sharding: where the leaves go. None: the default device, uncommitted. One `jax.sharding.Sharding` for all leaves;
        a tree of shardings with the structure of the saved tree, or a prefix of it (None: the default device); or a
        function from a leaf's path to a sharding or None. The sharding of a QTensor is that of the array it stands for
        (`qtensor_sharding` maps it to its arrays). A device reads only its own part.
      like: a tree whose structure the result shall have (an nnx.State, a dataclass, ...): its paths must be the saved
        ones. Its leaves, arrays or `jax.ShapeDtypeStruct`, must have the saved shapes; QTensors the saved format. Their
        shardings are used where `sharding` is None. Without it, dicts, lists and tuples come back.
      verify: compare every file with its checksum first.

    Returns:
      The tree. Arrays are jax.Arrays; those of 64 bits are NumPy's where jax_enable_x64 is off, not cut to 32 bits.

    Raises:
      CheckpointError: no checkpoint, a newer format, a damaged folder, or one that does not fit `sharding` or `like`.
    """
    found = _folder.find(_folder.local_path(path))
    manifest = _folder.read_manifest(found)
    if verify:
        _folder.verify(found)
    leaves = {p: _tree.abstract(p, entry) for p, entry in manifest["leaves"].items()}
    wanted = None if like is None else _fit(found, leaves, like)
    place = _placement(found, leaves, sharding, wanted)
    shardings = {p: _component_shardings(found, p, leaf, place) for p, leaf in leaves.items()}
    arrays = _read_arrays(found, manifest["leaves"], shardings)
    out = {p: _fill(entry, leaves[p], arrays[p]) for p, entry in manifest["leaves"].items()}
    if like is None:
        return _tree.rebuild(manifest["tree"], out)
    flat, treedef = flatten_with_paths(like)
    return treedef.unflatten([out[p] for p, _ in flat])


# --- writing ---------------------------------------------------------------------------------------------------------


def _version() -> str:
    try:
        return importlib.metadata.version("jquant")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def _as_json(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: the metadata must be what JSON can hold: {e}") from e


def _check_name(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or str(PurePosixPath(name)) != name:
        raise CheckpointError(f"extra file {name!r}: a plain relative name is needed, as in 'tokenizer.json'")
    if parts[0] in (_folder.MANIFEST, _folder.ARRAYS):
        raise CheckpointError(f"extra file {name!r}: the name {parts[0]} is taken by the checkpoint itself")
    return name


def _write_extra(path: Path, content: bytes | PathLike) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (bytes, bytearray, memoryview)):
        path.write_bytes(content)
    else:
        shutil.copyfile(content, path)


def _write_arrays(path: Path, stored: dict[str, Any]) -> None:
    if not stored:
        return
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            checkpointer.save(path, stored)
            checkpointer.wait_until_finished()
        except (ValueError, TypeError) as e:
            raise CheckpointError(f"{path}: Orbax can't store an array of the tree: {e}") from e


# --- reading ---------------------------------------------------------------------------------------------------------


def _fit(path: Path, leaves: dict[str, Any], like: Any) -> dict[str, Any]:
    """The leaves of `like` by path, which must be those of the checkpoint."""
    wanted = _tree.leaves_with_paths(like)
    if missing := [p for p in wanted if p not in leaves]:
        raise CheckpointError(
            f"{path}: `like` has leaves that were not saved: {_some(missing)}; saved: {_some(leaves)}"
        )
    if left := [p for p in leaves if p not in wanted]:
        raise CheckpointError(f"{path}: leaves were saved that `like` does not have: {_some(left)}")
    for p, want in wanted.items():
        have = leaves[p]
        if hasattr(want, "shape") and not _key_like(want) and tuple(want.shape) != tuple(getattr(have, "shape", ())):
            raise CheckpointError(f"{path}: {p} was saved with shape {have.shape}, and `like` has {tuple(want.shape)}")
        if is_qtensor(want) and not (
            is_qtensor(have)
            and (want.format, want.activation, want.contracted) == (have.format, have.activation, have.contracted)
            and (want.side and want.side.words) == (have.side and have.side.words)
        ):
            raise CheckpointError(f"{path}: {p} was saved as {have}, and `like` has {want}")
    return wanted


def _key_like(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _some(paths: Any) -> str:
    paths = list(paths)
    return ", ".join(map(repr, paths[:5])) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def _placement(
    path: Path, leaves: dict[str, Any], sharding: Any, wanted: dict[str, Any] | None
) -> Callable[[str], Any]:
    """A function from a path to what says where the leaf goes: a Sharding, a QTensor of them, or None."""
    if sharding is None:
        if wanted is None:
            return lambda p: None
        # What `like` says: of a QTensor, the shardings of its arrays.
        return lambda p: jax.tree.map(lambda a: getattr(a, "sharding", None), wanted[p])
    if isinstance(sharding, Sharding):
        return lambda p: sharding
    if callable(sharding):
        return sharding
    return _by_prefix(path, leaves, sharding)


def _by_prefix(path: Path, leaves: dict[str, Any], tree: Any) -> Callable[[str], Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None or is_node(x))
    given = {path_of(keys): s for keys, s in flat}

    def prefix(p: str) -> str | None:
        while p not in given and "/" in p:
            p = p.rpartition("/")[0]
        return p if p in given else ("" if "" in given else None)

    found = {p: prefix(p) for p in leaves}
    if without := [p for p, g in found.items() if g is None]:
        raise CheckpointError(f"{path}: `sharding` says nothing of {_some(without)}; give None for the default device")
    if unused := set(given) - set(found.values()):
        raise CheckpointError(
            f"{path}: `sharding` has paths that were not saved: {_some(unused)}; saved: {_some(leaves)}"
        )
    return lambda p: given[found[p]]  # type: ignore[index]


def _component_shardings(path: Path, leaf_path: str, leaf: Any, place: Callable[[str], Any]) -> list[Any]:
    """A sharding or None for each array of a leaf, checked against its shape."""
    arrays: list[Any] = jax.tree.leaves(leaf)
    where = place(leaf_path)
    if not (where is None or isinstance(where, (Sharding, QTensor, PerUse))):
        raise CheckpointError(
            f"{path}: the sharding of {leaf_path} is a {type(where).__name__}; a jax.sharding.Sharding is needed, as "
            "in NamedSharding(mesh, PartitionSpec(...)), or None"
        )
    try:
        flat = _flat_shardings(leaf, where)
        for s, array in zip(flat, arrays, strict=True):
            if s is not None and hasattr(array, "shape"):
                s.shard_shape(array.shape)
    except ValueError as e:  # CheckpointError is one
        raise CheckpointError(f"{path}: the sharding of {leaf_path} does not fit it, {leaf}: {e}") from e
    return flat


def _flat_shardings(leaf: Any, where: Any) -> list[Any]:
    """A sharding or None for each array of a leaf, in their order."""
    if isinstance(leaf, PerUse):
        maps = where
        if isinstance(where, NamedSharding):  # the small maps go to all of its devices
            maps = NamedSharding(where.mesh, PartitionSpec(), memory_kind=where.memory_kind)
        of = lambda key: getattr(where, key) if isinstance(where, PerUse) else maps
        inside = _flat_shardings(leaf.value, where.value if isinstance(where, PerUse) else where)
        return [*inside, *[of(key) for key in ("lookup", "product") if getattr(leaf, key) is not None]]
    if isinstance(leaf, QTensor) and isinstance(where, Sharding):
        where = qtensor_sharding(leaf, where)
    if isinstance(where, QTensor):
        # A leaf of `like` may have None for an array that has no sharding.
        given: list[Any] = jax.tree.leaves(where, is_leaf=lambda s: s is None)
        whole = jax.tree.leaves(leaf, is_leaf=lambda a: a is None)
        return [s for s, a in zip(given, whole, strict=True) if a is not None]
    return [where] * len(jax.tree.leaves(leaf))


def _read_arrays(path: Path, entries: dict[str, Any], shardings: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The arrays of every leaf."""
    wanted = [(e, s) for p, entry in entries.items() for e, s in zip(_tree.array_entries(entry), shardings[p])]
    target = {e["array"]: _target(e, s) for e, s in wanted if e["array"]}
    stored: dict[str, Any] = {}
    if target:
        with ocp.StandardCheckpointer() as checkpointer:
            try:
                stored = checkpointer.restore(path / _folder.ARRAYS, target)
            except Exception as e:  # tensorstore and Orbax raise many kinds
                raise CheckpointError(f"{path}: damaged, Orbax can't read it: {e}") from e
    it = iter([_finish(path, e, s, stored) for e, s in wanted])
    return {p: [next(it) for _ in _tree.array_entries(entry)] for p, entry in entries.items()}


def _target(entry: dict[str, Any], sharding: Any) -> Any:
    shape, dtype = tuple(entry["shape"]), _tree.stored_dtype(entry)
    if sharding is None:  # to the host first: Orbax would commit it to a device
        return np.broadcast_to(np.zeros((), dtype), shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _finish(path: Path, entry: dict[str, Any], sharding: Any, stored: dict[str, Any]) -> Any:
    """An array in its own dtype, where it belongs."""
    dtype = np.dtype(entry["dtype"])
    array = stored[entry["array"]] if entry["array"] else np.zeros(entry["shape"], dtype)
    if array.shape != tuple(entry["shape"]) or array.dtype != _tree.stored_dtype(entry) and array.dtype != dtype:
        raise CheckpointError(f"{path}: damaged, an array is {array.dtype}{array.shape}, and the manifest says {entry}")
    array = array.astype(dtype)
    if sharding is not None:
        return jax.device_put(array, sharding)
    return array if jax.dtypes.canonicalize_dtype(dtype) != dtype else jnp.asarray(array)


def _fill(entry: dict[str, Any], leaf: Any, arrays: list[Any]) -> Any:
    """A leaf with its arrays."""
    if entry["kind"] == "python":
        return leaf
    if entry["kind"] == "key":
        return jax.random.wrap_key_data(arrays[0], impl=entry["impl"])
    return jax.tree.unflatten(jax.tree.structure(leaf), arrays)
