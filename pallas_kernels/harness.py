"""Compiling for a GPU that is not there: `compile_for("h100", f, *shapes)` says what XLA and ptxas make of `f`.

It needs JAX's CUDA plugin, but neither a GPU nor a driver. The plugin must be told so before JAX starts its backends.
The import of this module does that; where they had started before, `compile_for` says what to set.
"""

import contextlib
import importlib.util
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import compat, ptx
from pallas_kernels.gpus import Gpu, gpu, target_config

_SKIP = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
# The plugin reads it when JAX starts its backends, which the import of this module comes before, as a rule.
os.environ.setdefault(_SKIP, "1")

INSTALL = 'pip install "jquant[gpu-compile]" (or "jax[cuda13]"), version for version the installed jax'


class CompileError(RuntimeError):
    """The deviceless compile cannot run on this machine."""


class Kernel(NamedTuple):
    """One kernel of a compiled program.

    Attributes:
      name: of the kernel.
      registers: of a thread, as ptxas assigned them.
      spill_bytes: bytes a thread writes to and reads from memory for want of registers.
      shared_bytes: of a block, as the launch asks for it.
      threads: of a block.
      grid: blocks, by axis.
      ptx: instruction counts and loads.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    grid: tuple[int, ...]
    ptx: ptx.Ptx

    @property
    def blocks(self) -> int:
        """How many blocks the grid has."""
        return math.prod(self.grid)

    def bytes_of_step(self, *parameters: int) -> int:
        """Bytes of global memory that a block asks for in one turn of its loop, of these arguments (or of all).

        Of several loops, for the blocks of an array that lie inside and those at its end, the most.
        """
        loops: dict[int, int] = {}
        for load in self.ptx.loads:
            if load.loop is not None and (not parameters or load.parameter in parameters):
                loops[load.loop] = loops.get(load.loop, 0) + load.bytes
        return self.threads * max(loops.values(), default=0)

    def occupancy(self, device: str | Gpu) -> float:
        """Resident warps of a core over the 64 that it has room for."""
        g = gpu(device)
        warps = max(1, self.threads // 32)
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = g.registers // (per_warp * warps)
        by_shared = g.shared_per_core // (self.shared_bytes + 1024)
        return min(by_registers, by_shared, 32, 64 // warps) * warps / 64


class Compiled(NamedTuple):
    """What XLA made of a function for one GPU.

    Attributes:
      kernels: all kernels, in the order of the PTX.
      hlo: the optimized program in text.
      temp_bytes: of intermediate arrays; None where XLA does not tell.
    """

    kernels: tuple[Kernel, ...]
    hlo: str
    temp_bytes: int | None

    def named(self, part: str) -> tuple[Kernel, ...]:
        """The kernels whose name contains `part`."""
        return tuple(k for k in self.kernels if part in k.name)


def why_not() -> str | None:
    """Why nothing can be compiled for a GPU here; None where it can."""
    if not any(importlib.util.find_spec(f"jax_plugins.xla_cuda{v}") for v in (13, 12) if _has_plugins()):
        return f"JAX's CUDA plugin is not installed: {INSTALL}"
    if ptxas() is None:
        return f"ptxas is not installed: {INSTALL}"
    return None


def _has_plugins() -> bool:
    return importlib.util.find_spec("jax_plugins") is not None


def ptxas() -> str | None:
    """The assembler that comes with the CUDA plugin."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        for found in sorted(Path(place).glob("*/bin/ptxas"), reverse=True):
            return str(found)
    return None


def topology(device: str | Gpu, shape: Sequence[int] = (1, 1, 1)) -> Any:
    """Devices of a kind that are not there, for `topologies.make_mesh`: slices, hosts, GPUs of a host.

    Raises:
      CompileError: the CUDA plugin is missing, or JAX had started without being told that there is no GPU.
    """
    reason = why_not()
    if reason is not None:
        raise CompileError(f"nothing can be compiled for a GPU here. {reason}")
    try:
        return topologies.get_topology_desc(
            platform="cuda", target_config=target_config(gpu(device)), topology="x".join(map(str, shape))
        )
    except Exception as error:
        raise CompileError(
            f"JAX gives no topology of {gpu(device).kind}: {error}. Where it was started before pallas_kernels.harness "
            f"was imported, set {_SKIP}=1 and JAX_PLATFORMS=cpu in the environment of the process"
        ) from error


def compile_for(device: str | Gpu, fn: Callable[..., Any], *shapes: Any) -> Compiled:
    """Compiles `fn` for a GPU that need not be there, by XLA's whole pipeline and ptxas.

    Args:
      device: "h100", "a100", "b200", or a `Gpu`.
      fn: a function of arrays; or what `jax.jit` made of one.
      shapes: its arguments, pytrees of `ShapeDtypeStruct` or of arrays.

    Raises:
      CompileError: this machine can't; the error says what to install or to set.
      Exception: whatever the compiler would raise on a machine with that GPU.
    """
    g = gpu(device)
    mesh = topologies.make_mesh(topology(g), (1,), ("x",))
    place = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes)
    with tempfile.TemporaryDirectory(prefix="compile_for_") as folder:
        with compat.lowering_for(g.kind):
            lowered = (fn if hasattr(fn, "lower") else jax.jit(fn)).lower(*args)
        with _environment(compat.mosaic_dump(folder)):
            compiled = lowered.compile(compiler_options=compat.dump_options(folder))
        texts = [text for f in sorted(Path(folder).glob("*.ptx")) if ".entry" in (text := f.read_text())]
        launches = _launches(Path(folder))
    found = [k for text in texts for k in _kernels(text, g, launches)]
    return Compiled(tuple(found), compiled.as_text(), _temp_bytes(compiled))


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _temp_bytes(compiled: Any) -> int | None:
    try:
        return int(compiled.memory_analysis().temp_size_in_bytes)
    except Exception:  # not every backend tells
        return None


def _kernels(text: str, g: Gpu, launches: dict[str, "Launch"]) -> list[Kernel]:
    resources = assemble(text, g)
    return [_one(k, resources[k.name], launches.get(k.name)) for k in ptx.kernels(text)]


def _one(k: ptx.Ptx, r: dict[str, int], launch: "Launch | None") -> Kernel:
    threads = launch.threads if launch else k.threads or 1024
    shared = max(r["shared"], launch.shared_bytes if launch else 0)
    return Kernel(k.name, r["registers"], r["spills"], shared, threads, launch.grid if launch else (), k)


def assemble(text: str, g: Gpu) -> dict[str, dict[str, int]]:
    """Registers, bytes of spills and of declared shared memory of each kernel of a PTX text, as ptxas tells them."""
    program = ptxas()
    if program is None:
        raise CompileError(f"ptxas is not installed: {INSTALL}")
    target = re.search(r"^\.target\s+(\w+)", text, re.M)
    with tempfile.TemporaryDirectory(prefix="ptxas_") as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(text)
        command = [program, "-v", "-O3", f"--gpu-name={target[1] if target else g.ptx_target}", str(source)]
        done = subprocess.run([*command, "-o", str(Path(folder) / "kernel.cubin")], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"ptxas failed: {done.stderr.strip()}")
    return parse_ptxas(done.stderr + done.stdout)


def parse_ptxas(log: str) -> dict[str, dict[str, int]]:
    """What `ptxas -v` prints, by kernel."""
    out: dict[str, dict[str, int]] = {}
    name = ""
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '([^']+)'", line):
            name = m[1]
            out[name] = {"registers": 0, "spills": 0, "shared": 0}
        if name and (m := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            out[name]["spills"] = int(m[1]) + int(m[2])
        if name and (m := re.search(r"Used (\d+) registers", line)):
            out[name]["registers"] = int(m[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                out[name]["shared"] = int(shared[1])
    return out


class Launch(NamedTuple):
    """How a kernel is launched: blocks by axis, threads of one, bytes of shared memory of one."""

    grid: tuple[int, ...]
    threads: int
    shared_bytes: int


def parse_launches(text: str) -> dict[str, Launch]:
    """The launches that XLA lists in the `thunk_sequence` it dumps, by kernel."""
    pattern = r"(\S+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]\s+shared_memory: (\d+) bytes"
    sizes = lambda text: tuple(int(n) for n in text.split(","))
    return {m[1]: Launch(sizes(m[2]), math.prod(sizes(m[3])), int(m[4])) for m in re.finditer(pattern, text)}


def _launches(folder: Path) -> dict[str, Launch]:
    return {k: v for f in folder.glob("*thunk_sequence.txt") for k, v in parse_launches(f.read_text()).items()}


def shape(*sizes: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    """A shape to compile for."""
    return jax.ShapeDtypeStruct(sizes, dtype)
