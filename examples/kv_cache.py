"""A quantized key/value cache in a Flax model of your own: three lines of its attention.

`python examples/kv_cache.py --cache int4-g64-asym-rot` decodes a small random model, once with a float cache and once
with a quantized one, and says what both take and how far apart they are. `examples/kv_cache_nnx.py` is the same for
nnx, with quantized weights beside the cache.
"""

import argparse
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jquant import kv_cache

VOCAB, WIDTH, HEADS, KV_HEADS, LAYERS, LENGTH = 256, 256, 4, 2, 3, 512


class Attention(nn.Module):
    cache_format: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = WIDTH // HEADS
        heads = lambda name, count: nn.DenseGeneral((count, dim), use_bias=False, name=name)(x)
        q, k, v = heads("q", HEADS), heads("k", KV_HEADS), heads("v", KV_HEADS)
        # The variables were arrays, written by dynamic_update_slice and read whole by dot_product_attention. Now:
        cache = self.variable("cache", "kv", kv_cache.init, x.shape[0], LENGTH, KV_HEADS, dim, self.cache_format)
        cache.value = kv_cache.append(cache.value, k, v)
        out = kv_cache.attend(q, cache.value)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False, name="o")(out)


class Model(nn.Module):
    cache_format: str = "float32"

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(VOCAB, WIDTH, name="embed")
        x = embed(tokens)
        for i in range(LAYERS):
            x = x + Attention(self.cache_format, name=f"attention_{i}")(nn.RMSNorm(name=f"norm_{i}")(x))
        return embed.attend(nn.RMSNorm(name="norm")(x))


def start(model: Model, batch: int) -> tuple[Any, Any]:
    """Parameters and an empty cache: `init` runs the model, so the cache that it gives is not empty."""
    tokens = jnp.zeros((batch, 1), jnp.int32)
    params = model.init(jax.random.key(0), tokens)["params"]
    empty = lambda: {"kv": kv_cache.init(batch, LENGTH, KV_HEADS, WIDTH // HEADS, model.cache_format)}
    return params, {f"attention_{i}": empty() for i in range(LAYERS)}


def run(cache_format: str, tokens: jax.Array) -> tuple[jax.Array, int]:
    """Logits of the tokens, read one by one, and the bytes of the cache."""
    model = Model(cache_format)
    params, cache = start(model, tokens.shape[0])
    size = sum(a.nbytes for a in jax.tree.leaves(cache))

    def step(cache: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        logits, changed = model.apply({"params": params, "cache": cache}, token[:, None], mutable=["cache"])
        return changed["cache"], logits[:, 0]

    return jax.jit(lambda cache: jax.lax.scan(step, cache, tokens.T), donate_argnums=0)(cache)[1], size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="int8", metavar="FORMAT", help="of the quantized cache [%(default)s]")
    args = parser.parse_args()
    tokens = jax.random.randint(jax.random.key(1), (2, 128), 0, VOCAB)
    (exact, whole), (near, small) = run("float32", tokens), run(args.cache, tokens)
    a, b = jax.nn.log_softmax(exact), jax.nn.log_softmax(near)
    kl = float(jnp.mean(jnp.sum(jnp.exp(a) * (a - b), axis=-1)))
    print(f"float32: {whole:,} bytes; {args.cache}: {small:,} bytes ({small / whole:.3f}); KL {kl:.6f} nats per token")


if __name__ == "__main__":
    main()
