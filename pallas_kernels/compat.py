"""The differences between the versions of JAX that the kernels run on (0.10.2 to 0.12), all in one place."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
from jax.experimental.pallas import triton as plt

from pallas_kernels.gpus import named

CompilerParams = plt.CompilerParams
_target: ContextVar[str | None] = ContextVar("target", default=None)


def target() -> str | None:
    """The GPU that the program around is lowered for, by its name in `gpus`, where `lowering_on` told it; else None."""
    return _target.get()


def device_of(device: str | None) -> str:
    """The name of the GPU that a kernel is for: the one that is asked for, that of `target`, or "any"."""
    return device or target() or "any"


@contextlib.contextmanager
def lowering_on(name: str | None) -> Iterator[None]:
    """Kernels traced inside are for this GPU."""
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)


def target_of(ctx: Any) -> str | None:
    """The GPU that a lowering rule's context is for, by the devices that the program is compiled for.

    None for devices that are not in `gpus`, and for a program to export: it may run on any.
    """
    module = ctx.module_context
    if module.lowering_parameters.for_export:
        return None
    axes = module.axis_context
    devices = getattr(axes, "device_assignment", None)
    if not devices and hasattr(axes, "mesh"):
        devices = getattr(axes.mesh, "_flat_devices_tuple", None)
    if not devices and hasattr(module.backend, "devices"):  # of a program of one device that no array names
        devices = module.backend.devices()
    return named(devices[0].device_kind) if devices else None


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` in a Triton kernel: `[m, k] x [k, n]`, float32 sums of 16-bit floats, int32 sums of int8."""
    # `allow_tf32` only matters for float32 operands: those keep all their bits.
    return plt.dot(a, b, allow_tf32=False) if a.dtype == jax.numpy.float32 else plt.dot(a, b)


@contextlib.contextmanager
def lowering_for(kind: str) -> Iterator[None]:
    """Kernels traced inside can be lowered for a GPU on a machine that has none.

    JAX 0.10.2 needs nothing: it takes compute capability 9.0 where there is no GPU. JAX 0.12 wants the device told by
    the abstract mesh around the kernel, which is the surrounding program's with a GPU of this kind for its device,
    unless it has a GPU already. It is kept with the traced kernel, so that it is there whenever that is lowered. The
    kind decides nothing else: XLA compiles for the device that it is told.
    """
    if jax.__version_info__ < (0, 11):
        yield
        return
    mesh = jax.sharding.get_abstract_mesh()
    known = mesh.abstract_device
    if known is not None and known.platform in ("gpu", "cuda"):
        yield
        return
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device)):
        yield


def dump_options(folder: str) -> dict[str, Any]:
    """Compiler options that make XLA write what it compiles, PTX included, into a folder."""
    every = {} if jax.__version_info__ < (0, 11) else {"xla_dump_emitter_re": "ptx"}
    return {"xla_dump_to": folder, **every}


def transposed(ref: Any) -> Any:
    """A reference of a Mosaic kernel with its two axes exchanged."""
    if jax.__version_info__ >= (0, 11):
        return ref.transpose((1, 0))
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.transpose_ref(ref, (1, 0))


@contextlib.contextmanager
def simulated(wanted: bool) -> Iterator[None]:
    """Mosaic GPU kernels traced inside run in Pallas' simulator, on any machine, if that is wanted.

    It looks for races: see `races_found`.
    """
    if not wanted:
        yield
        return
    from jax._src.pallas.mosaic_gpu.interpret import params

    with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True)):
        yield


def races_found() -> bool:
    """Whether the last kernel that ran in the simulator had a race. (JAX 0.12 raises an error then.)"""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return bool(getattr(gpu_callbacks.get_races(), "races_found", False))


def mosaic_dump(folder: str) -> dict[str, str]:
    """Environment variables that make Mosaic GPU write the PTX of its kernels into a folder."""
    return {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1"}
