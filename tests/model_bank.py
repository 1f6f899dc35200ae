"""Every kind of model that a trace must read: small, deterministic, with the sites that the mathematics says.

The sites are written by hand, never copied from what `find_sites` printed. Axes are the leaf's own, negative.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import jquant as jq
from jquant.core.formats import Format, compute_params
from jquant.core.paths import map_with_paths
from jquant.core.qtensor import QTensor, encode_array, to_rows

FORMATS = [
    Format("int8"),
    Format("int4", 5),  # 5 divides none of the sizes in the bank
    Format("int3", 3, symmetric=False, scale_dtype="bfloat16"),
    Format("nf4", 4),
    Format("int8", "tensor"),
]


# Compiling is most of these tests' time, and at these sizes nothing that runs needs the optimizer.
QUICK = {"xla_backend_optimization_level": 0}


class S(NamedTuple):
    """A site. Sites with the same `x` read the same array; reads by something unknown have none."""

    path: str
    kind: str
    contracted: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    x: str = ""


class Model(NamedTuple):
    """One model of the bank.

    Attributes:
      name: unique.
      apply: `apply(params, *args, **kwargs)`.
      params: pytree of numpy arrays, or of ShapeDtypeStructs to be filled.
      sites: all of them, in any order.
      fused: how many reads of quantized leaves run on the codes.
      differentiable: whether grad with respect to the inputs exists (reverse mode).
    """

    name: str
    apply: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    sites: tuple[S, ...]
    fused: int
    kwargs: dict[str, Any] = {}
    differentiable: bool = True

    def __repr__(self) -> str:
        return self.name

    def near(self, rtol: float = 2e-6) -> float:
        """`rtol`, or some roundings of bfloat16 where it calculates in that: our products on a CPU are more exact."""
        return 2**-7 if self.name in ("bf16", "mixed_dtypes") else rtol


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Normal numbers, the same on every machine."""
    rng = np.random.default_rng([seed, zlib.crc32(repr(shape).encode())])
    return rng.standard_normal(shape).astype(dtype)


def fill(shapes: Any, scale: float = 0.4) -> Any:
    """Arrays for the ShapeDtypeStructs of a tree, of which no two are equal."""
    flat, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten(
        [jnp.asarray(scale * normal(*s.shape, seed=i + 1)).astype(s.dtype) for i, s in enumerate(flat)]
    )


def params(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """A dict of float32 leaves."""
    return fill({k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()})


def contracted_axes(model: Model) -> dict[str, tuple[tuple[int, ...], int]]:
    """For each leaf that a matmul or lookup reads: the axes to quantize along, and how many stacked axes it has."""
    first: dict[str, S] = {}
    for site in sorted(model.sites, key=lambda s: s.kind != "dot"):
        if site.kind != "read":
            first.setdefault(site.path, site)
    return {path: (s.contracted, len(s.batch)) for path, s in first.items()}


def _rtn(w: jax.Array, fmt: Format, contracted: Sequence[int], stacked: int = 0) -> QTensor:
    return encode_array(w, compute_params(to_rows(w, contracted), fmt, stacked), fmt, contracted)


_jitted_rtn = jax.jit(_rtn, static_argnums=(1, 2, 3), compiler_options=QUICK)


def rtn(w: jax.Array, fmt: Format, contracted: Sequence[int], stacked: int = 0) -> QTensor:
    """Round to nearest, nothing else; `stacked` leading axes with scales of their own where a block is a tensor."""
    return _jitted_rtn(w, fmt, tuple(contracted), stacked)


@functools.cache
def _quantizer(name: str, fmt: Format) -> Callable[[Any], Any]:
    axes = contracted_axes(BANK[name])

    def leaf(path: str, w: Any) -> Any:
        if path not in axes:
            return w
        return _rtn(w, fmt, *axes[path])

    return jax.jit(lambda p: map_with_paths(leaf, p), compiler_options=QUICK)


@functools.cache
def quantize(name: str, fmt: Format) -> Any:
    """The model's parameters rounded to nearest, every leaf with a site along the axes of its first matmul."""
    return _quantizer(name, fmt)(BANK[name].params)


def jitted(fn: Callable[..., Any], model: Model) -> Callable[..., Any]:
    """`fn(params, *args)` under jit with the model's keyword arguments; strings among its arguments are static."""
    static = [i + 1 for i, a in enumerate(model.args) if isinstance(a, str)]
    run = lambda p, *args: fn(p, *args, **model.kwargs)
    return jax.jit(run, static_argnums=static, compiler_options=QUICK)


@functools.cache
def plain(name: str) -> Callable[..., Any]:
    """The float model under jit."""
    return jitted(BANK[name].apply, BANK[name])


@functools.cache
def quantized(name: str) -> Callable[..., Any]:
    """The quantized model under jit."""
    return jitted(jq.quantized(BANK[name].apply), BANK[name])


quick = functools.partial(jax.jit, compiler_options=QUICK)
dequantize = quick(jq.dequantize)


def assert_same(got, want, rtol=2e-6) -> None:
    """The same tree, shapes and dtypes, and values within `rtol` of the largest; of bfloat16, within two roundings.

    (On a CPU products of bfloat16 with a QTensor are calculated in float32, more exactly than XLA's own.)
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
        if jax.dtypes.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        near = max(rtol, 2**-7) if jnp.result_type(a) == jnp.bfloat16 else rtol
        wide = np.complex128 if jnp.issubdtype(jnp.result_type(a), jnp.complexfloating) else np.float64
        a, b = np.asarray(a, wide), np.asarray(b, wide)
        np.testing.assert_allclose(a, b, rtol=0, atol=near * max(1.0, np.max(np.abs(b), initial=0.0)))


def _attention_sites() -> list[S]:
    inputs = [S(f"{n}/kernel", "dot", (-3,), (), "x") for n in ("query", "key", "value")]
    biases = [S(f"{n}/bias", "read") for n in ("query", "key", "value", "out")]
    return [*inputs, S("out/kernel", "dot", (-3, -2), (), "a"), *biases]


def _linen(name: str, module: nn.Module, x: Any, sites: Sequence[S], fused: int, **more: Any) -> Model:
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    sites = tuple(s._replace(path=f"params/{s.path}") for s in sites)
    return Model(name, module.apply, fill(shapes), (x,), sites, fused, **more)


def _nnx(
    name: str, make: Callable[[nnx.Rngs], Any], x: Any, sites: Sequence[S], fused: int, call: Any = None, **more: Any
) -> Model:
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    call = call or (lambda module, x: module(x))
    return Model(name, lambda p, x: call(nnx.merge(graph, p), x), fill(state), (x,), tuple(sites), fused, **more)


X = normal(2, 3, 8)
TOKENS = np.array([[1, 5, 0], [10, 3, 3]], np.int32)


# --- linen ---


class LinenTied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        return embed.attend(jnp.tanh(embed(tokens)))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8)(nn.tanh(nn.Dense(16)(x))), None


class LinenScan(nn.Module):
    axis: int
    block: Any = LinenBlock

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(self.block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


class LinenRemat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Dense)(4)(nn.tanh(nn.remat(nn.Dense)(16)(x)))


class LinenDropout(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(16)(x))


def _linen_models() -> list[Model]:
    dense = [S("kernel", "dot", (-2,), (), "x"), S("bias", "read")]
    attention = _attention_sites()

    def stack(axis: int, batch: int, contracted: int) -> list[S]:
        del axis
        return [
            S("layers/Dense_0/kernel", "dot", (contracted,), (batch,), "x"),
            S("layers/Dense_1/kernel", "dot", (contracted,), (batch,), "h"),
            S("layers/Dense_0/bias", "read", (), (-2 if batch == -3 else -1,)),
            S("layers/Dense_1/bias", "read", (), (-2 if batch == -3 else -1,)),
        ]

    tokens = normal(2, 5, 8)
    image = normal(2, 6, 6, 4)
    return [
        _linen("linen_dense", nn.Dense(16), X, dense, 1),
        _linen("linen_dense_bf16", nn.Dense(16, dtype=jnp.bfloat16), X, dense, 1),
        _linen(
            "linen_dense_general", nn.DenseGeneral((2, 5), axis=(-2, -1)), normal(2, 4, 6),
            [S("kernel", "dot", (-4, -3), (), "x"), S("bias", "read")], 1,
        ),
        _linen(
            "linen_dense_general_batch", nn.DenseGeneral(6, axis=-1, batch_dims=(0,)), normal(3, 5, 4),
            [S("kernel", "dot", (-2,), (-3,), "x"), S("bias", "read")], 1,
        ),
        _linen(
            "linen_einsum", nn.Einsum((8, 2, 5), "btd,dhk->bthk", use_bias=False), X,
            [S("kernel", "dot", (-3,), (), "x")], 1,
        ),
        _linen(
            "linen_tied", LinenTied(), TOKENS,
            [S("Embed_0/embedding", "lookup", (-1,), (), "t"), S("Embed_0/embedding", "dot", (-1,), (), "x")], 2,
        ),
        _linen(
            "linen_conv1d", nn.Conv(16, (3,)), tokens,
            [S("kernel", "conv", (-3, -2), (), "x"), S("bias", "read")], 0,
        ),
        _linen(
            "linen_conv2d_strided", nn.Conv(6, (3, 3), strides=2, padding="VALID"), image,
            [S("kernel", "conv", (-4, -3, -2), (), "x"), S("bias", "read")], 0,
        ),
        _linen(
            "linen_conv_grouped", nn.Conv(8, (3,), feature_group_count=4, use_bias=False), tokens,
            [S("kernel", "conv", (-3, -2), (), "x")], 0,
        ),
        _linen("linen_attention", nn.MultiHeadDotProductAttention(2), X, attention, 4),
        _linen("linen_scan", LinenScan(0), X, stack(0, -3, -2), 2),
        _linen("linen_scan_axis1", LinenScan(1), X, stack(1, -2, -3), 2),
        _linen("linen_remat", LinenRemat(), X, [
            S("CheckpointDense_0/kernel", "dot", (-2,), (), "x"), S("CheckpointDense_1/kernel", "dot", (-2,), (), "h"),
            S("CheckpointDense_0/bias", "read"), S("CheckpointDense_1/bias", "read"),
        ], 2),
        _linen("linen_scan_remat", LinenScan(0, nn.remat(LinenBlock, prevent_cse=False)), X, stack(0, -3, -2), 2),
    ]  # fmt: skip


def _dropout_model() -> Model:
    module = LinenDropout()
    shapes = jax.eval_shape(lambda k, x: module.init(k, x, False), jax.random.key(0), X)
    sites = (S("params/Dense_0/kernel", "dot", (-2,), (), "x"), S("params/Dense_0/bias", "read"))
    apply = lambda p, x, key, train=False: module.apply(p, x, train, rngs={"dropout": key})
    return Model("linen_dropout", apply, fill(shapes), (X, jax.random.key(7)), sites, 1, kwargs={"train": True})


# --- nnx ---


class NnxTied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(jnp.tanh(self.embed(tokens)))


class NnxLora(nnx.Module):
    def __init__(self, rngs):
        self.base = nnx.Linear(8, 6, rngs=rngs)
        self.lora = nnx.LoRA(8, 4, 6, base_module=self.base, rngs=rngs)

    def __call__(self, x):
        return self.lora(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class NnxLayers(nnx.Module):
    def __init__(self, rngs):
        make = nnx.vmap(NnxBlock, in_axes=0, out_axes=0)
        self.layers = make(rngs.split(3))


def _nnx_scan(module: NnxLayers, x: Any) -> Any:
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return layer(x)

    return forward(x, module.layers)


def _nnx_vmap(module: NnxLayers, x: Any) -> Any:
    return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, 0), out_axes=0)(module.layers, x)


def _nnx_models() -> list[Model]:
    attention = _attention_sites()
    make_attention = lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
    layers = [S("layers/up/kernel", "dot", (-2,), (-3,), "x"), S("layers/down/kernel", "dot", (-2,), (-3,), "h")]
    return [
        _nnx(
            "nnx_linear", lambda r: nnx.Linear(8, 16, rngs=r), X,
            [S("kernel", "dot", (-2,), (), "x"), S("bias", "read")], 1,
        ),
        _nnx(
            "nnx_einsum", lambda r: nnx.Einsum("btd,hdk->bthk", (2, 8, 4), (2, 4), rngs=r), X,
            [S("kernel", "dot", (-2,), (), "x"), S("bias", "read")], 1,
        ),
        _nnx(
            "nnx_tied", NnxTied, TOKENS,
            [S("embed/embedding", "lookup", (-1,), (), "t"), S("embed/embedding", "dot", (-1,), (), "x")], 2,
        ),
        _nnx("nnx_lora", NnxLora, X, [
            S("base/kernel", "dot", (-2,), (), "x"), S("base/bias", "read"),
            S("lora/lora_a", "dot", (-2,), (), "x"), S("lora/lora_b", "dot", (-2,), (), "a"),
        ], 3),
        _nnx("nnx_attention", make_attention, X, attention, 4),
        _nnx("nnx_scan", NnxLayers, X, [*layers, S("layers/up/bias", "read", (), (-2,))], 2, call=_nnx_scan),
        _nnx("nnx_vmap", NnxLayers, normal(3, 2, 8), [*layers, S("layers/up/bias", "read")], 2, call=_nnx_vmap),
    ]  # fmt: skip


# --- plain functions ---


@jax.jit
def helper(w, x):
    """A jitted helper at module level, whose trace is cached between models."""
    return jnp.tanh(x @ w)


@jax.custom_jvp
def crooked(x, w):
    """Its derivative rule says three times the truth, so that a lost rule shows."""
    return jnp.sin(x @ w)


@crooked.defjvp
def _crooked_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return crooked(x, w), 3 * jnp.cos(x @ w) * (dx @ w + x @ dw)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def clipped(x, w, factor):
    """Its derivative rule is no derivative at all."""
    return factor * (x @ w)


clipped.defvjp(
    lambda x, w, factor: (clipped(x, w, factor), (x, w)),
    lambda factor, res, ct: (jnp.sign(ct @ res[1].T) * factor + res[0], jnp.ones_like(res[1]) * 0.25),
)


@jax.custom_jvp
def leaky(x):
    """A custom rule that reads no parameter."""
    return jnp.where(x > 0, x, 0.1 * x)


leaky.defjvp(lambda p, t: (leaky(*p), 7 * t[0]))


def _scan(p, x):
    def body(c, w):
        return jnp.tanh(c @ w), c.sum()

    return jax.lax.scan(body, x, p["w"])


def _scan_reverse(p, x):
    return jax.lax.scan(lambda c, w: (jnp.sin(c @ w + 1), c[..., 0]), x, p["w"], reverse=True, unroll=2)


def _rnn(p, xs):
    def body(h, x):
        h = jnp.tanh(x @ p["wx"] + h @ p["wh"])
        return h, h @ p["wo"]

    return jax.lax.scan(body, jnp.zeros((2, 8)), xs)


def _nested_scan(p, x):
    inner = lambda c, w: (jnp.tanh(c @ w), None)
    outer = lambda c, ws: (jax.lax.scan(inner, c, ws)[0], None)
    return jax.lax.scan(outer, x, p["w"])[0]


def _while(p, x):
    limit = jnp.float32(30)

    def test(state):
        return (state[0] < 4) & (jnp.abs(state[1] @ p["v"]).sum() < limit)

    return jax.lax.while_loop(test, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x))[1]


def _fori(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"][i]), x)


def _cond_one(p, x):
    return jax.lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: 2 * x, x)


def _cond_both(p, x):
    return jax.lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: jnp.sin(x) @ p["w"].T, x)


def _switch(p, x, i):
    branches = [lambda x: x @ p["w"][0], lambda x: x @ p["w"][1], lambda x: x]
    return jax.lax.switch(i, branches, x)


def _checkpoint(p, x):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    f = jax.checkpoint(lambda p, x: jnp.sin(jnp.sin(x @ p["w"]) @ p["v"]), policy=policy)
    names = jax.checkpoint_policies.save_only_these_names("h")
    g = jax.checkpoint(
        lambda w, x: checkpoint_name(jnp.cos(x @ w), "h") @ w.T, policy=names, prevent_cse=False
    )
    return g(p["u"], f(p, x))


def _qkv(p, x):
    q, k, v = jnp.split(x @ p["qkv"], [8, 12], axis=-1)
    return q * jnp.concatenate([k, v], -1)


def _gqa(p, x):
    # 4 query heads, 1 key head, 1 value head in one leaf, taken apart before the products.
    q, k, v = jnp.split(p["qkv"], [4, 5], axis=1)
    q = jnp.einsum("btd,dhk->bthk", x, q)
    k, v = x @ k[:, 0], x @ v[:, 0]
    return jnp.einsum("bthk,bsk,bsj->bthj", q, k, v)


def _sliced_input(p, x):
    # The two halves of the contracted axis meet different inputs.
    return jnp.sin(x[..., :4]) @ p["w"][:4] + jnp.cos(x[..., 4:]) @ p["w"][4:]


def _reshape_chain(p, x):
    w = p["w"].reshape(4, 2, 3, 5).transpose(2, 0, 1, 3).reshape(3, 8, 5)  # from [8, 15]
    return jnp.einsum("btd,hdk->bthk", x, w).reshape(*x.shape[:-1], 15)


def _interleaved(p, x):
    # The contracted axes of the leaf in another order than the leaf's own.
    return jnp.einsum("bts,tsdk->bdk", x.reshape(2, 3, 8)[:, :, :4], p["w"].transpose(3, 1, 0, 2))


def _two_axes(p, x):
    h = x @ p["w"]
    return h @ p["w"].T + h @ p["v"]


def _mixed_dtypes(p, x):
    h = jax.lax.dot_general(
        x.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16), (((2,), (0,)), ((), ())),
        preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    return jnp.matmul(h, p["v"], precision="highest")


def _moe(p, x):
    scores = jax.nn.softmax(x @ p["router"])
    h = jnp.einsum("btd,edf->ebtf", x, p["up"])
    y = jnp.einsum("ebtf,efd->ebtd", jnp.tanh(h), p["down"])
    return jnp.einsum("ebtd,bte->btd", y, scores)


def _batched_experts(p, x):
    # Batch and free axes in odd orders: the leaf is [free, experts, in, free].
    return jnp.einsum("etd,aedc->tcea", x, p["w"])


def _gain(p, x):
    return (x * (1 + p["gain"])) @ p["w"] + p["bias"]


def _outputs(p, x):
    return {"y": x @ p["w"], "w": p["w"], "pair": (p["n"] + 1, x.sum())}


def _scalars(p, x):
    table = jnp.asarray([1.0, 2.0, 3.0])
    return (x @ p["w"]) * p["temperature"] + table[p["index"]]


def _static(p, x, mode, *, flag=False, power=2):
    y = x @ p["w"] if mode == "right" else x @ p["w"].T
    return y**power if flag else y


def _key(p, x, key):
    keep = jax.random.bernoulli(key, 0.5, x.shape)
    return jnp.where(keep, x, 0) @ p["w"]


def _shard_map(p, x):
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    f = jax.shard_map(lambda w, x: jnp.tanh(x @ w), mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec("d"))
    return f(p["w"], x) @ p["v"]


def _both(p, tokens):
    h = p["embed"][tokens] + p["position"][None, : tokens.shape[1]]
    return (h @ p["embed"].T, jnp.take(p["columns"], tokens, axis=1, mode="clip"))


def _gram(p, x):
    # Both operands of one product are views of one leaf.
    return x @ (p["w"] @ p["w"].T)


def _ragged(p, x, sizes):
    return jax.lax.ragged_dot(jnp.tanh(x), p["w"], sizes) @ p["v"]


def _lookup_layers(p, tokens):
    # A table for each layer, the layer's number traced.
    return jax.lax.fori_loop(0, 2, lambda i, c: c + p["tables"][i][tokens], jnp.zeros((2, 3, 8)))


def _stack_of_one(p, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]


def _vmapped(p, x):
    return jax.vmap(lambda w, x: x @ w, in_axes=(1, 0), out_axes=1)(p["w"], x)


def _literal_outputs(p, x):
    y = jax.lax.cond(x.sum() > 0, lambda: (x @ p["w"], 1.0), lambda: (x, 0.0))
    z, ys = jax.lax.scan(lambda c, w: (c @ w, 2.0), x.astype(jnp.bfloat16), p["v"].astype(jnp.bfloat16))
    return y, z, ys, 3.0


def _dot(path: str, contracted: int = -2, x: str = "x") -> S:
    return S(path, "dot", (contracted,), (), x)


def _plain_models() -> list[Model]:
    def m(name: str, fn: Any, p: Any, sites: Sequence[S], fused: int, args: Any = (X,), **more: Any) -> Model:
        return Model(name, fn, p, args, tuple(sites), fused, **more)

    w88 = params(w=(8, 8))
    stacked = S("w", "dot", (-2,), (-3,), "c")
    sizes = np.array([3, 0, 4], np.int32)
    with_index = {**params(w=(8, 8)), "temperature": 0.5, "index": jnp.int32(1)}
    return [
        m("matmul", lambda p, x: x @ p["w"], params(w=(8, 6)), [_dot("w")], 1),
        m("vector", lambda p, x: x[0, 0] @ p["w"], params(w=(8, 6)), [_dot("w")], 1),
        m("transposed", lambda p, x: x @ p["w"].T, params(w=(6, 8)), [_dot("w", -1)], 1),
        m("left", lambda p, x: p["w"] @ x[0].T, params(w=(6, 8)), [_dot("w", -1)], 1),
        m("left_batched", lambda p, x: jnp.matmul(p["w"].swapaxes(1, 2), x), params(w=(2, 3, 6)),
          [S("w", "dot", (-2,), (-3,), "x")], 1),
        m("einsum3", lambda p, x: jnp.einsum("bti,ij,jk->btk", x, p["a"], p["b"]), params(a=(8, 6), b=(6, 5)),
          [_dot("a"), _dot("b", x="h")], 2),
        m("einsum_odd", lambda p, x: jnp.einsum("ab,bcd,cd->a", x[0], p["e"], x[1, :2, :4]), params(e=(8, 2, 4)),
          [S("e", "dot", (-2, -1), (), "x")], 1),  # the cheapest order starts with c and d
        m("helper", lambda p, x: helper(p["v"], helper(p["w"], x)), params(w=(8, 6), v=(6, 6)),
          [_dot("w"), _dot("v", x="h")], 2),
        m("helper_twice", lambda p, x: helper(p["w"], helper(p["w"], x)), w88, [_dot("w"), _dot("w", x="h")], 2),
        m("scan", _scan, params(w=(3, 8, 8)), [stacked], 1),
        m("scan_reverse", _scan_reverse, params(w=(3, 8, 8)), [stacked], 1),
        m("scan_of_one", _stack_of_one, params(w=(1, 8, 8)), [stacked], 1),
        m("scan_of_none", _stack_of_one, params(w=(0, 8, 8)), [stacked], 1),
        m("rnn", _rnn, params(wx=(8, 8), wh=(8, 8), wo=(8, 5)), [_dot("wx"), _dot("wh", x="h"), _dot("wo", x="o")], 3,
          args=(normal(4, 2, 8),)),
        m("nested_scan", _nested_scan, params(w=(2, 3, 8, 8)), [S("w", "dot", (-2,), (-4, -3), "c")], 1),
        m("while_loop", _while, params(w=(8, 8), v=(8, 2)), [_dot("w"), _dot("v", x="test")], 2, differentiable=False),
        m("fori_loop", _fori, params(w=(3, 8, 8)), [stacked], 1),
        m("cond_one", _cond_one, w88, [_dot("w")], 1),
        m("cond_both", _cond_both, w88, [_dot("w"), _dot("w", -1, "sin")], 1),
        m("switch", _switch, params(w=(2, 8, 8)),
          [S("w", "dot", (-2,), (-3,), "a"), S("w", "dot", (-2,), (-3,), "b")], 2, args=(X, np.int32(1))),
        m("custom_jvp", lambda p, x: crooked(leaky(x), p["w"]), params(w=(8, 6)), [_dot("w")], 1),
        m("custom_vjp", lambda p, x: clipped(x, p["w"], 2.0), params(w=(8, 6)), [_dot("w")], 1),
        m("checkpoint", _checkpoint, params(w=(8, 6), v=(6, 8), u=(8, 6)),
          [_dot("w"), _dot("v", x="h"), _dot("u", x="y"), _dot("u", -1, "z")], 3),
        m("read_twice", lambda p, x: jnp.sin(x @ p["w"]) @ p["w"] + x @ p["w"], w88,
          [_dot("w"), _dot("w"), _dot("w", x="h")], 3),
        m("shared", lambda p, x: (x @ p["a"]) * (x @ p["b"]) + jnp.sin(x) @ p["c"],
          params(a=(8, 6), b=(8, 6), c=(8, 6)), [_dot("a"), _dot("b"), _dot("c", x="sin")], 3),
        m("both", _both, params(embed=(11, 8), position=(7, 8), columns=(5, 11)), [
            S("embed", "lookup", (-1,), (), "t"), _dot("embed", -1, "h"), S("position", "read"),
            S("columns", "lookup", (-2,), (), "clipped"),
        ], 3, args=(TOKENS,)),
        m("two_axes", _two_axes, params(w=(8, 6), v=(6, 8)), [_dot("w"), _dot("w", -1, "h"), _dot("v", x="h")], 2),
        m("gram", _gram, params(w=(8, 8)), [_dot("w", -1, "w"), S("w", "read")], 1),
        m("qkv_outputs", _qkv, params(qkv=(8, 16)), [_dot("qkv")], 1),
        m("gqa_weights", _gqa, params(qkv=(8, 6, 4)), [
            S("qkv", "dot", (-3,), (), "x"), S("qkv", "dot", (-3,), (-2,), "x1"), S("qkv", "dot", (-3,), (-2,), "x2"),
        ], 3),
        m("sliced_input", _sliced_input, params(w=(8, 6)), [S("w", "read", (-2,)), S("w", "read", (-2,))], 0),
        m("reshape_chain", _reshape_chain, params(w=(8, 15)), [_dot("w")], 1),
        m("interleaved", _interleaved, params(w=(5, 4, 6, 3)), [S("w", "dot", (-3, -1), (), "x")], 1),
        m("flat", lambda p, x: x @ p["w"].reshape(8, 6), params(w=(48,)), [S("w", "read")], 0),
        m("bf16", lambda p, x: (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32),
          params(w=(8, 6)), [_dot("w")], 1),
        m("mixed_dtypes", _mixed_dtypes, params(w=(8, 6), v=(6, 5)), [_dot("w"), _dot("v", x="h")], 2),
        m("moe_einsum", _moe, params(router=(8, 3), up=(3, 8, 6), down=(3, 6, 8)), [
            _dot("router"), S("up", "dot", (-2,), (), "x"), S("down", "dot", (-2,), (-3,), "h"),
        ], 3),
        m("experts_odd_order", _batched_experts, params(w=(5, 3, 8, 2)), [S("w", "dot", (-2,), (-3,), "x")], 1,
          args=(normal(3, 4, 8),)),
        m("ragged_dot", _ragged, params(w=(3, 8, 6), v=(6, 5)),
          [S("w", "ragged_dot", (-2,), (-3,), "x"), _dot("v", x="h")], 2, args=(normal(7, 8), sizes)),
        m("gain", _gain, params(w=(8, 6), gain=(8,), bias=(6,)), [_dot("w"), S("gain", "read"), S("bias", "read")], 1),
        m("outputs", _outputs, {**params(w=(8, 6)), "n": jnp.int32(3), "unused": jnp.ones((2, 2))},
          [_dot("w"), S("w", "read"), S("n", "read")], 1),
        m("scalars", _scalars, with_index, [_dot("w"), S("temperature", "read"), *[S("index", "read")] * 3], 1),
        m("static", _static, w88, [_dot("w", -1)], 1, args=(X, "left"), kwargs={"flag": True, "power": 3}),
        m("prng_key", _key, params(w=(8, 6)), [_dot("w")], 1, args=(X, jax.random.key(3))),
        m("shard_map", _shard_map, params(w=(8, 6), v=(6, 4)), [S("w", "read"), _dot("v", x="h")], 1),
        m("lookup_layers", _lookup_layers, params(tables=(2, 11, 8)),
          [S("tables", "lookup", (-1,), (-3,), "t")], 1, args=(TOKENS,)),
        m("vmapped", _vmapped, params(w=(8, 2, 6)), [S("w", "dot", (-3,), (-2,), "x")], 1),
        m("literal_outputs", _literal_outputs, params(w=(8, 8), v=(2, 8, 8)),
          [_dot("w"), S("v", "dot", (-2,), (-3,), "c")], 2),
    ]  # fmt: skip


MODELS = [*_plain_models(), *_linen_models(), _dropout_model(), *_nnx_models()]
BANK = {model.name: model for model in MODELS}
assert len(BANK) == len(MODELS)
