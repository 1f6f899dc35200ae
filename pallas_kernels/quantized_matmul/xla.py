"""The product as XLA does it: the weight is dequantized in the dtype of the activations, written out, and multiplied.

What a kernel is compared with, and what runs where no kernel can. It is also the derivative of the kernels: with
respect to the activations that is a product with the weight itself, and for the many rows of training one pass of
dequantizing costs little beside it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.reference import dequantize


def quantized_matmul(
    x: jax.Array,
    planes: tuple[jax.Array, ...],
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    element: str,
    group_size: int | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """`[B, M, K]` or `[M, K]` times `[B, N, K]` or `[N, K]` transposed, with float32 sums; see `reference`."""
    w = dequantize(planes, scale, zero_point, element, group_size, x.shape[-1]).astype(x.dtype)
    precision = "highest" if x.dtype == jnp.float32 else None
    batch = tuple(range(w.ndim - 2))
    numbers = (((x.ndim - 1,), (w.ndim - 1,)), (batch, batch))
    out = jax.lax.dot_general(x, w, numbers, precision=precision, preferred_element_type=jnp.float32)
    return out.astype(out_dtype or x.dtype)
