"""A line cut at its narrow places: the segments run what the function runs, and equal layers are one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core import kept
from jquant.models import build
from jquant.trace.execute import ExecuteReader
from jquant.trace.function import trace_call
from jquant.trace.line import Line
from jquant.trace.segments import cut_line, find_head
from tests.models.cases import CONFIGS, make_params, make_tokens

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)


def _cut(apply, params, args, headed=True):
    traced = trace_call(apply, params, args, {})
    line = Line(traced, inline=True, derivatives=True)
    root = line.outputs[0]
    head = find_head(line, root) if headed else None
    return traced, line, cut_line(line, root, head), head


def _run(traced, line, segments):
    env = {**dict(zip(line.arrays, traced.arrays)), **line.consts}
    leaves = dict(zip(traced.paths, traced.leaves))
    for s in segments:
        values = [kept.apply_cuts(kept.apply_cuts(leaves[o.unit.path], o.unit.cuts), o.cuts) for o in s.operands]
        env.update(zip(s.outputs, s.run([env[i] for i in s.inputs], values, ExecuteReader()), strict=True))
    return env[line.outputs[0]]


def _close(got, want):
    """To float32, of the largest: entries are sums of larger terms."""
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * float(np.abs(want).max()))


def _stream(layers, rule=lambda x: x):
    """Two products to a layer, the wider value between them."""

    def apply(p, x):
        for i in range(layers):
            x = x + rule(jnp.tanh(x @ p[f"{i}a"])) @ p[f"{i}b"]
        return (x @ p["head"]) * 2

    rng = np.random.default_rng(1)
    shapes = {"head": (8, 11)} | {f"{i}{n}": s for i in range(layers) for n, s in (("a", (8, 20)), ("b", (20, 8)))}
    return apply, {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def test_the_stream_alone_crosses():
    apply, params = _stream(4)
    traced, line, segments, head = _cut(apply, params, (X,))
    assert [[s.shape for s in g.inputs] for g in segments] == [[X.shape]] * 5
    assert [len(g.operands) for g in segments] == [2, 2, 2, 2, 1]
    assert len({g.key for g in segments}) == 2 and head.path == "head" and head.axis == 1
    _close(_run(traced, line, segments), apply(params, X))


@pytest.mark.parametrize("name", ["llama-tied-all-biases", "mistral"])
def test_segments_run_what_the_function_runs(name):
    config = CONFIGS[name]
    args = build(config), make_params(config), (make_tokens(config, 7),)
    traced, line, segments, _ = _cut(*args)
    _close(_run(traced, line, segments), args[0](args[1], *args[2]))
    widths = [sum(s.shape[-1:] == (config.hidden_size,) for s in g.inputs) for g in segments[1:]]
    assert widths == [1] * (2 * config.num_layers + 1) + [1] * (len(segments) - 2 - 2 * config.num_layers)


def test_a_scan_over_stacked_layers_is_cut_between_them():
    apply, params = _stream(1)
    stacked = {k: np.stack([v, 2 * v, 3 * v]) for k, v in params.items() if k != "head"} | {"head": params["head"]}

    def scanned(p, x):
        body = lambda x, w: (x + jnp.tanh(x @ w["0a"]) @ w["0b"], None)
        return jax.lax.scan(body, x, {k: p[k] for k in ("0a", "0b")})[0] @ p["head"]

    traced, line, segments, _ = _cut(scanned, stacked, (X,))
    assert len(segments) == 4 and len({g.key for g in segments}) == 2
    _close(_run(traced, line, segments), scanned(stacked, X))


@pytest.mark.parametrize("tail, found", [
    (lambda y, p: y, True), (lambda y, p: 30 * jnp.tanh(y.astype(jnp.float32) / 30), True),
    (lambda y, p: y - y.max(-1, keepdims=True), False), (lambda y, p: y.swapaxes(0, 1), False),
    (lambda y, p: y * p["head"][0], False),
])  # fmt: skip
def test_a_head_is_a_product_with_nothing_but_entrywise_operations_behind_it(tail, found):
    apply, params = _stream(1)
    traced, line, segments, head = _cut(lambda p, x: tail(apply(p, x), p), params, (X,))
    assert (head is not None) == found and len(segments) == 2
    _close(_run(traced, line, segments), tail(apply(params, X), params))


def _ruled(factor):
    @jax.custom_vjp
    def rule(x):
        return x

    rule.defvjp(lambda x: (x, None), lambda _, g: (factor * g,))
    return rule


def test_what_differs_in_its_derivative_alone_is_another_program():
    apply, params = _stream(1)
    keys = []
    for factor in (2.0, 2.0, 3.0):
        apply, params = _stream(1, _ruled(factor))
        keys.append(_cut(apply, params, (X,))[2][0].key)
    assert keys[0] == keys[1] != keys[2]
