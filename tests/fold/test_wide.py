"""A program in float64: in numpy and in JAX, as a whole and in parts."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.fold import numbers, wide
from jquant.fold.program import apply_fold, edit, prove, read_program
from jquant.fold.rotate import begun, folds_of, start_matrix
from jquant.fold.wide import cut_leaf, run_wide
from jquant.trace import compat
from tests.fold.models import BANK, MODELS
from tests.fold.test_exact import job_of

X = np.linspace(0.3, 2.1, 24).reshape(2, 3, 4)
Y = np.cos(np.arange(24.0)).reshape(2, 3, 4)
N = np.arange(-12, 12, dtype=np.int32).reshape(2, 3, 4)
W = np.sin(np.arange(20.0)).reshape(4, 5)
AT = np.array([[3, 0], [1, 1]], np.int32)

# For each rule of the table a function whose jaxpr has that primitive, and what it takes.
CASES = {
    "add": (jnp.add, X, Y), "sub": (jnp.subtract, X, Y), "mul": (jnp.multiply, N, N), "max": (jnp.maximum, X, Y),
    "add_any": (lambda x, y: jax.vjp(lambda x: (x, x), x)[1]((x, y)), X, Y),
    "min": (jnp.minimum, N, N), "eq": (lambda x, y: x == y, N, N), "ne": (lambda x, y: x != y, X, Y),
    "lt": (lambda x, y: x < y, X, Y), "le": (lambda x, y: x <= y, N, N), "gt": (lambda x, y: x > y, X, Y),
    "ge": (lambda x, y: x >= y, X, Y), "and": (jnp.bitwise_and, N, N + 3), "or": (jnp.bitwise_or, X > 1, Y > 0),
    "neg": (jnp.negative, X), "abs": (jnp.abs, Y), "div": (jnp.divide, Y, X), "exp": (jnp.exp, Y), "log": (jnp.log, X),
    "sin": (jnp.sin, X), "cos": (jnp.cos, X), "tanh": (jnp.tanh, Y), "sqrt": (jnp.sqrt, X), "rsqrt": (jax.lax.rsqrt, X),
    "square": (jnp.square, Y), "logistic": (jax.nn.sigmoid, 99 * Y), "erf": (jax.lax.erf, Y),
    "integer_pow": (lambda x: jax.lax.integer_pow(x, -3), X),
    "convert_element_type": (lambda n: jax.lax.convert_element_type(n, jnp.float64), N),
    "broadcast_in_dim": (lambda x: jax.lax.broadcast_in_dim(x, (5, 2, 3, 7, 4), (1, 2, 4)), X),
    "reshape": (lambda x: jax.lax.reshape(x, (6, 4)), X), "transpose": (lambda x: jnp.transpose(x, (2, 0, 1)), X),
    "squeeze": (lambda x: jax.lax.squeeze(x[:1], (0,)), X), "expand_dims": (lambda x: jnp.expand_dims(x, 1), X),
    "concatenate": (lambda x, y: jnp.concatenate([x, y, x], 1), X, Y),
    "stack": (lambda x, y: jnp.stack([x, y], 1), X, Y), "tile": (lambda x: jnp.tile(x, (2, 1, 3)), X),
    "slice": (lambda x: jax.lax.slice(x, (0, 1, 0), (2, 3, 4), (1, 1, 3)), X),
    "select_n": (lambda x, y: jnp.where(x > 1, x, y), X, Y),
    "iota": (lambda x: x + jax.lax.broadcasted_iota(jnp.int32, (2, 3, 4), 1), N),
    "copy": (jnp.copy, X), "stop_gradient": (jax.lax.stop_gradient, X),
    "reduce_sum": (lambda x: jnp.sum(x, (0, 2)), X), "reduce_max": (lambda x: jnp.max(x, -1), X),
    "reduce_min": (lambda x: jnp.min(x), Y),
    "dot_general": (lambda x, y, w: (jnp.einsum("abc,cd->dab", x, w), jnp.einsum("abc,abd->acd", x, y)), X, Y, W),
    "gather": (lambda w, at: (jnp.take(w, at, axis=0, mode="clip"), jnp.take(w, at, axis=1, mode="clip")), W, AT),
}  # fmt: skip


def _primitives(jaxpr, found):
    for eqn in jaxpr.eqns:
        found.append(eqn)
        for inner in compat.sub_jaxprs(eqn):
            _primitives(inner, found)
    return found


def test_every_rule_has_a_case():
    assert set(CASES) == set(numbers.RULES)


@pytest.mark.parametrize("name", CASES)
def test_numpy_gives_what_jax_gives(name):
    """In float64, equation by equation, to a few units in the last place."""
    fn, *args = CASES[name]
    with jax.enable_x64(True):
        jaxpr, _ = compat.trace(fn, *args)
        env = dict(zip(jaxpr.invars, args, strict=True)) | dict(zip(jaxpr.constvars, jaxpr.consts, strict=True))
        ran = set()

        def run(jaxpr, env):
            for eqn in jaxpr.eqns:
                values = [np.asarray(v.val if compat.is_literal(v) else env[v]) for v in eqn.invars]
                rule = numbers.rule_of(eqn.primitive.name, values)
                want = compat.bind(eqn, *map(jnp.asarray, values))
                got = NotImplemented if rule is None else rule(eqn.params, *values)
                if got is not NotImplemented:
                    ran.add(eqn.primitive.name)
                    assert np.asarray(got).dtype == want[0].dtype and np.shape(got) == want[0].shape
                    np.testing.assert_allclose(got, want[0], rtol=1e-14, atol=1e-15)
                env.update(zip(eqn.outvars, want, strict=True))
                for inner in compat.sub_jaxprs(eqn):
                    run(inner, dict(zip(inner.invars, values, strict=False)))

        run(jaxpr, env)
    if name not in ("stop_gradient", "expand_dims", "copy"):  # which JAX may write in another way
        assert name in ran


def test_what_a_rule_does_not_know_is_left_to_jax():
    outside = np.array([[9]], np.int32)
    with jax.enable_x64(True):
        found = _primitives(compat.trace(lambda w: w[jnp.array([9])], W)[0], [])
        [eqn] = [e for e in found if e.primitive.name == "gather"]
        assert numbers.RULES["gather"](eqn.params, W, outside) is NotImplemented
    assert numbers.RULES["div"]({}, N, N) is NotImplemented  # JAX rounds towards zero


def _run(program, folds=()):
    leaf = lambda p, cuts: edit(folds, p, cut_leaf(program.leaves[p], cuts), cuts)
    return run_wide(program.small, leaf, program.arrays)


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_large_leaves_are_read_in_parts(model, monkeypatch):
    """The same outputs, rotated or not, and no more of a leaf at once than a part where it can be cut."""
    job = job_of(model.apply, model.params, model.args, {})
    matrix_of = lambda block: start_matrix(0, block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ready = begun(job, "rotate", matrix_of, True, True)
    folds = folds_of(ready, matrix_of)
    want = _run(ready.program), _run(ready.program, folds)
    monkeypatch.setattr(wide, "_LARGE", 40)
    monkeypatch.setattr(wide, "_PART", 30)
    for a, b in zip(want, (_run(ready.program), _run(ready.program, folds)), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12), a, b)


def test_parts_are_parts(monkeypatch):
    """A stack of layers is read a slice at a time, and each of those, by a lookup or a product, in parts."""
    model = BANK["scanned"]
    program, sizes = read_program(model.apply, model.params, model.args), {}
    monkeypatch.setattr(wide, "_LARGE", 40)
    monkeypatch.setattr(wide, "_PART", 60)

    def leaf(path, cuts):
        found = cut_leaf(program.leaves[path], cuts)
        sizes[path] = max(sizes.get(path, 0), found.size)
        return found

    run_wide(program.small, leaf, program.arrays)
    large = {p: v.shape for p, v in program.leaves.items() if v.size > 40}
    assert set(large) == {"embed", "layers/qkv", "layers/o", "layers/gate_up", "layers/down"}
    assert all(sizes[p] <= 60 + shape[-2 if p != "embed" else -1] for p, shape in large.items())


@pytest.mark.parametrize("name", ["fused", "scanned", "gpt2_nnx"])
@pytest.mark.standard_promotion
def test_a_proof_makes_what_is_applied(name):
    """Bit for bit, and nothing of it where something was refused."""
    model = BANK[name]
    job = job_of(model.apply, model.params, model.args, {})
    matrix_of = lambda block: start_matrix(0, block)
    ready = begun(job, "rotate", matrix_of, True, True)
    folds = folds_of(ready, matrix_of)
    assert ready.made
    plain, quick = (apply_fold(folds, ready.params, made) for made in ({}, ready.made))
    assert jax.tree.structure(plain) == jax.tree.structure(quick)
    assert all(map(np.array_equal, jax.tree.leaves(plain), jax.tree.leaves(quick)))
    assert not prove(ready.program, lambda items: folds, []).made


@pytest.mark.parametrize(
    "rows, n, columns", [(32, 576, 1537), (32, 1536, 100), (3, 5000, 50), (1, 7, 5), (400, 90, 80)]
)
def test_a_product_in_parts_is_the_product(rows, n, columns):
    """Few rows or many, a width that parts divide or not, a matrix as it lies or transposed."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(rows, n)), rng.normal(size=(n, columns))
    for right in (b, np.asfortranarray(b)):
        np.testing.assert_allclose(numbers._matmul(a, right), a @ b, rtol=0, atol=1e-13 * n)
