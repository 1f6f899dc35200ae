"""`fake_quantized` is `quantized` of the rounded weights, bit for bit, with a derivative; and it trains."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jquant as jq
from jquant.core.activation import Activation, Policy
from jquant.core.errors import RecipeError
from jquant.core.formats import Format, compute_params
from jquant.core.qtensor import encode_array
from tests import model_bank
from tests.model_bank import BANK, MODELS, Model, X, assert_same, normal, params, quick

BF16 = "bfloat16"
RECIPES = [
    Format("int4", 5), Format("int3", 3, symmetric=False, scale_dtype=BF16), Format("nf4", 5), Format("int8", "tensor"),
    Format("fp8_e4m3"), jq.W8A8, Policy(Format("int4", 5, scale_dtype=BF16), Activation()), jq.FP8,
    Policy(Format("int8", symmetric=False), Activation("int8", "tensor", symmetric=False)),
    Policy(Format("int5"), Activation("fp8_e5m2")),
]  # fmt: skip


def usable(model: Model) -> bool:
    if model.name == "scan_of_none":  # its leaf is empty
        return False
    plain = not model.kwargs and not any(isinstance(a, str) for a in model.args)
    return plain and bool(model_bank.contracted_axes(model))


PAIRS = [pytest.param(m, RECIPES[i % len(RECIPES)], id=repr(m)) for i, m in enumerate(m for m in MODELS if usable(m))]


def recipe_for(model: Model, value) -> jq.Recipe:
    """The value for what a product or lookup reads, so that no pattern matches in vain."""
    return jq.Recipe(dict.fromkeys(model_bank.contracted_axes(model), value))


def bits(tree) -> list[bytes]:
    return [np.asarray(a).tobytes() for a in jax.tree.leaves(tree)]


def assert_the_same_bits(apply, p, recipe, *args, stats=None, static_batches=None):
    q = jq.quantize(apply, p, recipe, jq.rtn(), static_batches or [tuple(args)])
    got = jax.jit(jq.fake_quantized(apply, recipe, stats=stats))(p, *args)
    want = jax.jit(jq.quantized(apply))(q, *args)
    assert bits(got) == bits(want)
    return got


@pytest.mark.parametrize("model, value", PAIRS)
@pytest.mark.filterwarnings("ignore::jquant.JQuantWarning")
def test_every_kind_of_model_has_the_bits_of_the_quantized_one(model: Model, value):
    low_precision = [np.dtype(jnp.result_type(l)).itemsize < 4 for l in jax.tree.leaves(model.params)]
    if any(low_precision):
        pytest.skip("bits are promised in float32")
    assert_the_same_bits(model.apply, model.params, recipe_for(model, value), *model.args)


MLP = params(a=(40, 24), b=(24, 7))


def mlp(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


SHARED = ["nvfp4-4o6", "mxfp4-even+int8", "nf4-g8-dq", "int4-3x8-asym+int8", "int4-g8-asym-zf32+int8", "ternary-tensor"]


@pytest.mark.parametrize("value", [*RECIPES, *map(jq.parse_policy, SHARED)], ids=str)
def test_every_format_and_policy_has_the_bits_of_the_quantized_model(value):
    x = jnp.asarray(normal(3, 5, 40))
    got = assert_the_same_bits(mlp, MLP, value, x)
    assert np.any(got != jax.jit(mlp)(MLP, x))


@pytest.mark.parametrize("how", ["max", *[pytest.param(h, marks=pytest.mark.slow) for h in ("mse", "percentile")]])
def test_static_ranges_of_given_statistics(how: str):
    policy = Policy(jq.INT8, Activation("int8", "tensor", symmetric=False, range=how))
    x = jnp.asarray(normal(6, 40))
    weights_only = jq.quantize(mlp, MLP, jq.INT8, jq.rtn(), [x])
    stats = jq.calibrate(mlp, weights_only, [x], gram=False, histogram=True)
    assert_the_same_bits(mlp, MLP, policy, x, stats=stats)
    # Without statistics the range is that of the input at hand.
    by_batch = Policy(jq.INT8, Activation("int8", "tensor", symmetric=False))
    fake = lambda recipe: jax.jit(jq.fake_quantized(mlp, recipe))(MLP, x)
    assert bits(fake(policy)) == bits(fake(by_batch))
    with pytest.raises(RecipeError, match="^b: the range of its input .* never observed"):
        jq.fake_quantized(mlp, policy, stats={"a": stats["a"]})(MLP, x)


# --- derivatives ---


def by_hand(x, p, value):
    """One product as a straight-through estimator is usually written."""
    fmt, act = (value.weight, value.activation) if isinstance(value, Policy) else (value, None)
    ste = lambda x, y: x + jax.lax.stop_gradient(y - x)
    rows = p["w"].T
    w = ste(p["w"], encode_array(rows, compute_params(rows, fmt, 0), fmt, (-1,)).dequantize().T)
    if act is not None:
        codes, found = jq.core.activation.encode_input(x, act)
        x = ste(x, jq.core.formats.decode(codes, found, act.format))
    return x @ w


@pytest.mark.parametrize("value", RECIPES, ids=str)
def test_the_derivative_is_that_of_the_rounded_product(value):
    p, x = params(w=(20, 6)), jnp.asarray(normal(4, 20))
    weights = jnp.asarray(normal(4, 6))
    fake = jq.fake_quantized(lambda p, x: x @ p["w"], value)
    ours = lambda p, x: jnp.sum(jnp.sin(fake(p, x)) * weights)
    theirs = lambda p, x: jnp.sum(jnp.sin(by_hand(x, p, value)) * weights)
    both = quick(lambda p, x: tuple(jax.grad(f, argnums=(0, 1))(p, x) for f in (ours, theirs)))
    got, want = both(p, x)
    assert_same(got, want, rtol=2e-5)
    tangents = (jax.tree.map(jnp.cos, p), jnp.sin(x))
    assert_same(*quick(lambda: tuple(jax.jvp(f, (p, x), tangents)[1] for f in (ours, theirs)))(), rtol=2e-5)


def test_ternary_weights_beyond_the_mean_train():
    p, x = params(w=(20, 6)), jnp.asarray(normal(4, 20))
    grad = jax.grad(lambda p: jnp.sum(jq.fake_quantized(lambda p, x: x @ p["w"], jq.TERNARY)(p, x)))(p)
    assert_same(grad["w"], jnp.broadcast_to(x.sum(0)[:, None], (20, 6)), rtol=2e-5)


def test_no_derivative_beyond_a_static_range_unless_asked_for():
    apply = lambda p, x: x @ p["w"]
    p, seen = params(w=(8, 3)), jnp.asarray(normal(4, 8))
    stats = jq.calibrate(apply, p, [seen], gram=False, histogram=True)
    x = jnp.zeros((1, 8)).at[0, 2].set(100.0).at[0, 3].set(0.1)
    for clip in (True, False):
        fake = jq.fake_quantized(apply, jq.W8A8_STATIC, stats=stats, clip=clip)
        grad = quick(jax.grad(lambda x, fake=fake: jnp.sum(fake(p, x))))(x)[0]
        assert (grad[2] == 0) == clip and np.all(np.delete(grad, 2) != 0)


def test_lookups_and_unknown_reads_have_derivatives():
    """A tied table: looked up, multiplied with, and read by something else."""
    p = params(t=(9, 8))
    ids = np.array([1, 5, 5, 0])

    def apply(p, ids):
        return jnp.tanh(p["t"][ids]) @ p["t"].T + jnp.sum(p["t"] ** 2)

    fake = jq.fake_quantized(apply, jq.INT4)
    quantized = encode_array(p["t"], compute_params(p["t"], jq.INT4), jq.INT4, (-1,)).dequantize()
    loss = lambda f: lambda p: jnp.sum(jnp.sin(f(p, ids)))
    got = quick(jax.grad(loss(fake)))(p)
    assert_same(got, quick(jax.grad(loss(apply)))({"t": quantized}), rtol=1e-5)


SLOW = ["linen_attention", "moe_einsum"]


@pytest.mark.parametrize(
    "name", ["scan", "checkpoint", "custom_vjp", "linen_scan_remat", "ragged_dot", "linen_conv1d",
             *[pytest.param(n, marks=pytest.mark.slow) for n in SLOW]]
)  # fmt: skip
@pytest.mark.parametrize("value", [jq.INT4, jq.W8A8], ids=str)
def test_every_weight_has_a_derivative_through_loops_and_remat(name: str, value):
    model = BANK[name]
    fake = jq.fake_quantized(model.apply, recipe_for(model, value))
    loss = lambda f: lambda p: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(f(p, *model.args)))
    grads = quick(jax.grad(loss(fake)))(model.params)
    near = quick(jax.grad(loss(model.apply)))(model.params)
    largest = max(float(jnp.max(jnp.abs(n))) for n in jax.tree.leaves(near))
    for path, g, n in zip(*[jax.tree.leaves(t) for t in (model.params, grads, near)], strict=True):
        assert g.shape == path.shape and np.all(np.isfinite(g))
        if np.max(np.abs(n)) > 1e-5 * largest:  # a softmax does not notice the bias of keys: its derivative is noise
            cosine = jnp.sum(g * n) / jnp.sqrt(jnp.sum(g * g) * jnp.sum(n * n))
            assert cosine > 0.7, (name, cosine)


def test_vmap_over_models_and_over_inputs():
    stacked = jax.tree.map(lambda w: jnp.stack([w, 2 * w, w**2]), MLP)
    x = jnp.asarray(normal(3, 5, 40))
    for value in (jq.INT4_G32, jq.W8A8):
        fake = jq.fake_quantized(mlp, value)
        got = quick(jax.vmap(fake))(stacked, x)
        want = [quick(fake)(jax.tree.map(lambda w, i=i: w[i], stacked), x[i]) for i in range(3)]
        assert_same(got, jnp.stack(want), rtol=1e-5)


def test_the_function_itself_and_the_recipe():
    fake = jq.fake_quantized(mlp, {"b": jq.INT4, "*": None})
    x = jnp.asarray(normal(2, 40))
    half = {"a": MLP["a"], "b": jq.dequantize(jq.quantize(mlp, MLP, {"b": jq.INT4}, jq.rtn(), [x]))["b"]}
    assert_same(quick(fake)(MLP, x), quick(mlp)(half, x))
    assert fake.__name__ == "mlp"
    with pytest.raises(RecipeError, match="matches no parameter"):
        jq.fake_quantized(mlp, {"c": jq.INT4})(MLP, x)


def test_degenerate_weights_train():
    """A zero block has scale zero: it decodes to zeros, and still has a derivative."""
    p = {"w": jnp.zeros((8, 3)).at[:, 1].set(0.5)}
    fake = jq.fake_quantized(lambda p, x: x @ p["w"], jq.W8A8)
    x = jnp.asarray(normal(4, 8))
    value, grads = quick(jax.value_and_grad(lambda p: jnp.sum(fake(p, x))))(p)
    assert np.isfinite(value) and np.all(np.isfinite(grads["w"])) and np.all(grads["w"][:, 0] != 0)


# --- training ---


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(32)(x))
        return nn.Dense(2)(x)


def train(loss, p, optimizer, steps: int):
    @jax.jit
    def run(p):
        def step(carry, _):
            p, state = carry
            value, grads = jax.value_and_grad(loss)(p)
            updates, state = optimizer.update(grads, state, p)
            return (optax.apply_updates(p, updates), state), value

        return jax.lax.scan(step, (p, optimizer.init(p)), None, steps)[0][0]

    return run(p)


# A rate that falls: at a constant one weights go to and fro between two codes, and the loss with them.
ADAM = optax.adam(optax.linear_schedule(9e-3, 0.0, 300))


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "recipe, optimizer",
    [
        pytest.param(Format("int3"), ADAM, id="int3-adam"),
        pytest.param(Format("int3"), optax.sgd(0.01), id="int3-sgd", marks=pytest.mark.slow),
        pytest.param(Format("int2", symmetric=False), ADAM, id="int2-adam", marks=pytest.mark.slow),
        pytest.param(jq.parse_policy("int3+int4"), ADAM, id="int3+int4", marks=pytest.mark.slow),
    ],
)
def test_training_recovers_what_rounding_the_trained_model_lost(recipe, optimizer):
    x = jnp.asarray(normal(64, 6))
    y = jnp.stack([jnp.sin(2 * x[:, 0]) * x[:, 1], jnp.abs(x[:, 2])], -1)
    net = Net()
    error = lambda apply: lambda p: jnp.mean((apply(p, x) - y) ** 2)
    p = train(error(net.apply), net.init(jax.random.key(0), x), optax.adam(1e-2), 400)
    kernels = jq.Recipe({"*kernel": recipe})
    fake = error(jq.fake_quantized(net.apply, kernels))
    before, trained = jax.jit(fake)(p), train(fake, p, optimizer, 300)
    after = jax.jit(fake)(trained)
    assert jax.jit(error(net.apply))(p) < before  # rounding cost something
    assert after < 0.6 * before
    # What was trained is what is deployed.
    q = jq.quantize(net.apply, trained, kernels, jq.rtn(), [x])
    deployed, was = jax.jit(jq.quantized(net.apply))(q, x), jax.jit(jq.fake_quantized(net.apply, kernels))(trained, x)
    assert bits(deployed) == bits(was)


def test_nnx_by_split_and_merge():
    graph, state = nnx.split(nnx.Linear(8, 3, rngs=nnx.Rngs(0)))
    apply = lambda state, x: nnx.merge(graph, state)(x)
    fake = jq.fake_quantized(apply, {"kernel": jq.W4A8, "*": None})
    loss = lambda s: jnp.mean((fake(s, X) - 1) ** 2)
    before, grads = quick(jax.value_and_grad(loss))(state)
    after = quick(loss)(jax.tree.map(lambda w, g: w - 0.1 * g, state, grads))
    assert after < before
    assert_the_same_bits(apply, state, {"kernel": jq.W4A8, "*": None}, jnp.asarray(X))
