"""The differences between the versions of JAX that the kernels run on (0.10.2 to 0.12), all in one place."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.pallas import triton as plt

CompilerParams = plt.CompilerParams


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


@contextlib.contextmanager
def simulated(wanted: bool) -> Iterator[None]:
    """Mosaic GPU kernels traced inside run in Pallas' simulator, on any machine, if that is wanted."""
    if not wanted:
        yield
        return
    from jax._src.pallas.mosaic_gpu.interpret import params

    with params.force_gpu_interpret_mode(params.InterpretGPUParams()):
        yield
