"""A quantized key/value cache in an nnx model of your own, and quantized weights beside it.

`python examples/kv_cache_nnx.py --cache int4-g64-asym-rot --weights int8` decodes a small random model, once with
floats and once with a quantized cache and weights, and says what they take and how far apart they are.
`examples/kv_cache.py` is the same for linen.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jquant as jq
from jquant import kv_cache

VOCAB, WIDTH, HEADS, KV_HEADS, LAYERS, LENGTH = 256, 256, 4, 2, 3, 512


class Attention(nnx.Module):
    def __init__(self, batch: int, cache_format: str, rngs: nnx.Rngs):
        dim = WIDTH // HEADS
        linear = lambda heads: nnx.LinearGeneral(WIDTH, (heads, dim), use_bias=False, rngs=rngs)
        self.q, self.k, self.v = linear(HEADS), linear(KV_HEADS), linear(KV_HEADS)
        self.o = nnx.LinearGeneral((HEADS, dim), WIDTH, axis=(-2, -1), use_bias=False, rngs=rngs)
        # Was: self.key = nnx.Cache(jnp.zeros((batch, LENGTH, KV_HEADS, dim))), the same for values, and their length.
        self.cache = nnx.Cache(kv_cache.init(batch, LENGTH, KV_HEADS, dim, cache_format))

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = self.q(x), self.k(x), self.v(x)
        # Was: dynamic_update_slice into both, and dot_product_attention over all of them with a mask.
        self.cache.set_value(kv_cache.append(self.cache.get_value(), k, v))
        return self.o(kv_cache.attend(q, self.cache.get_value()))


class Model(nnx.Module):
    def __init__(self, batch: int, cache_format: str, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.attention = nnx.List([Attention(batch, cache_format, rngs) for _ in range(LAYERS)])
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(LAYERS + 1)])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for attention, norm in zip(self.attention, self.norms):
            x = x + attention(norm(x))
        return self.embed.attend(self.norms[-1](x))


def run(cache_format: str, weights: str | None, tokens: jax.Array) -> tuple[jax.Array, int, int]:
    """Logits of the tokens, read one by one; the bytes of the parameters, and of the cache."""
    graph, params, cache = nnx.split(Model(tokens.shape[0], cache_format, nnx.Rngs(0)), nnx.Param, nnx.Cache)

    def apply(params: Any, token: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, cache)
        return model(token[:, None])[:, 0], nnx.state(model, nnx.Cache)

    if weights is not None:
        recipe = jq.Recipe({"embed/*": None, "*": jq.parse_policy(weights)})
        params = jq.quantize(apply, params, recipe, jq.rtn(), [(tokens[:, 0], cache)])
    step = jq.quantized(apply)
    scan = lambda params, cache: jax.lax.scan(lambda c, t: step(params, t, c)[::-1], cache, tokens.T)
    size = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree))
    sizes = size(params), size(cache)
    return jax.jit(scan, donate_argnums=1)(params, cache)[1], *sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="int8", metavar="FORMAT", help="of the quantized cache [%(default)s]")
    parser.add_argument("--weights", default="int8", metavar="FORMAT", help="of the quantized weights [%(default)s]")
    args = parser.parse_args()
    tokens = jax.random.randint(jax.random.key(1), (2, 128), 0, VOCAB)
    exact, near = run("float32", None, tokens), run(args.cache, args.weights, tokens)
    a, b = jax.nn.log_softmax(exact[0]), jax.nn.log_softmax(near[0])
    kl = float(jnp.mean(jnp.sum(jnp.exp(a) * (a - b), axis=-1)))
    print(f"floats: {exact[1]:,} bytes of parameters, {exact[2]:,} of the cache")
    print(f"weights {args.weights}, cache {args.cache}: {near[1]:,} and {near[2]:,} bytes; KL {kl:.6f} nats per token")


if __name__ == "__main__":
    main()
