"""One decoder in Flax for Llama (Touvron et al. 2023), Mistral, Qwen2 and Qwen3, and the pure function made of it.

Shapes in comments: B batch, L tokens, K key/value heads, D head_dim, T cached positions.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jquant import kv_cache
from jquant.models.attention import causal_attention
from jquant.models.config import Config, param_shapes
from jquant.models.rope import apply_rope, rope_table

Params = dict[str, Any]
Apply = Callable[..., Any]


class Context(NamedTuple):
    """What all layers of one window share, computed once.

    Attributes:
      cos, sin: rope tables, [L, D / 2], or [B, L, D / 2] with a cache.
      mask: without a cache, bool [L, L], True where a query sees a key.
      positions: with a cache, int32 [B, L], those of the tokens.
      counts: with a cache, int32 [B], how many of the tokens each row takes, or None for all.
    """

    cos: jax.Array
    sin: jax.Array
    mask: jax.Array | None
    positions: jax.Array | None
    counts: jax.Array | None


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32; keeps the dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale.astype(jnp.float32)).astype(x.dtype)


class Attention(nn.Module):
    config: Config
    window: int | None
    moments_behind: int | None = None  # sums of keys and queries behind so many tokens go to the collection "moments"

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, entry: Any) -> tuple[jax.Array, Any]:
        c = self.config
        heads = lambda y, n: y.reshape(*y.shape[:-1], n, c.head_dim)
        q = heads(nn.Dense(c.num_heads * c.head_dim, use_bias=c.qkv_bias, name="q")(x), c.num_heads)
        k = heads(nn.Dense(c.num_kv_heads * c.head_dim, use_bias=c.qkv_bias, name="k")(x), c.num_kv_heads)
        v = heads(nn.Dense(c.num_kv_heads * c.head_dim, use_bias=c.qkv_bias, name="v")(x), c.num_kv_heads)
        if c.qk_norm:
            q, k = RMSNorm(c.rms_norm_eps, name="q_norm")(q), RMSNorm(c.rms_norm_eps, name="k_norm")(k)
        q, k = apply_rope(q, context.cos, context.sin), apply_rope(k, context.cos, context.sin)
        if self.moments_behind is not None:
            self.sow("moments", "sums", _moments(q[:, self.moments_behind :], k[:, self.moments_behind :]))
        if entry is None:
            assert context.mask is not None
            out = causal_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), context.mask)
        else:
            entry = kv_cache.append(entry, k, v, context.counts)
            out = kv_cache.attend(q, entry, positions=context.positions, window=self.window)
            out = out.reshape(*x.shape[:-1], -1)
        return nn.Dense(c.hidden_size, use_bias=c.o_bias, name="o")(out), entry


def _moments(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over batch and tokens of k, k^2 and, as mean over the query heads of a key head, q^2: float32 [K, D]."""
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    groups = (q * q).reshape(*k.shape[:3], -1, k.shape[3])
    return k.sum((0, 1)), (k * k).sum((0, 1)), groups.mean(3).sum((0, 1))


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate = nn.Dense(c.intermediate_size, use_bias=c.mlp_bias, name="gate")(x)
        up = nn.Dense(c.intermediate_size, use_bias=c.mlp_bias, name="up")(x)
        return nn.Dense(c.hidden_size, use_bias=c.mlp_bias, name="down")(nn.silu(gate) * up)


class Layer(nn.Module):
    config: Config
    window: int | None
    moments_behind: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, entry: Any) -> tuple[jax.Array, Any]:
        c = self.config
        attention = Attention(c, self.window, self.moments_behind, name="attention")
        out, entry = attention(RMSNorm(c.rms_norm_eps, name="attention_norm")(x), context, entry)
        x = x + out
        return x + MLP(c, name="mlp")(RMSNorm(c.rms_norm_eps, name="mlp_norm")(x)), entry


class Layers(nn.Module):
    """The unrolled stack; a module of its own so that paths read `layers/3/...`."""

    config: Config
    moments_behind: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, contexts: dict[int | None, Context], entries: Any) -> tuple[jax.Array, Any]:
        c, new = self.config, {}
        layer = nn.jit(Layer)  # traced once for all that are alike; a new one each time: no trace outlives a call
        for i in range(c.num_layers):
            entry, window = None if entries is None else entries[str(i)], c.window(i)
            x, new[str(i)] = layer(c, window, self.moments_behind, name=str(i))(x, contexts[window], entry)
        return x, new


class Decoder(nn.Module):
    config: Config
    moments_behind: int | None = None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        cache: Any = None,
        logits_at: jax.Array | None = None,
        counts: jax.Array | None = None,
    ) -> Any:
        c = self.config
        embed = nn.Embed(c.vocab_size, c.hidden_size, name="embed")
        contexts = _contexts(c, tokens.shape[1], cache, counts)
        layers = Layers(c, self.moments_behind, name="layers")
        x, entries = layers(embed(tokens), contexts, None if cache is None else cache["layers"])
        if logits_at is not None:
            each = jnp.ndim(logits_at) == 2
            x = jnp.take_along_axis(x, (logits_at % x.shape[1])[..., None], axis=1) if each else x[:, logits_at]
        x = RMSNorm(c.rms_norm_eps, name="norm")(x)
        logits = embed.attend(x) if c.tied else nn.Dense(c.vocab_size, use_bias=False, name="lm_head")(x)
        logits = logits.astype(jnp.float32)
        if cache is None:
            return logits
        return logits, {"length": entries["0"].length, "layers": entries}


def _contexts(config: Config, length: int, cache: Any, counts: jax.Array | None) -> dict[int | None, Context]:
    """The context of each window."""
    windows = {config.window(i) for i in range(config.num_layers)}
    offsets = jnp.arange(length, dtype=jnp.int32)
    table = lambda at, end: rope_table(config.rope, config.head_dim, at, config.max_position_embeddings, end)
    if cache is None:
        tables = table(offsets, length)
        return {w: Context(*tables, _mask(offsets, w), None, None) for w in windows}
    positions = cache["length"][:, None] + offsets
    end = cache["length"] + (length if counts is None else counts)
    return dict.fromkeys(windows, Context(*table(positions, end), None, positions, counts))


def _mask(at: jax.Array, window: int | None) -> jax.Array:
    mask = at <= at[:, None]
    return mask if window is None else mask & (at > at[:, None] - window)


def build(config: Config) -> Apply:
    """The model as a pure function.

    `apply(params, tokens)`: int32 [batch, length] -> float32 logits [batch, length, vocab].
    `apply(params, tokens, cache=cache)` -> (logits, cache): the tokens continue those in the cache (`init_cache`, of
    any format). A row without room for them keeps what it has, gets NaN logits and the `overflow` of its layers;
    outside jit it is an error. `counts` (int32 [batch]): so many of a row's tokens count; the rest is padding.
    `logits_at` (int32 [n], or [batch, n] for each row its own; counted within `tokens`, negative from the end) computes
    the head at those positions only.
    The arithmetic follows the dtype of `params`; softmax, norms and rope are float32.
    """
    module = Decoder(config)

    def apply(
        params: Params,
        tokens: jax.Array,
        *,
        cache: Any = None,
        logits_at: jax.Array | None = None,
        counts: jax.Array | None = None,
    ) -> Any:
        return module.apply({"params": params}, tokens, cache=cache, logits_at=logits_at, counts=counts)

    return apply


def init(config: Config, key: jax.Array, dtype: Any = "float32") -> Params:
    """Random parameters: kernels and embedding normal with variance 1 / hidden or 1 / in, norms one, biases zero."""
    shapes = param_shapes(config)
    keys = jax.random.split(key, len(shapes))
    return nest({path: _init_leaf(path, shape, k, dtype) for (path, shape), k in zip(shapes.items(), keys)})


def _init_leaf(path: str, shape: tuple[int, ...], key: jax.Array, dtype: Any) -> jax.Array:
    if path.endswith("scale"):
        return jnp.ones(shape, dtype)
    if path.endswith("bias"):
        return jnp.zeros(shape, dtype)
    return _normal(key, shape, shape[-1] if path.endswith("embedding") else shape[0], dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # compiled for each shape, not for each parameter
def _normal(key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: Any) -> jax.Array:
    return (jax.random.normal(key, shape) * fan_in**-0.5).astype(dtype)


def nest(flat: dict[str, Any]) -> Params:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)[name] = leaf
    return tree
