"""A checkpoint is whole or an error: killed saves, damaged files, other folders."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from jquant.checkpoint import folder, is_checkpoint, load, read_metadata, save, verify
from jquant.core.errors import CheckpointError
from jquant.core.per_use import PerUse
from tests.checkpoint.cases import small_tree
from tests.core.cases import same_tree


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


# --- overwriting -----------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(tmp_path):
    save(tmp_path / "c", small_tree(0))
    with pytest.raises(CheckpointError, match="already there.*overwrite=True"):
        save(tmp_path / "c", small_tree(1))
    assert same_tree(load(tmp_path / "c"), small_tree(0))
    save(tmp_path / "c", small_tree(1), overwrite=True)
    assert same_tree(load(tmp_path / "c"), small_tree(1))
    assert names(tmp_path) == ["c"]


def test_only_checkpoints_are_ever_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        for overwrite in (False, True):
            with pytest.raises(CheckpointError, match="no jquant checkpoint is already there"):
                save(tmp_path / name, {}, overwrite=overwrite)
    assert (tmp_path / "home" / "letter").read_text() == "dear" and (tmp_path / "file").read_text() == "x"
    assert names(tmp_path) == ["file", "home"]


def test_an_empty_folder_and_missing_parents_are_free(tmp_path):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", small_tree())
    save(tmp_path / "a" / "b" / "c", small_tree())
    assert same_tree(load(tmp_path / "empty"), load(tmp_path / "a" / "b" / "c"))


def test_a_link_is_followed(tmp_path):
    save(tmp_path / "c", small_tree(0))
    (tmp_path / "link").symlink_to(tmp_path / "c")
    save(tmp_path / "link", small_tree(1), overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert same_tree(load(tmp_path / "c"), small_tree(1))


def test_a_damaged_checkpoint_can_be_overwritten(tmp_path):
    save(tmp_path / "c", small_tree(0))
    (tmp_path / "c" / "jquant.json").write_text("{")
    save(tmp_path / "c", small_tree(1), overwrite=True)
    assert same_tree(load(tmp_path / "c"), small_tree(1))


def test_remote_paths_are_refused():
    with pytest.raises(CheckpointError, match="only local paths"):
        save("gs://bucket/c", {})


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(path, stored):
        (path.parent / "half").write_text("x")
        raise OSError(28, "No space left on device")

    save(tmp_path / "c", small_tree(0))
    monkeypatch.setattr("jquant.checkpoint.checkpoint._write_arrays", full)
    with pytest.raises(CheckpointError, match="can't be written: .*No space left"):
        save(tmp_path / "c", small_tree(1), overwrite=True)
    assert names(tmp_path) == ["c"]
    assert same_tree(load(tmp_path / "c"), small_tree(0))


# --- killed on the way -----------------------------------------------------------------------------------------------


def _copy_tree(root: Path, copy: Path) -> None:
    # Orbax's threads may remove a folder of their own while it is being copied: then once more.
    for _ in range(50):
        try:
            shutil.copytree(root, copy, ignore_dangling_symlinks=True)
            return
        except (FileNotFoundError, shutil.Error):
            shutil.rmtree(copy, ignore_errors=True)
    raise AssertionError(f"{root} changes all the time")


def snapshots(root: Path, copies: Path, work) -> list[Path]:
    """Runs `work` and copies `root` before every step that touches a file in it: what a kill then leaves."""
    out: list[Path] = []
    watching = True

    def hook(event, args):
        nonlocal watching
        touches = any(isinstance(a, (str, Path)) and str(a).startswith(str(root)) for a in args)
        if (
            watching
            and touches
            and event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
        ):
            watching = False
            out.append(copies / str(len(out)))
            _copy_tree(root, out[-1])
            watching = True

    sys.addaudithook(hook)  # can't be removed: switched off below
    try:
        work()
    finally:
        watching = False
    return out


@pytest.mark.parametrize("atomic", [True, False], ids=["exchange", "two renames"])
def test_every_moment_of_an_overwrite_has_the_old_or_the_new(tmp_path, monkeypatch, atomic):
    """Also on systems that can't exchange two names, where the old one is found under the name it was moved to."""
    root, old, new = tmp_path / "root", small_tree(0), small_tree(1)
    calls = []
    real = folder.exchange
    monkeypatch.setattr(folder, "exchange", lambda a, b: calls.append(1) or (real(a, b) if atomic else False))
    root.mkdir()
    save(root / "c", old)
    # Orbax writes from other threads and removes what it wrote for itself: its files are copied as they stand.
    monkeypatch.setattr(shutil, "copy2", _copy_what_is_there)
    states = snapshots(root, tmp_path / "copies", lambda: save(root / "c", new, overwrite=True))
    assert calls and len(states) > 10
    seen = {True: 0, False: 0}
    for state in states:
        found = load(state / "c")
        assert same_tree(found, old) or same_tree(found, new)
        seen[same_tree(found, new)] += 1
    assert all(seen.values())
    if not atomic:
        assert any(not (state / "c").exists() for state in states)
    assert same_tree(load(root / "c"), new) and names(root) == ["c"]


def _copy_what_is_there(src, dst, **_):
    try:
        return shutil.copyfile(src, dst)
    except FileNotFoundError:
        return dst


CHILD = """
import os, signal, sys
from jquant.checkpoint import folder, save
from tests.checkpoint.cases import small_tree
moment = sys.argv[2]
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
def kill_after(fn): return lambda *a: (fn(*a), kill())
if moment == "arrays": folder.checksums = kill
if moment == "manifest": folder.write_manifest = kill
if moment == "commit": folder.commit = kill
if moment == "committed": folder.commit = kill_after(folder.commit)
save(sys.argv[1], small_tree(1), overwrite=True)
"""


@pytest.mark.parametrize("moment", ["arrays", "commit", "committed"])
def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path, moment):
    save(tmp_path / "c", small_tree(0))
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "c"), moment], env=env, cwd=root)
    assert child.returncode == -signal.SIGKILL
    assert same_tree(load(tmp_path / "c"), small_tree(1 if moment == "committed" else 0))
    leftover = [n for n in names(tmp_path) if ".jquant-tmp-" in n]
    assert len(names(tmp_path)) == 2 and len(leftover) == 1
    if moment == "arrays":
        with pytest.raises(CheckpointError, match="a save that did not finish; delete it"):
            load(tmp_path / leftover[0])
    save(tmp_path / "c", small_tree(2), overwrite=True)  # recognises it as dead, and removes it
    assert names(tmp_path) == ["c"] and same_tree(load(tmp_path / "c"), small_tree(2))


def test_a_first_save_that_was_killed_is_named(tmp_path):
    (tmp_path / ".c.jquant-tmp-host-1-0123abcd").mkdir()
    with pytest.raises(CheckpointError, match="nothing at this path; a save to it did not finish"):
        load(tmp_path / "c")


def test_the_temporary_of_a_running_save_is_left_alone(tmp_path):
    import platform

    running = tmp_path / f".c.jquant-tmp-{platform.node()}-{os.getpid()}-0123abcd"
    elsewhere = tmp_path / ".c.jquant-tmp-another-host-99999999-0123abcd"
    other = tmp_path / ".cc.jquant-tmp-host-99999999-0123abcd"
    for path in (running, elsewhere, other):
        path.mkdir()
    save(tmp_path / "c", small_tree())
    assert running.exists() and elsewhere.exists() and other.exists()


def test_an_old_checkpoint_moved_aside_is_not_dropped_unasked(tmp_path):
    save(tmp_path / "c", small_tree(0))
    (tmp_path / "c").rename(tmp_path / ".c.jquant-old-host-1-0123abcd")
    assert is_checkpoint(tmp_path / "c") and same_tree(load(tmp_path / "c"), small_tree(0))
    with pytest.raises(CheckpointError, match="already there"):
        save(tmp_path / "c", small_tree(1))
    save(tmp_path / "c", small_tree(1), overwrite=True)
    save(tmp_path / "c", small_tree(2), overwrite=True)
    assert names(tmp_path) == ["c"]


def test_an_interrupt_cleans_up(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "checksums", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "c", small_tree())
    assert names(tmp_path) == []


# --- damage ----------------------------------------------------------------------------------------------------------


def files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "c"
    save(path, small_tree(), metadata={"a": 1}, extra_files={"tokenizer.json": b"tokens"})
    return path


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(data[:-1])
    elif how == "longer":
        path.write_bytes(data + b"\0")
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "longer", "flipped"])
def test_every_damaged_file_is_found_and_named(whole, tmp_path, how):
    for i, file in enumerate(files(whole)):
        name = file.relative_to(whole).as_posix()
        if (name == "jquant.json" and how in ("missing", "longer")) or (how == "flipped" and not file.stat().st_size):
            continue
        copy = tmp_path / str(i)
        shutil.copytree(whole, copy)
        damage(copy / name, how)
        if name == "jquant.json" and how == "truncated":
            damage(copy / name, how)  # a newline at the end may go
        for read in (load, verify):
            with pytest.raises(CheckpointError, match=f"{name}.*(missing|bytes|damaged)") as e:
                read(copy)
            assert "copy" in str(e.value)  # what to do


def test_every_byte_of_the_manifest_counts(whole, tmp_path):
    """A changed byte is found, or changes nothing that is read (white space)."""
    shutil.copytree(whole, tmp_path / "c")
    manifest, data = tmp_path / "c" / "jquant.json", (whole / "jquant.json").read_bytes()
    want = folder.read_manifest(whole)
    for i in range(0, len(data), 7):
        manifest.write_bytes(data[:i] + bytes([data[i] ^ 0x08]) + data[i + 1 :])
        try:
            assert folder.read_manifest(tmp_path / "c") == want, i
        except CheckpointError as e:
            assert "jquant.json" in str(e)


def test_without_verification_orbax_still_refuses_what_it_can_see(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "c")
    for file in files(tmp_path / "c" / "arrays"):
        if file.parent.name == "d":
            file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged, Orbax can't read it"):
        load(tmp_path / "c", verify=False)


def test_files_that_others_put_beside_do_no_harm(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "c")
    (tmp_path / "c" / ".DS_Store").write_bytes(b"x")
    assert same_tree(load(tmp_path / "c"), small_tree())


def test_a_moved_checkpoint_is_the_same(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "elsewhere")
    assert same_tree(load(str(tmp_path / "elsewhere")), small_tree())


# --- something else --------------------------------------------------------------------------------------------------


def reseal(path: Path, **changes) -> None:
    manifest = {**folder.read_manifest(path), **changes}
    folder.write_manifest(path, manifest)


def test_a_newer_format_says_so_before_all_else(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "c")
    newer = {"format": "jquant checkpoint", "format_version": 5, "jquant_version": "9.1", "sha256": "of another kind"}
    (tmp_path / "c" / "jquant.json").write_text(json.dumps(newer))
    for read in (load, read_metadata, verify):
        with pytest.raises(CheckpointError, match=r"version 5, written by jquant 9.1, .*up to 4; update jquant"):
            read(tmp_path / "c")


def test_a_checkpoint_asks_for_no_newer_reader_than_it_needs(tmp_path):
    table = jnp.ones((4, 3))
    for name, leaf, version in (("plain", table, 1), ("per_use", PerUse(table, jnp.eye(3)), 2)):
        save(tmp_path / name, {"table": leaf})
        assert folder.read_manifest(tmp_path / name)["format_version"] == version


def test_a_number_format_of_the_future(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "c")
    leaves = folder.read_manifest(whole)["leaves"]
    leaves["layers/0/kernel"]["format"]["element"] = "int42"
    reseal(tmp_path / "c", leaves=leaves)
    with pytest.raises(CheckpointError, match="layers/0/kernel: .*int42.*update jquant"):
        load(tmp_path / "c")


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "{}", '{"format": "x", "format_version": 1, "sha256": ""}', "\xff"])
def test_manifests_that_are_none(tmp_path, text):
    (tmp_path / "jquant.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    import orbax.checkpoint as ocp

    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"a": jnp.ones(1)})
    for name, says in {
        "nowhere": "nothing at this path$",
        "file.gguf": "a file, but .*folder; jquant.models.load",
        "empty": "no jquant checkpoint, it has no jquant.json",
        "hf": "read it with jquant.models.load",
        "orbax": "plain Orbax checkpoint: read it with orbax.checkpoint",
    }.items():
        with pytest.raises(CheckpointError, match=says) as e:
            load(tmp_path / name)
        assert str(tmp_path / name) in str(e.value)
        assert not is_checkpoint(tmp_path / name)
