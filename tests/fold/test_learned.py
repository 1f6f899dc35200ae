"""Learned rotations: steps on the orthogonal group, what is learned by, and what comes of it in `quantize`."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jquant as jq
from jquant.core.activation import split_policy
from jquant.core.formats import decode
from jquant.core.method import Rounding
from jquant.core.paths import flatten_with_paths
from jquant.core.per_use import is_per_use
from jquant.core.problem import as_problem
from jquant.fold import cayley, learned, objectives
from jquant.fold.hadamard import random_rotation
from jquant.fold.network import network
from jquant.fold.objectives import group_blocks
from jquant.fold.program import apply_fold
from jquant.fold.rotate import find_blocks, rotation, start_matrix, without_gains
from jquant.trace.fake_quant import scaled_error
from tests.fold.models import BANK, TOKENS, D
from tests.fold.test_exact import error, folded, job_of, widened
from tests.interrupts import interrupt_walk
from tests.problems import weights

INT3 = jq.parse_format("int3-g6")
FAST = partial(jq.learned_rotation, objective="layers", steps=10, batch=4, learning_rate=1.0)


def _same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b))
    )


def _ready(model, params=None, fmt=INT3, activations=None):
    """A job and what is found in it."""
    params = model.params if params is None else params
    sites = jq.find_sites(model.apply, params, *model.args).by_path()
    formats = {p: fmt for p, s in sites.items() if any(x.quantizable for x in s) and p != "embed"}
    job = job_of(model.apply, params, model.args, formats, activations)
    ready = without_gains(find_blocks(job, "learned_rotation", True, True))
    job = job._replace(box=[ready.params])
    return job, ready, group_blocks(ready.blocks)


# --- steps ---


@pytest.mark.parametrize("n, ones", [(2, False), (12, True), (36, False)])
def test_no_number_of_steps_leaves_the_orthogonal_group(n, ones):
    """To float32: 100 steps along random gradients, small ones and such that the bound cuts."""
    rng = np.random.default_rng(n)
    first = jnp.asarray(np.stack([random_rotation(n, rng, ones) for _ in range(3)]), jnp.float32)
    gradients = rng.normal(size=(100, 3, n, n)) * np.array([0.01, 1, 99])[:, None, None]
    step = lambda r, g: (cayley.moved(r, -cayley.tangent(g, r, ones)), None)
    last = jax.jit(lambda r, g: jax.lax.scan(step, r, g)[0])(first, jnp.asarray(gradients, jnp.float32))
    for r, begun in zip(np.asarray(last, np.float64), np.asarray(first)):
        assert np.abs(r @ r.T - np.eye(n)).max() < 1e-6 and np.abs(r - begun).max() > 1e-3
        assert not ones or np.abs(r.sum(1) - 1).max() < 1e-4
        exact = cayley.orthogonal(r, ones)
        assert np.abs(exact @ exact.T - np.eye(n)).max() < 1e-14 and np.abs(exact - r).max() < 1e-4
        assert not ones or np.abs(exact.sum(1) - 1).max() < 1e-14


@given(seed=st.integers(0, 1000), ones=st.booleans())
@settings(max_examples=10)
def test_the_tangent_is_the_derivative_along_a_step(seed, ones):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        r, c, a = jnp.asarray(random_rotation(6, rng, ones)), rng.normal(size=(6, 6)), rng.normal(size=(6, 6))
        loss = lambda r: jnp.sum(c * r**3)
        u = cayley.skew(jnp.asarray(a), ones)
        along = lambda t: float(loss(cayley.cayley(t * u) @ r))
        slope = float(jnp.sum(cayley.tangent(jax.grad(loss)(r), r, ones) * u))
        assert slope == pytest.approx((along(1e-5) - along(-1e-5)) / 2e-5, rel=1e-6, abs=1e-8)


def test_steps_are_bounded():
    u = cayley.skew(jnp.asarray(weights(0, 8, 8), jnp.float32))
    assert float(jnp.abs(cayley.bounded(100 * u)).sum(0).max()) == pytest.approx(1)
    np.testing.assert_array_equal(cayley.bounded(1e-3 * u), 1e-3 * u)
    np.testing.assert_array_equal(cayley.bounded(0 * u), 0 * u)


# --- what is learned by ---


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", ["fused", "scanned", "gpt2_nnx"])
def test_a_fold_in_jax_is_the_fold_and_has_its_derivative(name):
    """In float64, by central differences, along a step of every block, of a linear function of all that is written."""
    model = BANK[name]
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore", jq.JQuantWarning)
        _, ready, turns = _ready(model, widened(model.params))
        stacks = turns.stack(partial(start_matrix, 0), jnp.float64)
        turned = lambda of, **how: apply_fold((rotation(ready.flow, turns.blocks, of),), ready.params, **how)
        fold = lambda s: turned(turns.of(s), traced=jnp.float64)
        plain = turned(partial(start_matrix, 0))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), plain, fold(stacks))
        rng = np.random.default_rng(0)
        by = jax.tree.map(lambda a: rng.normal(size=a.shape), plain)
        loss = jax.jit(lambda s: sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(by), jax.tree.leaves(fold(s)))))
        steps = [cayley.skew(jnp.asarray(rng.normal(size=s.shape)), o) for s, o in zip(stacks, turns.ones)]
        at = lambda t: float(loss([cayley.cayley(t * u) @ s for s, u in zip(stacks, steps)]))
        found = zip(jax.grad(loss)(stacks), stacks, steps, turns.ones)
        slope = sum(float(jnp.sum(cayley.tangent(g, s, o) * u)) for g, s, u, o in found)
        assert slope == pytest.approx((at(1e-4) - at(-1e-4)) / 2e-4, rel=1e-5)


@pytest.mark.parametrize("text", ["int4-g4", "int3-g5-asym", "int4", "nf4-g4"])
def test_the_error_grows_with_the_range_of_its_block(text):
    """The derivative of s (c - w/s) with the bracket held: against finite differences of rounding, and by hand."""
    fmt, w = jq.parse_format(text), jnp.asarray(weights(1, 3, 10), jnp.float32)[None]
    done = jq.rtn().solve(Rounding(w), None, fmt)
    e = decode(done.codes, done.params, fmt) - w
    run = lambda v: scaled_error(v, jq.rtn().solve(Rounding(jax.lax.stop_gradient(v)), None, fmt), fmt)
    # All ranges grow by their own size: so does the error, as it does when the weights are doubled and rounded again.
    value, change = jax.jvp(run, (w,), (w,))
    np.testing.assert_allclose(value, e, atol=1e-7)
    np.testing.assert_allclose(change, e, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(change, run(2 * w) - run(w), rtol=1e-5, atol=1e-7)
    # Inside the range, a weight's own derivative is that of its rounding: none.
    _, still = jax.jvp(run, (w,), (jnp.where(jnp.abs(w) < 0.05, w, 0),))
    np.testing.assert_allclose(still, 0, atol=1e-7)


@pytest.mark.slow(optimized=False)
@pytest.mark.parametrize("name", ["fused", "scanned", "experts"])
def test_the_layers_objective_is_the_error_of_what_quantize_returns(name):
    """tr(E H E^T) / tr(W H W^T) in float64 numpy, of the model that `rotate` and `rtn` make."""
    model = BANK[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jq.JQuantWarning)
        job, ready, turns = _ready(model)
        found = objectives.layers(job, ready, turns)
        got = [float(found.value(turns.stack(partial(start_matrix, 0)), i)) for i in range(found.parts)]
        after = apply_fold((rotation(ready.flow, turns.blocks, partial(start_matrix, 0)),), ready.params)
        recipe = objectives.policies(job)
        q = jq.dequantize(jq.quantize(model.apply, after, recipe, jq.rtn(), [model.args]))
        stats = jq.calibrate(model.apply, after, [model.args])
    units = {}
    sites = jq.find_sites(model.apply, after, *model.args).by_path()
    before, rounded = dict(flatten_with_paths(after)[0]), dict(flatten_with_paths(q)[0])
    for path in job.formats:
        if any(p == path for b in turns.blocks for p in (*b.producers, *b.readers)):
            units.setdefault(id(stats[path].gram), []).append(path)
    want = []
    for paths in units.values():
        size = total = 0.0
        for p in paths:
            axes = sites[p][0].contracted, sites[p][0].batch
            w, r = (np.asarray(as_problem(jnp.asarray(t[p]), *axes).rows, float) for t in (before, rounded))
            h = np.asarray(stats[p].gram, float)
            h = h.reshape(-1, *h.shape[-2:])
            size += np.einsum("bmi,bij,bmj", w, h, w)
            total += np.einsum("bmi,bij,bmj", r - w, h, r - w)
        want.append(total / size)
    assert len(want) == found.parts > 1
    np.testing.assert_allclose(sorted(got), sorted(want), rtol=2e-3)


@pytest.mark.parametrize("policy", ["int3-g6", pytest.param("int4-g6+int4", marks=pytest.mark.slow)])
def test_the_network_objective_is_the_divergence_of_what_quantize_returns(policy):
    model, policy = BANK["scanned"], jq.parse_policy(policy)
    fmt, act = split_policy(policy)
    paths = [f"layers/{n}" for n in ("qkv", "o", "gate_up", "down")]
    job, ready, turns = _ready(model, fmt=fmt, activations={} if act is None else dict.fromkeys(paths, act))
    found = network(job, ready, turns)
    q = jq.quantize(
        model.apply, model.params, dict.fromkeys(paths, policy), jq.chain(jq.rotate(), jq.rtn()), [model.args]
    )
    a, b = model.apply(model.params, *model.args), jq.quantized(model.apply)(q, *model.args)
    p, r = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in (a, b))
    want = float(jnp.mean(jnp.sum(jnp.exp(p) * (p - r), axis=-1)))
    assert float(found.value(turns.stack(partial(start_matrix, 0)), 0)) == pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize("objective", ["layers", pytest.param("network", marks=pytest.mark.slow)])
def test_learning_never_ends_behind_its_start(objective):
    """Better where it can learn; and not worse where every step leads astray."""
    job, ready, turns = _ready(BANK["fused"])
    found = learned._OBJECTIVES[objective](job, ready, turns)
    total = lambda s: sum(float(found.value(s, i)) for i in range(found.parts))
    start = total(turns.stack(partial(start_matrix, 0)))
    how = learned.Settings(0, objective, 20, 1.0, 0.9, min(4, found.parts), 4)
    best = learned.learn(found, turns, how)
    assert best is not None and total(best) < 0.9 * start
    for r in best:
        eye = np.asarray(r, np.float64) @ np.swapaxes(np.asarray(r, np.float64), -1, -2)
        assert np.abs(eye - np.eye(r.shape[-1])).max() < 1e-6
    astray = learned.learn(found, turns, how._replace(steps=4, learning_rate=optax.scale(1e4)))  # as far as it may
    assert astray is None or total(astray) < start


def test_the_start_is_kept_where_nothing_is_better():
    """Every step leads away from it: it is the one matrix at which the objective is least."""
    _, _, turns = _ready(BANK["fused"])
    start = turns.stack(partial(start_matrix, 0))
    value = lambda s, i: 1 + sum(jnp.sum((a - b) ** 2) for a, b in zip(s, start, strict=True))
    met = []
    away = objectives.Objective(1, lambda s, i: met.append(value(s, i)) or met[-1], jax.value_and_grad(value))
    how = learned.Settings(0, "layers", 4, optax.add_noise(0.1, 0.0, 0), 0.9, 1, 4)
    assert learned.learn(away, turns, how) is None
    assert len(met) == 5 and all(m > met[0] for m in met[1:])


def test_an_objective_that_is_lost_ends_the_learning():
    job, ready, turns = _ready(BANK["fused"])
    start = turns.stack(partial(start_matrix, 0))
    value = lambda s, i: jnp.float32(1.0) if s[0] is start[0] or np.array_equal(s[0], start[0]) else jnp.float32(np.nan)
    lost = objectives.Objective(1, value, lambda s, i: (value(s, i), [jnp.ones_like(r) for r in s]))
    with pytest.warns(jq.JQuantWarning, match="no number at step 2; the best rotation before is used"):
        assert learned.learn(lost, turns, learned.Settings(0, "layers", 4, 0.1, 0.9, 1, 2)) is None


# --- in quantize ---


@pytest.mark.parametrize("name", ["fused", "scanned"])
def test_no_steps_are_rotate(name):
    """Bit for bit, and then shapes are enough."""
    model = BANK[name]
    shapes = [jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), model.args)]
    runs = [
        jq.quantize(model.apply, model.params, {"*down": INT3}, jq.chain(m, jq.rtn()), shapes)
        for m in (jq.rotate(2), jq.learned_rotation(2, steps=0))
    ]
    assert _same(*runs)


@pytest.mark.parametrize("name", ["fused", pytest.param("scanned", marks=pytest.mark.slow),
                                  pytest.param("gpt2_nnx", marks=pytest.mark.slow),
                                  pytest.param("experts", marks=pytest.mark.slow)])  # fmt: skip
def test_the_float64_model_stays_the_same(name):
    """RMSNorm, LayerNorm (the vector of ones is kept), scanned layers, a tied table, experts."""
    model = BANK[name]
    with jax.enable_x64(name != "gpt2_nnx"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(learned_rotation|rotate): no residual stream", jq.JQuantWarning)
        params, args = (model.params, model.args) if name == "gpt2_nnx" else widened((model.params, model.args))
        after = folded(FAST(), model.apply, params, args)
        start = folded(jq.rotate(), model.apply, params, args)
        want, got = model.apply(params, *args), jq.quantized(model.apply)(after, *args)
        assert error(want, got) < (1e-5 if name == "gpt2_nnx" else 1e-9)
    assert not _same(after, start)
    assert list(map(is_per_use, jax.tree.leaves(after, is_leaf=is_per_use))) == list(
        map(is_per_use, jax.tree.leaves(start, is_leaf=is_per_use))
    )


def _divergence(model, q):
    a, b = model.apply(model.params, *model.args), jq.quantized(model.apply)(q, *model.args)
    p, r = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - r), axis=-1)))


@pytest.mark.slow
def test_learned_beats_random_under_rounding_to_nearest():
    """What the network is learned by is what `quantize` then returns. The same seed gives the same bits."""
    model = BANK["fused"]
    # Codes jump, so that rounding decides which way is gone; what is best on it is found by looking often.
    rate = optax.linear_schedule(0.5, 0.0, 20)
    method = jq.learned_rotation(objective="network", steps=20, learning_rate=rate, checks=10)
    run = lambda m: jq.quantize(model.apply, model.params, INT3, jq.chain(m, jq.rtn()), [model.args])
    q = run(method)
    assert _divergence(model, q) < 0.8 * _divergence(model, run(jq.rotate()))
    assert _same(q, run(method))


@pytest.mark.slow
def test_composed_with_gptq_and_resumed_it_ends_in_the_same_bits(tmp_path, monkeypatch):
    model, method = BANK["fused"], jq.chain(FAST(learning_rate=optax.adam(0.01)), jq.gptq())
    job = (model.apply, model.params, INT3, method, [model.args])
    whole = jq.quantize(*job)
    calls = interrupt_walk(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        jq.quantize(*job, resume=tmp_path / "work")
    again = jq.quantize(*job, resume=tmp_path / "work")
    assert calls[:4] == [0, 1, 2, 2] and _same(again, whole)
    assert _divergence(model, whole) < _divergence(model, jq.quantize(*job[:3], jq.rtn(), job[4]))


def test_where_there_is_nothing_to_rotate_it_is_said_and_nothing_changes():
    model = BANK["mlp"]
    with pytest.warns(jq.JQuantWarning, match="learned_rotation: no residual stream was found"):
        after = folded(FAST(), model.apply, model.params, model.args)
    assert all(a is b for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(model.params), strict=True))


@pytest.mark.parametrize(
    "setting, match",
    [
        (dict(objective="kl"), 'must be "network" or "layers"'), (dict(steps=-1), "steps >= 0"),
        (dict(momentum=1.0), "momentum < 1"), (dict(batch=0), "batch >= 1"), (dict(checks=0), "checks >= 1"),
        (dict(learning_rate=0), "positive number, an optax schedule"), (dict(learning_rate="fast"), "not 'fast'"),
    ],
)  # fmt: skip
def test_settings_are_checked(setting, match):
    with pytest.raises(ValueError, match=match):
        jq.learned_rotation(**setting)


def test_what_cannot_be_measured_is_said():
    model = BANK["fused"]
    scalar = lambda p, t: model.apply(p, t).sum()
    with pytest.raises(jq.JQuantError, match='no logits .* write objective="layers"'):
        folded(FAST(objective="network"), scalar, model.params, (TOKENS,))
    with pytest.raises(jq.JQuantError, match="no weight that the recipe names is turned"):
        jq.quantize(model.apply, model.params, {"embed": INT3, "*": None}, jq.chain(FAST(), jq.rtn()), [model.args])
    shapes = [jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)]
    with pytest.raises(jq.JQuantError, match="looks at calibration data, and the batches are shapes"):
        jq.quantize(model.apply, model.params, INT3, jq.chain(FAST(), jq.rtn()), shapes)


def test_names():
    assert jq.parse_method("learned_rotation+gptq").name == "learned_rotation() + gptq()"
    assert jq.parse_method("learned_rotation(steps=3)+rtn").name == "learned_rotation(steps=3) + rtn()"
    assert jq.learned_rotation(learning_rate=optax.adam(1e-3)).name == (
        "learned_rotation(learning_rate=an optax transformation)"
    )
    assert D == 12  # the widths that INT3 divides
