"""Statistics on a walk, stop by stop: those of `calibrate`, and what a fold makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.trace.observe import observe_rows
from jquant.trace.targets import plan_targets
from jquant.walk import observe, unit_axes
from tests.fold.models import BANK
from tests.fold.test_exact import folded
from tests.problems import weights


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", ["scanned", "experts", "fused", "gpt2_nnx"])
def test_each_unit_comes_once_with_what_calibrate_sees(name):
    """And not all at one stop: that is what keeps memory small."""
    model = BANK[name]
    sites = jq.find_sites(model.apply, model.params, *model.args)
    paths = [p for p, s in sites.by_path().items() if any(x.quantizable and x.kind != "lookup" for x in s)]
    targets = plan_targets(sites, model.params, jq.Recipe(dict.fromkeys(paths, jq.INT8)))
    axes = {p: (targets[p].contracted, targets[p].batch) for p in paths}
    batches = [model.args, jax.tree.map(lambda a: a[::-1], model.args)]
    met, calls = {}, []

    def take(found):
        calls.append(found)
        for path, units in found.items():
            for at, stats in units.items():
                assert (path, at) not in met
                met[path, at] = stats

    observe(model.apply, model.params, batches, axes, paths, frozenset({"gram", "absmax", "mean_abs"}), take)
    want = jq.calibrate(model.apply, model.params, batches, paths=paths)
    assert {p for p, _ in met} == set(paths) and len(calls) > 2
    for (path, at), stats in met.items():
        lead = axes[path][1]
        whole, index = want[path], tuple(dict(at).get(axis, slice(None)) for axis in lead)
        assert len(unit_axes(lead, at)) == stats.tokens.ndim
        mine = jax.tree.map(lambda a, index=index: a[index], whole)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), mine, stats)
    assert (name == "scanned") == any(at for _, at in met)


def test_peak_is_the_largest_of_tokens_of_one_size():
    """float64, with a batch axis; a token of zeros has none."""
    x = weights(0, 18, 6).reshape(2, 9, 6) * np.logspace(-3, 3, 9)[:, None]
    x[:, 4] = 0
    got = observe_rows(jnp.asarray(x, jnp.float32), frozenset({"peak"})).stats
    size = np.sqrt(np.mean(x**2, -1, keepdims=True))
    np.testing.assert_allclose(got.peak, np.max(np.abs(x) / np.where(size > 0, size, 1), axis=1), rtol=1e-6)
    assert got.absmax is None and got.gram is None
    parts = [observe_rows(jnp.asarray(p, jnp.float32), frozenset({"peak"})).stats for p in (x[:, :3], x[:, 3:])]
    np.testing.assert_allclose(jq.merge(*parts).peak, got.peak, rtol=1e-6)


NOTHING = pytest.mark.filterwarnings("ignore:smoothquant. nothing in front of up:jquant.core.errors.JQuantWarning")


def _scales(method, x):
    """What `down` is multiplied by in a model of two matrices."""
    params = {"up": weights(1, 5, 7).astype(np.float32), "down": weights(2, 7, 4).astype(np.float32)}
    apply = lambda p, x: x @ p["up"] @ p["down"]
    after = folded(method, apply, params, (x,))
    return np.asarray(after["down"], np.float64) / params["down"], params, x @ params["up"]


@NOTHING
@pytest.mark.parametrize("alike", [False, True])
def test_smoothquant_is_the_papers_formula(alike):
    x = weights(3, 20, 5).astype(np.float32)
    s, params, inputs = _scales(jq.smoothquant(0.6, everywhere=True, tokens_alike=alike), x)
    inputs = inputs / (np.sqrt(np.mean(inputs**2, -1, keepdims=True)) if alike else 1)
    want = np.abs(inputs).max(0) ** 0.6 / np.abs(params["down"]).max(1) ** 0.4
    np.testing.assert_allclose(s, np.broadcast_to(want[:, None], s.shape), rtol=1e-4)


@NOTHING
def test_a_massive_token_says_no_more_than_others_where_tokens_are_alike():
    x = weights(3, 20, 5).astype(np.float32)
    massive = x.copy()
    massive[3] *= 1000
    run = lambda x, alike: _scales(jq.smoothquant(0.6, everywhere=True, tokens_alike=alike), x)[0]
    np.testing.assert_allclose(run(x, True), run(massive, True), rtol=1e-4)
    ratio = run(massive, False) / run(x, False)  # by the paper's maximum it alone decides
    assert np.ptp(np.log(ratio[:, 0])) > 0.1


@NOTHING
def test_the_search_with_tokens_alike_never_ends_above_doing_nothing():
    """By its own estimate, which has it among what is tried: with weights that want no scale it does nothing."""
    x = np.eye(5, dtype=np.float32)
    params = {"up": np.eye(5, dtype=np.float32), "down": np.ones((5, 4), np.float32)}
    method = jq.smoothquant(None, everywhere=True, tokens_alike=True)
    after = folded(method, lambda p, x: x @ p["up"] @ p["down"], params, (x,))
    np.testing.assert_allclose(after["down"] / np.asarray(after["down"])[:1, :1], 1, rtol=1e-6)
