"""What an interrupted `quantize` needs to go on: solved units and the activations behind the last stop, on disk.

    folder/job.json           what is being done (a fingerprint of function inputs, recipe and method)
    folder/unit-*.npz         one solved unit each
    folder/state-K.npz        the activations behind stop K - 1; only the newest is kept

Files are written beside and renamed, so that a kill at any moment leaves the last whole state.
"""

import dataclasses
import hashlib
import json
import os
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jquant.core.errors import CheckpointError
from jquant.core.formats import Format
from jquant.core.qtensor import QTensor
from jquant.core.side import Side
from jquant.trace.program import Unit

_SECONDS_BETWEEN_STATES = 20.0


def fingerprint(paths: list[str], leaves: list[Any], batches: Any, *names: str) -> str:
    """Tells one job from another: checksums of the parameters and the batches, and the names of recipe and method."""
    h = hashlib.sha256()
    for path, leaf in zip(paths, leaves, strict=True):
        h.update(path.encode())
        h.update(_checksum(leaf))
    for leaf in jax.tree.leaves(batches):
        h.update(_checksum(leaf))
    h.update("\n".join(names).encode())
    return h.hexdigest()


def _checksum(leaf: Any) -> bytes:
    parts = [np.ascontiguousarray(np.asarray(a)) for a in jax.tree.leaves(leaf)]
    return ";".join(f"{a.shape}{a.dtype}{zlib.crc32(_plain(a).reshape(-1).data)}" for a in parts).encode()


class Store:
    """The folder of one job.

    Args:
      folder: where; made if it does not exist.
      job: the fingerprint. A folder of another job is refused.

    Raises:
      CheckpointError: the folder holds another job, or something else.
    """

    def __init__(self, folder: Any, job: str):
        self.folder = Path(folder)
        self.last = time.monotonic()
        note = self.folder / "job.json"
        if note.exists():
            if json.loads(note.read_text())["job"] != job:
                raise CheckpointError(
                    f"{folder} holds the work of another quantization (other parameters, batches, recipe or method); "
                    "give another folder, or remove this one"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise CheckpointError(f"{folder} is not empty and holds no interrupted quantization; give another folder")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(note, lambda f: f.write(json.dumps({"job": job}).encode()))

    def save(self, stop: int, solved: dict[Unit, QTensor], live: Any, last: bool) -> None:
        """Keeps newly solved units, and now and then the state behind stop `stop`."""
        for unit, q in solved.items():
            _write(self._unit_file(unit), lambda f, q=q, unit=unit: _save_unit(f, unit, q))
        if last or time.monotonic() - self.last < _SECONDS_BETWEEN_STATES:
            return
        self.last = time.monotonic()
        arrays = {f"{b}/{i}": np.asarray(a) for b, values in enumerate(live()) for i, a in enumerate(values)}
        target = self.folder / f"state-{stop + 1}.npz"
        _write(target, lambda f: _save_arrays(f, arrays))
        for old in self.folder.glob("state-*.npz"):
            if old != target:
                old.unlink()

    def units(self) -> dict[Unit, QTensor]:
        """Everything solved so far."""
        return dict(_load_unit(f) for f in sorted(self.folder.glob("unit-*.npz")))

    def state(self, batches: int) -> tuple[int, list[list[Any]]] | None:
        """The stop to go on at and the activations in front of it; None to start at the beginning."""
        files = sorted(self.folder.glob("state-*.npz"), key=lambda p: int(p.stem.split("-")[1]))
        if not files:
            return None
        try:
            with np.load(files[-1]) as data:
                values: list[list[Any]] = [[] for _ in range(batches)]
                for name in (k for k in data.files if not k.startswith("dtype:")):
                    values[int(name.split("/")[0])].append(data[name].view(_dtype(str(data["dtype:" + name]))))
        except (OSError, zipfile.BadZipFile, KeyError, ValueError) as e:
            raise CheckpointError(f"{files[-1]} is damaged ({e}); remove it to go on from the beginning") from e
        return int(files[-1].stem.split("-")[1]), values

    def _unit_file(self, unit: Unit) -> Path:
        name = hashlib.sha256(repr(unit).encode()).hexdigest()[:24]
        return self.folder / f"unit-{name}.npz"


def _dtype(name: str) -> Any:
    return jax.numpy.dtype(name)


def _plain(a: np.ndarray) -> np.ndarray:
    # npz knows no bfloat16: its bits are kept, its name beside them.
    return a if a.dtype.kind in "biufcU" else a.view(f"u{a.dtype.itemsize}")


def _save_arrays(f: Any, arrays: dict[str, np.ndarray]) -> None:
    names = {"dtype:" + k: np.asarray(a.dtype.name) for k, a in arrays.items()}
    everything: dict[str, Any] = {**{k: _plain(a) for k, a in arrays.items()}, **names}
    np.savez(f, **everything)


def _write(path: Path, fill: Any) -> None:
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as f:
        fill(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _save_unit(f: Any, unit: Unit, q: QTensor) -> None:
    arrays = {f"array{i}": np.asarray(a) for i, a in enumerate(q.arrays)}
    static = {
        "unit": unit, "planes": len(q.codes), "zero": q.zero_point is not None, "outer": len(q.outer),
        "side": len(jax.tree.leaves(q.side)),
        "format": dataclasses.asdict(q.format), "contracted": q.contracted, "inner": q.inner, "pad": q.pad,
        "dtype": q.dtype.name,
    }  # fmt: skip
    _save_arrays(f, {**arrays, "static": np.asarray(json.dumps(static))})


def _tuples(x: Any) -> Any:
    return tuple(_tuples(v) for v in x) if isinstance(x, list) else x


def _load_unit(path: Path) -> tuple[Unit, QTensor]:
    try:
        with np.load(path) as data:
            s = json.loads(str(data["static"]))
            outer, side = s.get("outer", 0), s.get("side", 0)
            side = 2 if side is True else int(side)  # what older versions wrote
            count = s["planes"] + 1 + s["zero"] + outer + side
            names = [f"array{i}" for i in range(count)]
            arrays = [jax.numpy.asarray(data[n].view(_dtype(str(data["dtype:" + n])))) for n in names]
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as e:
        raise CheckpointError(f"{path} is damaged ({e}); remove it, and what it held is solved again") from e
    planes, after = s["planes"], s["planes"] + 1 + s["zero"]
    fmt = Format(**{k: _tuples(v) for k, v in s["format"].items()})
    q = QTensor(
        tuple(arrays[:planes]), arrays[planes], arrays[planes + 1] if s["zero"] else None, fmt,
        tuple(s["contracted"]), tuple(s["inner"]), s["pad"], s["dtype"], outer=tuple(arrays[after : after + outer]),
        side=Side(*arrays[after + outer :]) if side else None,
    )  # fmt: skip
    return Unit(*_tuples(s["unit"])), q
