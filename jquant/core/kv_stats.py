"""`KVStats`: what calibration saw of an attention's keys and values. A pytree; adding two is merging two batches."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVStats:
    """The smallest and largest numbers of each channel, over the tokens that calibration saw. All float32.

    `layers` are the scans over stacked parameters around the attention, outermost first; mostly there are none.

    Attributes:
      key_min, key_max: `[*layers, kv_heads, head_dim]`. One head where it can't be told which axis holds the heads.
      value_min, value_max: likewise.
      tokens: `[*layers]`, the number of tokens, of all sequences and, in a loop, of all iterations. 0 where the
        attention never ran; then the rest means nothing.
      format: the `kv_cache.CacheFormat` that was given: what these are the numbers of has no sinks and is turned as it
        turns them. None: all tokens, as they are.
    """

    key_min: jax.Array
    key_max: jax.Array
    value_min: jax.Array
    value_max: jax.Array
    tokens: jax.Array
    format: Any = dataclasses.field(default=None, metadata=dict(static=True))

    def merge(self, other: "KVStats") -> "KVStats":
        """Of both sets of tokens."""

        def pick(combine: Callable[[Any, Any], Any], a: jax.Array, b: jax.Array) -> jax.Array:
            none, more = (t.tokens[..., None, None] == 0 for t in (self, other))
            return jnp.where(none, b, jnp.where(more, a, combine(a, b)))

        return KVStats(
            pick(jnp.minimum, self.key_min, other.key_min), pick(jnp.maximum, self.key_max, other.key_max),
            pick(jnp.minimum, self.value_min, other.value_min), pick(jnp.maximum, self.value_max, other.value_max),
            self.tokens + other.tokens, self.format,
        )  # fmt: skip
