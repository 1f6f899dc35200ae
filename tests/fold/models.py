"""Models for folds: every way that a norm, an attention or an expert may be written. No dtype is named, so they run in
float64 as they are. What can be folded is written down by hand.

Widths: D stream, F inner, H heads of width K, G key/value heads, V words, L positions, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

D, F, H, G, K, V, L, E = 12, 20, 4, 2, 6, 11, 9, 3


class FoldModel(NamedTuple):
    """One model.

    Attributes:
      scales: for every group of weights whose inputs can be scaled together: its paths.
      blocks: sizes of the blocks that can be rotated, once gains are folded; the largest first.
      without: weights whose input nothing can scale.
      per_use: leaves that a rotation makes a PerUse of.
    """

    name: str
    apply: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    scales: tuple[frozenset[str], ...]
    blocks: tuple[int, ...]
    without: frozenset[str] = frozenset()
    per_use: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.name


def fill(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Normal weights; gains around one (around zero if written 1 + w), small biases. float32 numbers."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in shapes.items():
        x = rng.normal(size=shape)
        if name.endswith(("gain", "scale")):
            x = 1 + 0.3 * x
        elif name.endswith(("offset", "bias")):
            x = 0.3 * x
        else:
            x = x / np.sqrt(shape[-2]) if len(shape) > 1 else x
        out[name] = x.astype(np.float32)
    return out


def rms(x: Any, gain: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * gain


def layer_norm(x: Any, gain: Any, bias: Any) -> Any:
    x = x - jnp.mean(x, -1, keepdims=True)
    return x / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * gain + bias


def attention(q: Any, k: Any, v: Any) -> Any:
    """[B, T, heads, K] each, key heads repeated for the query heads."""
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1]).astype(q.dtype)
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    out = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(mask, scores, -1e9)), v)
    return out.reshape(*out.shape[:2], -1)


def heads(y: Any, n: int) -> Any:
    return y.reshape(*y.shape[:-1], n, K)


# --- a block with fused weights, sliced before (gate and up) and after (q, k, v) the product; gains 1 + w ---

FUSED = {
    "norm1_offset": (D,), "qkv": (D, (H + 2 * G) * K), "o": (H * K, D), "norm2_offset": (D,),
    "gate_up": (D, 2 * F), "down": (F, D),
}  # fmt: skip


def fused_block(p: Any, x: Any) -> Any:
    y = rms(x, 1 + p["norm1_offset"])
    q, k, v = jnp.split(y @ p["qkv"], [H * K, (H + G) * K], axis=-1)
    x = x + attention(heads(q, H), heads(k, G), heads(v, G)) @ p["o"]
    y = rms(x, 1 + p["norm2_offset"])
    gate, up = p["gate_up"][:, :F], p["gate_up"][:, F:]
    return x + (jax.nn.silu(y @ gate) * (y @ up)) @ p["down"]


def fused(p: Any, tokens: Any) -> Any:
    x = fused_block(p, p["embed"][tokens])
    return rms(x, p["last_gain"]) @ p["head"]


def scanned(p: Any, tokens: Any) -> Any:
    x = p["embed"][tokens]
    x, _ = jax.lax.scan(lambda x, layer: (jax.checkpoint(fused_block)(layer, x), None), x, p["layers"])
    return rms(x, p["last_gain"]) @ p["embed"].T


def _fused_groups(prefix: str = "") -> tuple[frozenset[str], ...]:
    return tuple(frozenset({prefix + n}) for n in ("qkv", "o", "gate_up", "down"))


# --- GPT-2 in nnx: LayerNorm, biases, fused qkv, GELU, learned positions, tied head ---


class Gpt2Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(D, rngs=rngs), nnx.LayerNorm(D, rngs=rngs)
        self.qkv, self.out = nnx.Linear(D, 3 * H * K, rngs=rngs), nnx.Linear(H * K, D, rngs=rngs)
        self.up, self.down = nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        q, k, v = jnp.split(self.qkv(self.norm1(x)), 3, axis=-1)
        x = x + self.out(attention(*(heads(a, H) for a in (q, k, v))))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Gpt2(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed, self.positions = nnx.Embed(V, D, rngs=rngs), nnx.Embed(L, D, rngs=rngs)
        self.blocks = nnx.List([Gpt2Block(rngs) for _ in range(2)])
        self.last = nnx.LayerNorm(D, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.last(x))


def _gpt2() -> FoldModel:
    graph, state = nnx.split(nnx.eval_shape(lambda: Gpt2(nnx.Rngs(0))))
    flat, treedef = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(k, simple=True, separator="/").removesuffix("/value") for k, _ in flat]
    numbers = fill(dict(zip([f"{i}{n}" for i, n in enumerate(names)], [v.shape for _, v in flat])))
    params = treedef.unflatten(list(numbers.values()))
    scales = [frozenset({f"blocks/{i}/{n}/kernel"}) for i in range(2) for n in ("qkv", "out", "up")]
    without = frozenset(f"blocks/{i}/down/kernel" for i in range(2))  # GELU knows the size of what comes in
    return FoldModel(
        "gpt2_nnx", lambda p, t: nnx.merge(graph, p)(t), params, (TOKENS,),
        (*scales, frozenset({"embed/embedding"})), (D, *[K] * H * 2), without, ("embed/embedding",),
    )  # fmt: skip


# --- experts, all computed and mixed by a router ---


def experts(p: Any, x: Any) -> Any:
    y = rms(x, p["gain"])
    scores = jax.nn.softmax(y @ p["router"])
    inner = jax.nn.relu(jnp.einsum("btd,edf->btef", y, p["gate"])) * jnp.einsum("btd,edf->btef", y, p["up"])
    mixed = jnp.einsum("bted,bte->btd", jnp.einsum("btef,efd->bted", inner, p["down"]), scores)
    return rms(x + mixed @ p["back"], p["last_gain"]) @ p["head"]


# --- a multi-layer perceptron ---


def mlp(p: Any, x: Any) -> Any:
    x = jax.nn.relu(x @ p["a"] + p["a_bias"])
    x = jax.nn.relu(x @ p["b"] + p["b_bias"])
    return x @ p["c"] + p["c_bias"]


# --- a norm that no trace can look into ---


def hidden_norm(p: Any, tokens: Any) -> Any:
    x = p["embed"][tokens]
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    normed = jax.pure_callback(lambda x, g: np.asarray(x / np.abs(x).max(-1, keepdims=True) * g), shape, x, p["gain"])
    up, gate = normed @ p["up"], normed @ p["gate"]
    return (jax.nn.sigmoid(gate) * up) @ p["down"]


TOKENS = np.random.default_rng(1).integers(0, V, (2, 7)).astype(np.int32)
X = np.random.default_rng(2).normal(size=(2, 5, D)).astype(np.float32)

_stack = {name: (2, *shape) for name, shape in FUSED.items()}
MODELS = [
    FoldModel(
        "fused", fused, fill({"embed": (V, D), **FUSED, "last_gain": (D,), "head": (D, V)}), (TOKENS,),
        (*_fused_groups(), frozenset({"head"})), (D, K, K),
    ),
    FoldModel(
        "scanned", scanned, {**fill({"embed": (V, D), "last_gain": (D,)}), "layers": fill(_stack, 1)}, (TOKENS,),
        (*_fused_groups("layers/") * 2, frozenset({"embed"})), (D, K, K, K, K), per_use=("embed",),
    ),
    _gpt2(),
    FoldModel(
        "experts", experts,
        fill({
            "gain": (D,), "router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D), "back": (D, D),
            "last_gain": (D,), "head": (D, V),
        }),
        (X,),
        (frozenset({"router", "gate", "up"}), *[frozenset({"down"})] * E, frozenset({"back"}), frozenset({"head"})),
        # the experts' mixture, between `down` and `back`; the stream comes in from outside
        (D,),
    ),
    FoldModel(
        "mlp", mlp, fill({"a": (D, F), "a_bias": (F,), "b": (F, F), "b_bias": (F,), "c": (F, V), "c_bias": (V,)}), (X,),
        (frozenset({"b"}), frozenset({"c"})), (), frozenset({"a"}),
    ),
    FoldModel(
        "hidden_norm", hidden_norm, fill({"embed": (V, D), "gain": (D,), "up": (D, F), "gate": (D, F), "down": (F, D)}),
        (TOKENS,), (frozenset({"down"}),), (), frozenset({"up", "gate"}),
    ),
]  # fmt: skip
BANK = {m.name: m for m in MODELS}
