"""What the trace asks of JAX's internals, the same on every version that we support."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.trace import compat
from tests.model_bank import params


def keys(fn, *args) -> list:
    jaxpr, _ = compat.trace(fn, *args)
    return [compat.eqn_key(e) for e in jaxpr.eqns if e.primitive.name not in ("mul", "sin")]


W = params(w=(4, 4))["w"]
X = np.ones((2, 4), np.float32)

LAYERS = {
    "dot": lambda x, w: x @ w,
    "jit": lambda x, w: jax.jit(lambda x: jnp.tanh(x @ w))(x),
    "silu": lambda x, w: jax.nn.silu(x),
    "custom_jvp": lambda x, w: jax.nn.relu(x),
    "scan": lambda x, w: jax.lax.scan(lambda c, _: (c @ w, c.sum()), x, None, length=2)[0],
    "cond": lambda x, w: jax.lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: x + 1, x),
    "remat": lambda x, w: jax.checkpoint(lambda x: jnp.cos(x @ w))(x),
    "constant": lambda x, w: jax.jit(lambda x: x * np.arange(4, dtype=np.float32))(x),
}


@pytest.mark.parametrize("name", LAYERS)
def test_two_equal_layers_have_equal_keys(name: str):
    # Built anew for each layer, as a model does: nothing is equal by being the same object.
    layer = LAYERS[name]
    found = keys(lambda x: functools.reduce(lambda x, _: layer(jnp.sin(x), W), range(2), x), X)
    assert len(found) >= 2 and len(found) % 2 == 0
    assert found[: len(found) // 2] == found[len(found) // 2 :]
    assert hash(tuple(found)) == hash(tuple(found))


DIFFERENT = {
    "constants": lambda c: jax.jit(lambda x: x * np.full(4, c, np.float32)),
    "nested_constants": lambda c: jax.jit(lambda x: jax.jit(lambda x: x * np.full(4, c, np.float32))(x) + 1),
    "literals": lambda c: jax.jit(lambda x: x * float(c)),
    "operands": lambda c: jax.jit(lambda x: (x - jnp.sin(x)) if c == 1 else (jnp.sin(x) - x)),
    "axes": lambda c: jax.jit(lambda x: x.sum(c - 1, keepdims=True)),
    "lengths": lambda c: lambda x: jax.lax.fori_loop(0, c, lambda i, c: c + 1, x),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_anywhere_inside_has_another_key(name: str):
    make = DIFFERENT[name]
    assert keys(make(1), X) == keys(make(1), X)
    assert keys(make(1), X) != keys(make(2), X)


def test_numbers_that_python_calls_equal_differ():
    assert len({compat.static_key(v) for v in (1, 1.0, True)}) == 3
    assert compat.static_key([1]) != compat.static_key((1,))


def test_a_scan_splits_into_the_parts_that_it_was_made_of():
    body = lambda w: lambda c, v: ((c[0] @ w + v.sum(), c[1] + 1), c[0])
    fn = lambda w, x: jax.lax.scan(body(w), (x, 0), jnp.ones((5, 3)), reverse=True)
    jaxpr, _ = compat.trace(fn, W, X)
    (eqn,) = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    parts = compat.scan_parts(eqn)
    assert (parts.num_consts, parts.num_carry, parts.length, parts.reverse) == (1, 2, 5, True)
    assert len(parts.body.invars) == 4 and len(parts.body.outvars) == 3


def test_binding_an_equation_again_gives_its_outputs():
    jaxpr, _ = compat.trace(lambda x: jax.nn.relu(jnp.sort(x)), X)
    env = dict(zip(jaxpr.invars, [-np.arange(8, dtype=np.float32).reshape(2, 4)]))
    for eqn in jaxpr.eqns:
        outs = compat.bind(eqn, *[v.val if compat.is_literal(v) else env[v] for v in eqn.invars])
        env.update(zip(eqn.outvars, outs))
    np.testing.assert_array_equal(env[jaxpr.outvars[0]], np.zeros((2, 4)))
