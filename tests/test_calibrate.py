"""`calibrate`: the Gram matrices are those of a float64 NumPy forward pass, wherever the matmul stands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), b, rtol=5e-5, atol=1e-4)


def test_loops_and_slices_of_a_stack():
    """scan stacks, fori_loop by a traced index and w[2] add to the same stack; while_loop and reuse add up."""

    def model(p, x):
        w = p["w"]
        c, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)
        c = jax.lax.fori_loop(0, 4, lambda i, c: c @ w[i] * 0.1, c)
        c = jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["v"])), (0, c))[1]
        return c @ p["v"], c @ p["u"], c @ w[2]

    p = {"w": normal(0, 4, 8, 8), "v": normal(1, 8, 8), "u": normal(2, 8, 3)}
    batches = [normal(i, 2 + i % 2, 8) for i in range(3)]
    stats = jq.calibrate(model, p, iter(batches))

    w, v = np.asarray(p["w"], np.float64), np.asarray(p["v"], np.float64)
    gw, gv, gu, tokens = np.zeros((4, 8, 8)), np.zeros((8, 8)), np.zeros((8, 8)), np.zeros(4)
    for b in batches:
        c = np.asarray(b, np.float64)
        for i in range(8):
            gw[i % 4] += c.T @ c
            tokens[i % 4] += len(c)
            c = np.tanh(c @ w[i]) if i < 4 else c @ w[i - 4] * 0.1
        for _ in range(3):
            gv += c.T @ c
            c = np.tanh(c @ v)
        gv += c.T @ c
        gu += c.T @ c
        gw[2] += c.T @ c
        tokens[2] += len(c)
    close(stats["w"].gram, gw)
    close(stats["v"].gram, gv)
    close(stats["u"].gram, gu)
    close(stats["w"].tokens, tokens)
    assert stats["v"].tokens == 4 * sum(len(b) for b in batches)


def test_a_branch_that_is_not_taken_counts_nothing():
    def model(p, x, flag):
        return jax.lax.cond(flag, lambda x: x @ p["a"], lambda x: x @ p["b"], x)

    p = {"a": normal(0, 6, 6), "b": normal(1, 6, 6)}
    x = normal(2, 5, 6)
    stats = jq.calibrate(model, p, [(x, jnp.array(True)), (2 * x, jnp.array(True))])
    close(stats["a"].gram, 5 * np.asarray(x.T @ x))
    assert stats["a"].tokens == 10 and stats["b"].tokens == 0 and not np.any(stats["b"].gram)


def test_sites_that_read_one_array_share_one_gram_matrix_even_behind_casts():
    def model(p, x):
        q, k = x.astype(jnp.bfloat16) @ p["q"], x.astype(jnp.bfloat16) @ p["k"]
        return q + k, jnp.tanh(x).astype(jnp.bfloat16) @ p["v"]

    p = {n: normal(i, 6, 4).astype(jnp.bfloat16) for i, n in enumerate("qkv")}
    stats = jq.calibrate(model, p, [normal(4, 5, 6)])
    assert stats["q"] is stats["k"] and stats["q"].gram is not stats["v"].gram
    assert stats["q"].gram.dtype == jnp.float32


@pytest.mark.parametrize("strides, padding", [((1, 1), "SAME"), ((2, 1), "VALID")])
def test_convolution_gram_is_the_objective(strides, padding):
    """|conv(x, E)|^2 = tr(E H E^T) for any kernel E."""

    def model(p, x):
        return jax.lax.conv_general_dilated(x, p["k"], strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    error, x = normal(0, 3, 2, 4, 5), normal(1, 2, 6, 5, 4)
    gram = jq.calibrate(model, {"k": normal(2, 3, 2, 4, 5)}, [x])["k"].gram
    rows = np.asarray(error, np.float64).reshape(-1, 5).T
    close(np.sum(np.asarray(model({"k": error}, x), np.float64) ** 2), np.einsum("mi,ij,mj->", rows, gram, rows))


def test_experts_have_a_gram_matrix_each():
    def model(p, x, sizes):
        h = jax.lax.ragged_dot(x, p["ragged"], sizes)
        return jnp.einsum("td,edf->etf", x, p["dense"]), h

    p = {"ragged": normal(0, 3, 4, 4), "dense": normal(1, 2, 4, 5)}
    x = normal(2, 8, 4)
    stats = jq.calibrate(model, p, [(x, jnp.array([3, 0, 5]))])
    close(stats["ragged"].gram, [x[:3].T @ x[:3], np.zeros((4, 4)), x[3:].T @ x[3:]])
    assert stats["ragged"].tokens.tolist() == [3, 0, 5]
    close(stats["dense"].gram, x.T @ x)  # every expert sees every token: one matrix


def test_multi_axis_contraction_is_in_the_order_of_the_rows():
    def model(p, x):
        return jnp.einsum("bhd,hdf->bf", x, p["o"])

    o, x = normal(0, 2, 3, 5), normal(1, 7, 2, 3)
    gram = jq.calibrate(model, {"o": o}, [x])["o"].gram
    flat = np.asarray(x).reshape(7, 6)
    close(gram, flat.T @ flat)


def test_sums_over_batches_are_the_sums_of_the_parts():
    model, p = (lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]), {"a": normal(0, 4, 6), "b": normal(1, 6, 2)}
    one, two = normal(2, 5, 4), normal(3, 9, 4)
    both = jq.calibrate(model, p, [one, two])
    parts = [jq.calibrate(model, p, [x]) for x in (one, two)]
    for path in p:
        jax.tree.map(close, both[path], jq.merge(parts[0][path], parts[1][path]))
        close(both[path].absmax, np.maximum(parts[0][path].absmax, parts[1][path].absmax))


def test_the_quantized_model_can_be_observed():
    model, p = (lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]), {"a": normal(0, 8, 8), "b": normal(1, 8, 2)}
    x = normal(2, 5, 8)
    q = jq.quantize(model, p, {"a": jq.INT4, "b": None}, batches=[x])
    close(jq.calibrate(model, q, [x])["b"].gram, jq.calibrate(model, jq.dequantize(q), [x])["b"].gram)


def test_errors_name_the_leaf():
    model, p = (lambda p, x: jnp.log(x @ p["first"]) @ p["second"]), {"first": -jnp.eye(3), "second": jnp.eye(3)}
    with pytest.raises(jq.JQuantError, match="second: 3 channels of its input hold NaN"):
        jq.calibrate(model, p, [jnp.ones((2, 3)) + jnp.eye(3)[:2]])
    with pytest.raises(jq.JQuantError, match="no batches"):
        jq.calibrate(model, p, [])
    with pytest.raises(jq.JQuantError, match="nothing is read by no matmul"):
        jq.calibrate(model, p, [-jnp.ones((2, 3))], paths=["nothing"])
