"""Codes times codes through Pallas' Triton backend: int8 x int8 -> int32 and fp8 x fp8 -> float32.

The scales multiply the sums: those of rows at the end, those of groups (128, as in DeepSeek-V3, arXiv 2412.19437,
section 3.3) at the end of each group. The weight is the left operand of the tensor core, so that few rows of
activations cost little.

Only int8 has tensor-core products of its own here. Triton has none of fp8 whose sums are float32 throughout, and
upcasts to float16 in registers instead (before compute capability 8.9 this kernel does it itself): fp8 codes save
bytes, which is what few rows want; for many rows XLA's own fp8 product is the one to take.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import compat
from pallas_kernels.blocks import indices, load, mask, program
from pallas_kernels.gpus import gpu
from pallas_kernels.low_precision_matmul.tilings import choose
from pallas_kernels.quantized_matmul import upcast
from pallas_kernels.quantized_matmul.elements import ELEMENTS
from pallas_kernels.quantized_matmul.rings import group_of
from pallas_kernels.quantized_matmul.tilings import Tiling

_FLOATS = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}


def why_not(a: Any, b: Any, group_size: int | None) -> str | None:
    """Why this kernel can't do a product of two dtypes; None where it can."""
    names = jnp.dtype(a).name, "int8" if jnp.dtype(b) == jnp.uint8 else jnp.dtype(b).name
    if names[0] != names[1] or not (names[0] == "int8" or names[0] in _FLOATS):
        return f"{names[0]} x {names[1]} is no product of a tensor core"
    if group_size is not None and (group_size & -group_size) < 32:
        return f"groups of {group_size} are cut at no power of two of 32 elements"
    return None


def low_precision_matmul(
    a: jax.Array,
    b: jax.Array,
    a_scale: jax.Array,
    b_scale: jax.Array,
    *,
    group_size: int | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    device: str | None = None,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`reference.low_precision_matmul` as one kernel.

    Args:
      device: the GPU that tilings, and the use of its fp8 products, are chosen for: a program for "h100" does not
        run on an A100. By default as `compat.device_of` says.
      tiling: to choose it oneself; groups are multiples of its block_k.
      interpret: run on the CPU, slowly, to see that the numbers are right.

    Raises:
      ValueError: `why_not` has a reason.
    """
    reason = why_not(a.dtype, b.dtype, group_size)
    if reason is not None:
        raise ValueError(f"low_precision_matmul: no Triton kernel: {reason}")
    (m, k), n, device = a.shape, b.shape[0], compat.device_of(device)
    out_dtype = jnp.dtype(out_dtype)
    if 0 in (m, k, n):
        return jnp.zeros((m, n), out_dtype)
    t = tiling or choose(m, n, k, group_size, gpu(device))
    group = group_of(group_size, k)
    if group % t.block_k:
        raise ValueError(f"low_precision_matmul: block_k {t.block_k} must divide groups of {group}")
    native = a.dtype == jnp.int8 or gpu(device).arch >= 89
    rows = lambda scale, count: jnp.broadcast_to(scale.astype(jnp.float32), (count, -(-k // group) if group else 1))
    codes = (a, b) if native else tuple(lax.bitcast_convert_type(c, jnp.uint8) for c in (a, b))
    names = tuple(_FLOATS.get(c.dtype.name, "") for c in (a, b))
    kernel = partial(_kernel, t=t, group=group, elements=None if native else names)
    dtype = jnp.dtype("float32") if t.split_k > 1 else out_dtype
    with compat.lowering_for(gpu(device).kind):
        out = pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((t.split_k, m, n), dtype),
            grid=(pl.cdiv(m, t.block_m) * pl.cdiv(n, t.block_n), t.split_k),
            compiler_params=compat.CompilerParams(num_warps=t.warps, num_stages=t.stages),
            interpret=interpret,
            name=f"low_precision_matmul_{a.dtype.name}",
        )(*codes, rows(a_scale, m), rows(b_scale, n))
    return (jnp.sum(out, axis=0) if t.split_k > 1 else out[0]).astype(out_dtype)


def _kernel(
    a_ref: Any, b_ref: Any, a_scale: Any, b_scale: Any, out_ref: Any, *, t: Tiling, group: int, elements: Any
) -> None:
    (m, k), n = a_ref.shape, b_ref.shape[0]
    row, col = program(m, n, t.block_m, t.block_n)
    rows_m, rows_n = pl.ds(row * t.block_m, t.block_m), pl.ds(col * t.block_n, t.block_n)
    steps = pl.cdiv(k, t.block_k)
    part = pl.cdiv(steps, t.split_k)
    first = pl.program_id(1) * part
    count = part if steps == part * t.split_k else jnp.minimum(part, steps - first)

    def scales(block: Any) -> jax.Array:
        """`[block_n, block_m]`"""
        read = lambda ref, where, size: load(ref, (where, block), indices(where) < size)
        return read(b_scale, rows_n, n)[:, None] * read(a_scale, rows_m, m)[None, :]

    def step(i: Any, acc: jax.Array) -> jax.Array:
        columns = pl.ds((first + i) * t.block_k, t.block_k)
        a = load(a_ref, (rows_m, columns), mask((rows_m, m), (columns, k)))
        b = load(b_ref, (rows_n, columns), mask((rows_n, n), (columns, k)))
        if elements is not None:
            a, b = (
                upcast.small_floats(c.astype(jnp.uint16), ELEMENTS[e], jnp.dtype("float16"))
                for c, e in zip((a, b), elements)
            )
        elif b.dtype == jnp.uint8:
            b = lax.bitcast_convert_type(b ^ 128, jnp.int8)
        sums = compat.dot(b, a.T)
        return acc + (sums.astype(jnp.float32) * scales((first + i) * t.block_k // group) if group else sums)

    dtype = jnp.int32 if a_ref.dtype == jnp.int8 and not group else jnp.float32
    acc = lax.fori_loop(0, count, step, jnp.zeros((t.block_n, t.block_m), dtype)).astype(jnp.float32)
    if not group:
        acc = acc * scales(pl.program_id(1) * 0)
    if elements is not None:
        a_unit, b_unit = (upcast.small_float_unit(ELEMENTS[e]) for e in elements)
        acc = acc * (1 / (a_unit * b_unit))
    where = (pl.program_id(1), rows_m, rows_n)
    plt.store(out_ref.at[where], acc.T.astype(out_ref.dtype), mask=mask((rows_m, m), (rows_n, n)))
