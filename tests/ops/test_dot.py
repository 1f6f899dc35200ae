"""Products with a QTensor: every implementation is the product with the decoded weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import ops
from jquant.core.formats import Format, compute_params
from jquant.core.qtensor import encode_array, to_rows
from jquant.ops.dot import DECODED, ONE_ROW, one_row, reads_one_row

N = 48
FORMATS = [
    Format(element, block, symmetric)
    for element in ("int4", "int8")
    for block in (16, 24, "channel", "tensor")
    for symmetric in (True, False)
]


def weight(fmt, *kept, dtype=jnp.float32):
    w = jax.random.normal(jax.random.key(0), (*kept, N)).astype(dtype)
    return encode_array(w, compute_params(to_rows(w, (-1,)), fmt), fmt, (-1,))


def exact(x, q):
    return np.tensordot(np.asarray(x, np.float64), np.asarray(q.rows(), np.float64), ((-1,), (-1,)))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("kept", [(5,), (2, 3)])
def test_one_row_is_the_product_with_the_decoded_weight(fmt, kept):
    q, x = weight(fmt, *kept), jax.random.normal(jax.random.key(1), (1, N))
    assert reads_one_row(x, q)
    size = np.abs(exact(jnp.abs(x), q.replace(scale=jnp.abs(q.scale)))).max() + 1
    np.testing.assert_allclose(one_row(x, q), exact(x, q), atol=256 * 2**-24 * size, rtol=0)
    out, name = ops.dot(x, q)
    assert name == ONE_ROW and out.dtype == jnp.float32
    np.testing.assert_allclose(out, exact(x, q), atol=256 * 2**-24 * size, rtol=0)


@pytest.mark.parametrize(
    "x, fmt",
    [
        (jnp.ones((2, N)), Format("int4", 16)),
        (jnp.ones((1, N)), Format("int3", 16)),
        (jnp.ones((1, N)), Format("nf4", 16)),
        (jnp.ones((1, N)), Format("int4", 7)),
        (jnp.ones((1, N)), Format("int4", 20)),
    ],
    ids=["two rows", "3 bits", "nf4", "odd group", "a last group that is shorter"],
)
def test_everything_else_is_decoded(x, fmt):
    q = weight(fmt, 5)
    out, name = ops.dot(x, q)
    assert name == DECODED
    np.testing.assert_allclose(out, exact(x, q), rtol=1e-5, atol=1e-5)


def test_experts():
    q = weight(Format("int4", 16), 3, 5)
    x = jax.random.normal(jax.random.key(1), (3, 1, N))
    out, name = ops.dot(x, q, batch=(-3,))
    want = np.einsum("btk,bnk->btn", np.asarray(x, np.float64), np.asarray(q.rows(), np.float64))
    assert name == DECODED
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_derivative_and_vmap_of_one_row():
    q, x = weight(Format("int4", 16), 5), jax.random.normal(jax.random.key(1), (7, 1, N))
    f = lambda x: ops.dot(x, q)[0]
    np.testing.assert_allclose(jax.vmap(f)(x)[:, 0], exact(x[:, 0], q), rtol=1e-5, atol=1e-5)
    cotangent = jax.random.normal(jax.random.key(2), (1, 5))
    (got,) = jax.vjp(f, x[0])[1](cotangent)
    want = np.asarray(cotangent, np.float64) @ np.asarray(q.rows(), np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_the_choice_is_made_for_the_platform_lowered_for(platform):
    q, x = weight(Format("int4", 16), 5), jnp.ones((1, N))
    text = jax.jit(lambda x, q: ops.dot(x, q)[0]).trace(x, q).lower(lowering_platforms=(platform,)).as_text()
    assert ("dot_general" in text) == (platform == "cuda")


def test_a_model_decoding_one_token_says_so():
    def model(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    p = {"a": jax.random.normal(jax.random.key(0), (N, 32)), "b": jax.random.normal(jax.random.key(1), (32, 3))}
    q = jq.quantize(model, p, jq.INT4_G32, batches=[jnp.ones((1, N))])
    assert [r.how for r in jq.explain(model, q, jnp.ones((1, N)))] == [DECODED, ONE_ROW]  # 48 is no multiple of 32
    x = jax.random.normal(jax.random.key(2), (1, N))
    np.testing.assert_allclose(jq.quantized(model)(q, x), model(jq.dequantize(q), x), rtol=2e-5, atol=2e-5)
