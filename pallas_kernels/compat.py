"""The differences between the versions of JAX that the kernels run on (0.10.2 to 0.12), all in one place."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.pallas import triton as plt

CompilerParams = plt.CompilerParams


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` in a Triton kernel: `[m, k] x [k, n]`, float32 sums of 16-bit floats, int32 sums of int8."""
    # `allow_tf32` only matters for float32 operands: those keep all their bits.
    return plt.dot(a, b, allow_tf32=False) if a.dtype == jax.numpy.float32 else plt.dot(a, b)


def _abstract_gpu(mesh: Any, kind: str) -> Any:
    """`mesh` on a GPU of this kind: what JAX 0.12 reads when it lowers for a GPU that is not there."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    return mesh.update(abstract_device=device)


@contextlib.contextmanager
def lowering_for(kind: str) -> Iterator[None]:
    """Kernels traced and lowered inside are lowered for this kind of GPU, if the process has none.

    JAX 0.10.2 assumes compute capability 9.0 where there is no GPU and needs nothing. JAX 0.12 wants the device told by
    an abstract mesh. The mesh of the surrounding program, if any, is kept.
    """
    if not hasattr(jax.sharding, "get_abstract_mesh") or not _needs_abstract_device():
        yield
        return
    with jax.sharding.use_abstract_mesh(_abstract_gpu(jax.sharding.get_abstract_mesh(), kind)):
        yield


def _needs_abstract_device() -> bool:
    return jax.__version_info__ >= (0, 11) and hasattr(jax.sharding, "AbstractDevice")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that Pallas' Triton backend will one day be removed (JAX 0.12)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
        yield


def dump_options(folder: str) -> dict[str, Any]:
    """Compiler options that make XLA write what it compiles, PTX included, into a folder."""
    every = {} if jax.__version_info__ < (0, 11) else {"xla_dump_emitter_re": ".*"}
    return {"xla_dump_to": folder, **every}
