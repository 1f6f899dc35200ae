"""The divergence of a network and its derivative, segment by segment: they are those of the whole."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.core.activation import split_policy
from jquant.core.method import Folding
from jquant.fold import network
from jquant.fold.objectives import group_blocks, policies
from jquant.fold.program import apply_fold
from jquant.fold.rotate import find_blocks, rotation, start_matrix, without_gains
from jquant.models import build
from jquant.trace.fake_quant import fake_quantized
from jquant.trace.function import trace_call
from jquant.trace.sites import find_sites
from jquant.trace.targets import plan_targets
from tests.fold.models import BANK, TOKENS, D, F, FoldModel, V, fill, rms
from tests.fold.test_exact import job_of, widened
from tests.models.cases import CONFIGS, make_params, make_tokens


@jax.custom_vjp
def halved(x):
    return x


@jax.custom_vjp
def doubled(x):
    return x


halved.defvjp(lambda x: (x, None), lambda _, g: (g / 2,))
doubled.defvjp(lambda x: (x, None), lambda _, g: (g * 2,))


def own_rules(p, tokens):
    """Layers that compute the same, every other with another derivative; logits that are capped."""
    x = p["embed"][tokens]
    for i in range(sum(name.endswith("up") for name in p)):
        rule = (halved, doubled)[i % 2]
        x = x + rule(jax.nn.relu(rms(x, p[f"{i}gain"]) @ p[f"{i}up"])) @ p[f"{i}down"]
    return 2 * jnp.tanh(rms(x, p["last_gain"]) @ p["head"] / 2)


def _layers(n, apply=own_rules):
    shapes = {"embed": (V, D), "last_gain": (D,), "head": (D, V)}
    for i in range(n):
        shapes |= {f"{i}gain": (D,), f"{i}up": (D, F), f"{i}down": (F, D)}
    return FoldModel(f"layers{n}", apply, fill(shapes), (TOKENS,), (), ())


def _model(name):
    if name in BANK:
        return BANK[name]
    if name in CONFIGS:
        config = CONFIGS[name]
        return FoldModel(name, build(config), make_params(config), (make_tokens(config, 7),), (), ())
    return _layers(int(name.removeprefix("layers")))


def _job(model, policy, params=None):
    fmt, act = split_policy(jq.parse_policy(policy))
    params = model.params if params is None else params
    sites = jq.find_sites(model.apply, params, *model.args).by_path()
    formats = {p: fmt for p, s in sites.items() if any(x.quantizable and x.kind == "dot" for x in s) and p != "embed"}
    job = job_of(model.apply, params, model.args, formats, dict.fromkeys(formats, act) if act else None)
    ready = without_gains(find_blocks(job, "learned_rotation", True, True))
    return job._replace(box=[ready.params]), ready, group_blocks(ready.blocks)


def _whole(job: Folding, ready, turns):
    """The divergence as it is written down, for `jax.grad`."""
    rounded = fake_quantized(job.apply, policies(job), scales=True)

    def loss(stacks):
        turn = rotation(ready.flow, turns.blocks, turns.of(stacks))
        turned = apply_fold((turn,), ready.params, traced=stacks[0].dtype)
        want, got = jq.quantized(job.apply)(ready.params, *job.batches[0]), rounded(turned, *job.batches[0])
        p, q = jax.nn.log_softmax(want), jax.nn.log_softmax(got)
        return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))

    return loss


def _moved(turns):
    """Matrices that are no longer those that outliers are spread by."""
    stacks = turns.stack(partial(start_matrix, 0), jnp.float64)
    rng = np.random.default_rng(0)
    return [s @ jnp.asarray(np.linalg.qr(np.eye(s.shape[-1]) + 0.1 * rng.normal(size=s.shape[-2:]))[0]) for s in stacks]


LONG = pytest.mark.slow(optimized=False)


@pytest.mark.parametrize("name, policy", [
    ("layers1", "int3-g6"), pytest.param("layers3", "int3-g6", marks=LONG),
    pytest.param("fused", "int4-g6+int4", marks=LONG), pytest.param("scanned", "int3-g6", marks=LONG),
    pytest.param("experts", "int3", marks=LONG), pytest.param("gpt2_nnx", "int3-g6-asym", marks=LONG),
    pytest.param("llama-tied-all-biases", "int3-g4", marks=LONG),
])  # fmt: skip
def test_the_derivative_by_segments_is_that_of_the_whole(name, policy, monkeypatch):
    """In float64, to what a QTensor's float32 leaves of it; with the logits at once, and a position at a time."""
    model = _model(name)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
        warnings.simplefilter("ignore", jq.JQuantWarning)
        job, ready, turns = _job(model, policy, None if name == "gpt2_nnx" else widened(model.params))
        stacks = _moved(turns)
        want, derivatives = jax.jit(jax.value_and_grad(_whole(job, ready, turns)))(stacks)
        assert want > 1e-3 and all(jnp.abs(g).max() > 1e-3 for g in derivatives)
        for size in (1,) if name == "layers1" else (2**25, 1):
            monkeypatch.setattr(network, "_CHUNK", size)
            _check(network.network(job, ready, turns), stacks, want, derivatives)


def _check(found, stacks, want, derivatives):
    loss, got = found.gradient(stacks, 0)
    np.testing.assert_allclose([loss, found.value(stacks, 0)], want, rtol=1e-6)
    for a, b in zip(got, derivatives, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_layers_share_their_programs():
    """Of eight layers there are two kinds; beside them the table, the last norm and the head."""
    job, ready, turns = _job(_layers(8), "int3-g6")
    args = job.batches[0]
    traced = trace_call(job.apply, ready.params, args, {})
    targets = plan_targets(find_sites(job.apply, ready.params, *args), ready.params, policies(job))
    programs = {}
    pieces = network._course(job, ready, turns, targets, traced, programs).pieces
    assert len(pieces) == 11 and len(programs) == 5
    assert all(len(p.segment.inputs) == len(p.ins) == len(p.blocks) == 1 for p in pieces[1:9])


@LONG
def test_where_there_is_no_narrow_place_it_is_said_and_the_whole_is_run():
    """One function with a derivative of its own, around everything."""
    whole = jax.custom_vjp(own_rules)
    whole.defvjp(lambda p, t: jax.vjp(lambda p: own_rules(p, t), p), lambda pull, g: (*pull(g), None))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        model = _layers(2, whole)
        job, ready, turns = _job(model, "int3-g6", widened(model.params))
        stacks = _moved(turns)
        want, derivatives = jax.jit(jax.value_and_grad(_whole(job, ready, turns)))(stacks)
        found = network.network(job, ready, turns)
        with pytest.warns(jq.JQuantWarning, match="no narrow place; the gradient holds all activations"):
            found.value(stacks, 0)
        _check(found, stacks, want, derivatives)


def test_the_same_batch_gives_the_same_bits():
    job, ready, turns = _job(_layers(1), "int3-g6")
    found, stacks = network.network(job, ready, turns), turns.stack(partial(start_matrix, 0))
    a, b = found.gradient(stacks, 0), found.gradient(stacks, 0)
    assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    assert float(found.value(stacks, 0)) == pytest.approx(float(a[0]), rel=1e-6)
