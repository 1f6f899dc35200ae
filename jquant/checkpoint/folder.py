"""The folder of a checkpoint: written beside its name and renamed, a checksum for every file, a manifest that says all.

    path/jquant.json       the manifest: versions, metadata, the tree, every leaf, size and SHA-256 of every other file
    path/arrays/           a plain Orbax checkpoint of a flat dict, whose keys the manifest maps to leaves
    path/<extra files>     what the caller put beside it: a tokenizer, a licence

While it is written it is called `.<name>.jquant-tmp-<host>-<pid>-<random>`. A process killed on the way leaves such a
folder behind; nothing reads it, and the next save to the same path from the same host removes it.
"""

import concurrent.futures
import contextlib
import ctypes
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jquant.core.errors import CheckpointError
from jquant.core.per_use import held, is_per_use
from jquant.core.qtensor import is_qtensor

MANIFEST = "jquant.json"
ARRAYS = "arrays"
FORMAT_NAME = "jquant checkpoint"
# 2: a QTensor may have an activation, a leaf may be a PerUse; 3: a QTensor may have a side; 4: one that takes
FORMAT_VERSION = 4


def version_needed(leaves: Iterable[Any]) -> int:
    """The oldest version that can say what the leaves are: whoever knows only that one reads them right."""
    return max(map(_needed, leaves), default=1)


def _needed(leaf: Any) -> int:
    inner = held(leaf)
    if is_qtensor(inner) and inner.side is not None:
        return 3 if inner.side.taken is None else 4
    return 2 if is_per_use(leaf) or (is_qtensor(inner) and inner.activation is not None) else 1


_TMP, _OLD = ".jquant-tmp-", ".jquant-old-"


def local_path(path: str | os.PathLike[str]) -> Path:
    """An absolute local path; symbolic links followed, so that a rename replaces what they point to."""
    text = os.fspath(path)
    if "://" in text:
        raise CheckpointError(f"{text}: only local paths can be read and written; copy the folder, or mount the bucket")
    return Path(text).expanduser().resolve()


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is the folder of a jquant checkpoint (perhaps a damaged one)."""
    return (find(local_path(path)) / MANIFEST).is_file()


# --- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary sibling folder, which takes the name `path` when the block ends well, and is gone otherwise.

    Raises:
      CheckpointError: `path` is taken, and may not be replaced.
    """
    check_target(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = _sibling(path, _TMP)
    temporary.mkdir()
    try:
        yield temporary
        _sync_folders(temporary)
        commit(temporary, path, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(path: Path, overwrite: bool) -> None:
    """Refuses a path that may not be written: taken, unless `overwrite` and what is there is a checkpoint of ours."""
    path = find(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if path.is_dir() and (path / MANIFEST).is_file():
        if overwrite:
            return
        raise CheckpointError(f"{path}: a checkpoint is already there; choose another path, or pass overwrite=True")
    raise CheckpointError(
        f"{path}: something that is no jquant checkpoint is already there; choose another path "
        "(overwrite=True replaces jquant checkpoints only)"
    )


def commit(temporary: Path, path: Path, overwrite: bool) -> None:
    """Gives a finished folder its name, in one step where the system can exchange two names."""
    check_target(path, overwrite)  # again: another process may have been quicker
    if not path.exists() or not (path / MANIFEST).exists():
        os.rename(temporary, path)
    elif not exchange(temporary, path):
        # Between these renames the old checkpoint is whole under the other name, where `find` looks for it.
        old = _sibling(path, _OLD)
        os.rename(path, old)
        os.rename(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    _sync(path.parent)


def exchange(a: Path, b: Path) -> bool:
    """Exchanges two names atomically (Linux's renameat2). False, and nothing done, where the system can't."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0


def remove_leftovers(path: Path) -> None:
    """Removes what saves to `path` left behind when their process was killed. A save still running is left alone."""
    for leftover in _siblings(path, _TMP):
        host, pid, _ = leftover.name.rpartition(_TMP)[2].rsplit("-", 2)
        if host == platform.node() and not _alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)
    if path.exists():
        for leftover in _siblings(path, _OLD):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _sibling(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}{kind}{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"


def _siblings(path: Path, kind: str) -> list[Path]:
    if not path.parent.is_dir():
        return []
    pattern = re.compile(re.escape(f".{path.name}{kind}") + r".*-\d+-[0-9a-f]{8}")
    return sorted(p for p in path.parent.iterdir() if pattern.fullmatch(p.name))


def _sync(path: Path) -> None:
    # Folders can't be opened everywhere; the rename is atomic without it, only its survival of a power cut is not.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_folders(folder: Path) -> None:
    for root, _, _ in os.walk(folder):
        _sync(Path(root))


# --- checksums and the manifest --------------------------------------------------------------------------------------


def _digest(path: Path, sync: bool) -> dict[str, Any]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in `folder` but the manifest, which are on the disk when this returns."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = pool.map(lambda p: _digest(p, sync=True), files)
    return {p.relative_to(folder).as_posix(): d for p, d in zip(files, digests, strict=True)}


def _seal(manifest: dict[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _readable(manifest: dict[str, Any]) -> str:
    """JSON with one line for each leaf and file."""
    parts = []
    for key, value in manifest.items():
        text = json.dumps(value, allow_nan=False)
        if key in ("leaves", "files") and value:
            lines = [f"  {json.dumps(name)}: {json.dumps(entry, allow_nan=False)}" for name, entry in value.items()]
            text = "{\n" + ",\n".join(lines) + "\n }"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, sealed with its own checksum. The last file to be written."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(_readable({**manifest, "sha256": _seal(manifest)}))
        file.flush()
        os.fsync(file.fileno())


def find(path: Path) -> Path:
    """The folder to read for `path`: itself, or the old checkpoint that a killed save had moved aside."""
    if path.exists() or not path.name:
        return path
    aside = [p for p in _siblings(path, _OLD) if (p / MANIFEST).is_file()]
    return aside[-1] if aside else path


def _not_a_checkpoint(path: Path) -> CheckpointError:
    if not path.exists():
        unfinished = _siblings(path, _TMP)
        more = f"; a save to it did not finish ({unfinished[0].name}), save again" if unfinished else ""
        return CheckpointError(f"{path}: there is nothing at this path{more}")
    if not path.is_dir():
        return CheckpointError(
            f"{path}: a file, but a jquant checkpoint is a folder; jquant.models.load reads .gguf files"
        )
    if _TMP in path.name:
        return CheckpointError(f"{path}: a save that did not finish; delete it, and save again")
    why = f"no jquant checkpoint, it has no {MANIFEST}"
    if (path / "_CHECKPOINT_METADATA").exists():
        return CheckpointError(f"{path}: {why}. It is a plain Orbax checkpoint: read it with orbax.checkpoint")
    if (path / "config.json").exists():
        return CheckpointError(f"{path}: {why}. It looks like a model's folder: read it with jquant.models.load")
    return CheckpointError(f"{path}: {why}; give the folder that jquant.save wrote")


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the checkpoint says of itself: `format_version`, `jquant_version`, `metadata`, `tree`, `leaves`, `files`.

    Raises:
      CheckpointError: no checkpoint, one of a newer format, or a damaged manifest.
    """
    folder = find(local_path(path))
    if not (folder / MANIFEST).is_file():
        raise _not_a_checkpoint(folder)
    damaged = CheckpointError(f"{folder / MANIFEST}: damaged; restore the folder from a copy, or quantize again")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
        ours = manifest["format"] == FORMAT_NAME
        seal = manifest.pop("sha256")
    except OSError as e:
        raise CheckpointError(f"{folder / MANIFEST}: can't be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise damaged from e
    if ours and isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: its format is version {version}, written by jquant {manifest.get('jquant_version')}, and this "
            f"jquant reads versions up to {FORMAT_VERSION}; update jquant"
        )
    if not ours or seal != _seal(manifest):
        raise damaged
    return manifest


def verify(path: str | os.PathLike[str]) -> None:
    """Reads every file of a checkpoint and compares it with its checksum.

    Raises:
      CheckpointError: a file is missing, shorter or longer, or has other bytes; the message names all such files.
    """
    folder = find(local_path(path))
    files: dict[str, dict[str, Any]] = read_manifest(folder)["files"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = pool.map(lambda item: _damage(folder / item[0], item[1]), files.items())
        damaged = [f"{name} ({what})" for name, what in zip(files, found, strict=True) if what]
    if damaged:
        raise CheckpointError(
            f"{folder}: damaged: {', '.join(damaged)}; copy the folder again from where it was whole, or quantize again"
        )


def _damage(path: Path, want: dict[str, Any]) -> str | None:
    try:
        have = path.stat().st_size
        if have != want["bytes"]:
            return f"has {have} bytes of {want['bytes']}"
        return None if _digest(path, sync=False) == want else "its bytes have changed"
    except FileNotFoundError:
        return "missing"
    except OSError as e:
        return f"can't be read: {e.strerror}"


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `metadata` that was saved with a checkpoint, as JSON gives it back (tuples as lists); {} if none was given"""
    return read_manifest(path)["metadata"]


def extra_file(path: str | os.PathLike[str], name: str) -> Path:
    """Path of a file that was saved beside the arrays (`extra_files`), checked against its checksum.

    Raises:
      CheckpointError: there is no such file, or it is damaged.
    """
    folder = find(local_path(path))
    manifest = read_manifest(folder)
    if name not in manifest["extra_files"]:
        has = ", ".join(manifest["extra_files"]) or "none"
        raise CheckpointError(f"{folder}: no extra file {name!r} was saved with it; it has {has}")
    if what := _damage(folder / name, manifest["files"][name]):
        raise CheckpointError(f"{folder / name}: {what}; restore the folder from a copy")
    return folder / name
