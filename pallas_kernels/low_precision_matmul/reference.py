"""The definition of right: plain jnp, one line for each step of the formula.

out[m, n] = sum_g a_scale[m, g] b_scale[n, g] sum_(k in g) a[m, k] b[n, k]
"""

import jax
import jax.numpy as jnp


def low_precision_matmul(
    a: jax.Array,
    b: jax.Array,
    a_scale: jax.Array,
    b_scale: jax.Array,
    *,
    group_size: int | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """`a` `[M, K]` times `b` `[N, K]` transposed, both int8 or both float8: `[M, N]`, calculated in float32.

    Args:
      a, b: the codes. A uint8 `b` stands for the int8 that are 128 less: who keeps codes so needs no copy.
      a_scale, b_scale: `[M (or 1), blocks]` and `[N (or 1), blocks]`, blocks = 1 or ceil(K / group_size) each.
      group_size: elements along K that share a scale; None where all of a row do.
      out_dtype: of the result.
    """
    k = a.shape[-1]
    block = jnp.arange(k) // (group_size or max(k, 1))

    def decoded(codes: jax.Array, scale: jax.Array) -> jax.Array:
        scale = scale.astype(jnp.float32)
        return codes.astype(jnp.float32) * (scale if scale.shape[-1] == 1 else scale[..., block])

    if b.dtype == jnp.uint8:
        b = b.astype(jnp.int32) - 128
    return jnp.matmul(decoded(a, a_scale), decoded(b, b_scale).T, precision="highest").astype(out_dtype)
