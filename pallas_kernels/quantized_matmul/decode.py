"""The weight written out in the dtype of the activations, for the product of many rows by XLA.

`xla.quantized_matmul` leaves the writing to XLA too: 81 us for 8192 x 8192 int4 on an H100, by this kernel 60
(benchmarks/results/kernels-h100.md).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import compat
from pallas_kernels.blocks import load, mask
from pallas_kernels.gpus import gpu
from pallas_kernels.quantized_matmul.tilings import Tiling
from pallas_kernels.quantized_matmul.triton import Scaler, Weight, as_read, elements, small_groups, weight_of, why_not

TILING = Tiling(0, 32, 256, 1, 8, 1)  # eighteen that were tried on an H100 differ by little


def quantized_matmul(
    x: jax.Array,
    planes: tuple[jax.Array, ...],
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    element: str,
    group_size: int | None = None,
    out_dtype: Any = None,
    device: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`triton.quantized_matmul` of many rows of 16-bit activations: `decode`, and XLA's product with float32 sums."""
    how: dict[str, Any] = dict(
        element=element, group_size=group_size, k=x.shape[-1], dtype=x.dtype, device=device, interpret=interpret
    )
    w = decode(planes, scale, zero_point, **how)
    batch = tuple(range(w.ndim - 2))
    numbers = (((x.ndim - 1,), (w.ndim - 1,)), (batch, batch))
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    # The sums are float32 in any case; as a result of their own they would be written and read once more.
    sums = out_dtype if out_dtype == x.dtype else jnp.float32
    return lax.dot_general(x, w, numbers, preferred_element_type=sums).astype(out_dtype)


def decode(
    planes: tuple[jax.Array, ...],
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    element: str,
    group_size: int | None,
    k: int,
    dtype: Any,
    device: str | None = None,
    tiling: Tiling = TILING,
    interpret: bool = False,
) -> jax.Array:
    """`reference.dequantize` in `dtype`, rounded as the product's kernel rounds elements: `[..., N, K]`.

    Args:
      planes, scale, zero_point, element, group_size: as for `quantized_matmul`; the same axes in front of all.
      k: elements of a row.
      dtype: bfloat16 or float16.
      device, interpret: as for `quantized_matmul`.
      tiling: of it, `block_n`, `block_k`, `warps` and `stages` count.

    Raises:
      ValueError: there is no kernel for it (`triton.why_not`), or the dtype has 32 bits.
    """
    n = planes[0].shape[-2]
    reason = why_not(element, group_size, k, n, dtype)
    if reason is None and jnp.dtype(dtype).itemsize != 2:
        reason = f"{jnp.dtype(dtype).name} is not of 16 bits"
    if reason is not None:
        raise ValueError(f"decode: no Triton kernel for {element}: {reason}")
    weight = weight_of(element, group_size, k, tiling.block_k, dtype)
    words, scales = as_read(planes, scale, zero_point, weight)
    group, size = weight.group, tiling.block_k
    if group and not small_groups(weight):
        size = min(size, group & -group)
    kernel = partial(
        _kernel,
        weight=weight,
        t=tiling,
        size=size,
        scale_dtype=scale.dtype.name,
        planes=len(words),
        packed=not interpret,
    )
    call = lambda words, scales: pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((n, k), dtype),
        grid=(pl.cdiv(k, size), pl.cdiv(n, tiling.block_n)),
        compiler_params=compat.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name=f"decode_{weight.name}",
    )(*words, *scales)
    for _ in planes[0].shape[:-2]:
        call = jax.vmap(call)
    with compat.lowering_for(gpu(compat.device_of(device)).kind):
        return call(words, scales)


def _kernel(*refs: Any, weight: Weight, t: Tiling, size: int, scale_dtype: str, planes: int, packed: bool) -> None:
    *ins, out_ref = refs
    word_refs, scale_ref, zero_ref = ins[:planes], ins[planes], (ins[planes + 1] if len(ins) > planes + 1 else None)
    (n, k), dtype = out_ref.shape, out_ref.dtype
    at, row = pl.program_id(0), pl.program_id(1)
    rows, width = pl.ds(row * t.block_n, t.block_n), size // weight.lanes
    columns = pl.ds(at * width, width)
    inside = mask((rows, n), (columns, word_refs[0].shape[1]))
    words = tuple(load(r, (rows, columns), inside) for r in word_refs)
    scaler = Scaler(scale_ref, zero_ref, weight, size, scale_dtype, rows, n)
    scale, zero = scaler.numbers(scaler.read(at), dtype)
    factor = scaler.last() if scale is None else scale * scaler.last()
    out = [_scaled(w, factor, dtype) for w in elements(words, zero, weight, dtype, False, packed)]
    where = (rows, pl.ds(at * size, size))
    plt.store(out_ref.at[where], _interleaved(out).reshape(t.block_n, size), mask=mask((rows, n), (where[1], k)))


def _scaled(w: jax.Array, factor: Any, dtype: Any) -> jax.Array:
    return (w.astype(jnp.float32) * factor.astype(jnp.float32)).astype(dtype)


def _interleaved(lanes: list[jax.Array]) -> jax.Array:
    """`[n, width]` of each lane as `[n, width, ...]`, whose last axes are the lanes, in order."""
    if len(lanes) == 1:
        return lanes[0]
    return lax.concatenate(
        [_interleaved(lanes[half::2])[..., None] for half in range(2)], lanes[0].ndim + len(lanes).bit_length() - 2
    )
