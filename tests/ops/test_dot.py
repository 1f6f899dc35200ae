"""Products with a QTensor: every implementation is the product with the decoded weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jquant as jq
from jquant import ops
from jquant.core.formats import Format, compute_params
from jquant.core.qtensor import encode_array, to_rows
from jquant.ops import cpu
from jquant.ops.dot import BLOCKS, DECODED

N = 48
FORMATS = [
    "int4-g16", "int4-g24-asym", "int4", "int4-tensor-asym", "int8-g16-asym", "int8", "int3-g16", "int2-g8-asym",
    "int5-g7", "int4-g7", "int4-g20", "nf4-g16", "nf4-dq", "fp8_e4m3", "fp8_e5m2-g16", "mxfp4", "nvfp4",
    "fp8_e4m3-2x16",
]  # fmt: skip


def weight(fmt, *kept, dtype=jnp.float32, n=N, seed=0):
    w = jax.random.normal(jax.random.key(seed), (*kept, n)).astype(dtype)
    return encode_array(w, compute_params(to_rows(w, (-1,)), fmt), fmt, (-1,))


def exact(x, q):
    return np.tensordot(np.asarray(x, np.float64), np.asarray(q.rows(), np.float64), ((-1,), (-1,)))


def close(got, x, q, want=None):
    """To the rounding of float32 sums of terms no larger than the product of the sizes."""
    size = np.abs(exact(jnp.abs(x.astype(jnp.float32)), q)).max() + np.abs(np.asarray(q.rows())).max() * 10
    np.testing.assert_allclose(got, exact(x, q) if want is None else want, atol=256 * 2**-24 * size, rtol=0)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("tokens, kept", [(1, (5,)), (3, (2, 3))])
def test_dot_is_the_product_with_the_decoded_weight(text, tokens, kept):
    q, x = weight(jq.parse_format(text), *kept), jax.random.normal(jax.random.key(1), (tokens, N))
    out, how = ops.dot(x, q)
    assert how.text.startswith(BLOCKS) and out.dtype == jnp.float32
    close(out, x, q)


@pytest.mark.parametrize("text", ["int4-g16-asym", "int3-g16", "nf4-g7"])
@pytest.mark.parametrize("rows", [8, 31, 32, 41])  # one block; the same; four blocks; and a shorter one behind them
def test_blocks_change_nothing(monkeypatch, text, rows):
    q, x = weight(jq.parse_format(text), rows), jax.random.normal(jax.random.key(1), (2, N))
    whole = cpu.dot(x, q)
    monkeypatch.setattr(cpu, "_BLOCK", 8 * N)
    assert ("while" in jax.jit(cpu.dot).lower(x, q).as_text()) == (rows >= 16)
    np.testing.assert_allclose(cpu.dot(x, q), whole, rtol=1e-6, atol=1e-5)
    close(whole, x, q)


@given(
    text=st.sampled_from(["int2", "int3", "int4", "int5", "int6", "int7", "int8", "nf4", "fp6_e2m3"]),
    group=st.sampled_from(["", "-g2", "-g4", "-g8", "-g6", "-g16"]), n=st.integers(1, 40), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=10)
def test_the_parts_of_a_row_are_its_codes(text, group, n, seed):
    fmt = jq.parse_format(text + group)
    q = weight(fmt, 3, n=n, seed=seed)
    parts = cpu.decoded(q.codes, *q.row_params(), fmt, n)
    assert len(parts) == cpu.codes_apart(fmt, n)
    for p, part in enumerate(parts):
        np.testing.assert_array_equal(part, q.rows()[:, p :: len(parts)])


def test_what_has_no_elements():
    q = weight(Format("int4"), 0)
    assert ops.dot(jnp.ones((2, N)), q)[0].shape == (2, 0)
    out, how = ops.dot(jnp.ones((0, N)), weight(Format("int4"), 5))
    assert out.shape == (0, 5) and how.text == DECODED


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_bfloat16(tokens, preferred):
    q, x = weight(Format("int4", 16), 5).astype(jnp.bfloat16), jnp.ones((tokens, N), jnp.bfloat16) / 3
    out, _ = ops.dot(x, q, cast=lambda w: w.astype(jnp.bfloat16), preferred=preferred)
    assert out.dtype == (preferred or jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact(x, q), rtol=0.02, atol=0.02)


def test_float64():
    with jax.enable_x64(True):
        q, x = weight(Format("int8"), 5), jnp.asarray(np.random.default_rng(0).normal(size=(2, N)))
        out, _ = ops.dot(x, q.astype(jnp.float64))
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, exact(x, q), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("tokens", [1, 2])
def test_experts(tokens):
    q = weight(Format("int4", 16), 3, 5)
    x = jax.random.normal(jax.random.key(1), (3, tokens, N))
    out, how = ops.dot(x, q, batch=(-3,))
    want = np.einsum("btk,bnk->btn", np.asarray(x, np.float64), np.asarray(q.rows(), np.float64))
    assert how.text.startswith(BLOCKS)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_derivative_and_vmap(monkeypatch):
    monkeypatch.setattr(cpu, "_BLOCK", 8 * N)
    q, x = weight(Format("int4", 16), 21), jax.random.normal(jax.random.key(1), (7, 1, N))
    f = lambda x: ops.dot(x, q)[0]
    np.testing.assert_allclose(jax.vmap(f)(x)[:, 0], exact(x[:, 0], q), rtol=1e-5, atol=2e-5)
    cotangent = jax.random.normal(jax.random.key(2), (1, 21))
    (got,) = jax.vjp(f, x[0])[1](cotangent)
    want = np.asarray(cotangent, np.float64) @ np.asarray(q.rows(), np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_derivative_keeps_no_decoded_weight():
    """What goes from the product to its derivative is codes and scales: less than the float weight."""
    q, x = weight(Format("int4", 16), 64), jnp.ones((1, N))
    _, back = jax.vjp(jax.jit(lambda x: ops.dot(x, q)[0]), x)
    assert sum(a.nbytes for a in jax.tree.leaves(back)) < q.size * 2


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_the_choice_is_made_for_the_platform_lowered_for(monkeypatch, platform):
    monkeypatch.setattr(cpu, "_BLOCK", 8 * N)
    q, x = weight(Format("int4", 16), 50), jnp.ones((1, N))
    text = jax.jit(lambda x, q: ops.dot(x, q)[0]).trace(x, q).lower(lowering_platforms=(platform,)).as_text()
    assert ("while" in text) == (platform == "cpu")


def test_a_model_decoding_one_token_says_so():
    def model(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    p = {"a": jax.random.normal(jax.random.key(0), (N, 32)), "b": jax.random.normal(jax.random.key(1), (32, 3))}
    q = jq.quantize(model, p, jq.INT4_G32, batches=[jnp.ones((1, N))])
    [first, second] = [r.how for r in jq.explain(model, q, jnp.ones((1, N)))]
    assert first == f"{BLOCKS}; on an NVIDIA GPU by a kernel that reads codes; elsewhere {DECODED}"
    assert second.startswith(BLOCKS)
    x = jax.random.normal(jax.random.key(2), (1, N))
    np.testing.assert_allclose(jq.quantized(model)(q, x), model(jq.dequantize(q), x), rtol=2e-5, atol=2e-5)
