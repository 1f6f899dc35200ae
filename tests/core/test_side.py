"""Sides: what a QTensor with one stands for, and that every cut and every transform keeps it."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.core import kept
from jquant.core import side as sides
from jquant.core.errors import DamagedQTensorError
from jquant.core.format_type import Format
from jquant.core.side import Side
from tests.core.cases import SPECIAL, normal, rtn, same_bits, same_tree
from tests.model_bank import quick

KEPT, N, R = (3, 9), 12, 2
FMT = Format("int3", 5, False, "bfloat16")
CASES = [((), ()), ((0,), ()), ((0,), (0,)), ((0, 1), (0,)), ((), (0,)), ((0,), (1,)), ((), (0, 1))]


def side_of(own, kept=KEPT, n=N, rank=R, dtype="float32", takes=False) -> Side:
    lead = [s if i in own else 1 for i, s in enumerate(kept)]
    taken = normal((*lead, rank, n), 4, dtype) if takes else None
    return Side(normal((*kept, rank), 1, dtype), normal((*lead, rank, n), 2, dtype), taken)


def with_side(fmt=FMT, own=(0,), takes=False):
    return rtn(normal((*KEPT, N)), fmt, (2,)).replace(side=side_of(own, takes=takes))


def wide(factor, kept=KEPT) -> np.ndarray:
    """B or C for every row, float64."""
    factor = np.asarray(factor.astype(jnp.float32), np.float64)
    return np.broadcast_to(factor, (*kept, *factor.shape[-2:]))


def dense(side: Side, codes=0.0) -> np.ndarray:
    """What codes that stand for Q and the side stand for: Q + A B, or Q + (A - Q C^T) B; float64."""
    left, right = np.asarray(side.left.astype(jnp.float32), np.float64), wide(side.right)
    if side.taken is not None:
        left = left - np.einsum("...n,...rn->...r", np.asarray(codes, np.float64), wide(side.taken))
    return codes + np.einsum("...r,...rn->...n", left, right)


def product(x, side, first):
    return sides.spread(sides.thin(x, side, first), side, first)


@pytest.mark.parametrize(("own", "first"), CASES)
def test_rows_and_products(own, first):
    side = side_of(own)
    zero = jnp.zeros((*KEPT, N))
    np.testing.assert_allclose(sides.rows(side, zero), dense(side), rtol=1e-5, atol=1e-5)
    x = normal((*(KEPT[i] for i in first), 4, N), 3)
    lead = "".join("ab"[i] for i in first)
    want = np.einsum(f"{lead}tn,abn->{lead}t{''.join(c for c in 'ab' if c not in lead)}", x, dense(side))
    np.testing.assert_allclose(product(x, side, first), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("own", "first"), CASES)
def test_what_is_taken_out_of_the_input_comes_back_beside_the_codes(own, first):
    """x' Q^T + t A^T = x (Q + (A - Q C^T) B)^T, where the input has the axes that B differs along."""
    side, codes = side_of(own, takes=True), normal((*KEPT, N), 5)
    np.testing.assert_allclose(sides.rows(side, codes), dense(side, codes), rtol=1e-4, atol=1e-4)
    assert sides.can_take(side, first) == (set(own) <= set(first))
    if not sides.can_take(side, first):
        return
    x, lead = normal((*(KEPT[i] for i in first), 4, N), 3), "".join("ab"[i] for i in first)
    terms = f"{lead}tn,abn->{lead}t{''.join(c for c in 'ab' if c not in lead)}"
    t = sides.thin(x, side, first)
    got = np.einsum(terms, sides.taken_out(x, t, side, first), codes) + sides.spread(t, side, first)
    want = np.einsum(terms, np.asarray(x, np.float64), dense(side, codes))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("takes", [False, True])
def test_products_run_in_the_dtype_of_the_input_and_make_no_matrix(takes):
    side = side_of((), (40,), 30, 2, "bfloat16", takes)

    def run(x):
        return product(x, side, ()), sides.taken_out(x, sides.thin(x, side, ()), side, ()) if takes else x

    x = jnp.ones((5, 30), jnp.bfloat16)
    text = str(jax.make_jaxpr(run)(x))
    assert "[40,30]" not in text and "[30,40]" not in text and text.count("dot_general[") == (4 if takes else 2)
    out, rest = run(x)
    assert out.dtype == jnp.float32 and rest.dtype == jnp.bfloat16


@pytest.mark.parametrize("takes", [False, True])
@pytest.mark.parametrize("fmt", SPECIAL[:3] + [Format("int4", "tensor")], ids=str)
def test_is_added_to_what_the_codes_stand_for(fmt, takes):
    q = with_side(fmt, takes=takes)
    want = dense(q.side, np.asarray(q.replace(side=None).dequantize(), np.float64))
    np.testing.assert_allclose(q.check().dequantize(), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(q.untiled().dequantize(), want, rtol=1e-4, atol=1e-4)
    assert q.nbytes == q.replace(side=None).nbytes + 4 * (3 * 9 * R + (1 + takes) * 3 * R * N)
    assert "side of rank 2" in repr(q) and ("taken out of the input" in repr(q)) == takes
    assert same_tree(pickle.loads(pickle.dumps(q)), q)


@pytest.mark.parametrize("takes", [False, True])
@pytest.mark.parametrize("own", [(), (0,), (1,)])
@pytest.mark.parametrize("axis", [-3, -2])
def test_kept_axes_are_cut_moved_and_looked_up(own, axis, takes):
    q, at = with_side(SPECIAL[1], own, takes), jnp.asarray([2, 0, 2])

    def cuts(q):
        one = kept.remove_axis(kept.slice_axis(q, axis, 1, 1), axis)
        few = [kept.slice_axis(q, axis, 1, 2), kept.move_to_front(q, axis), one]
        return [*(p.check().dequantize() for p in few), kept.map_taken(lambda s: s.check().dequantize(), q, axis, at)]

    w = np.asarray(q.dequantize())
    front = np.moveaxis(w, axis, 0)
    for got, want in zip(quick(cuts)(q), [np.moveaxis(front[1:3], 0, axis), front, front[1], front[at]]):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("takes", [False, True])
def test_transforms_see_its_factors_as_more_arrays(takes):
    q = with_side(takes=takes)
    w = np.asarray(q.dequantize())
    np.testing.assert_allclose(jax.vmap(lambda q: q.dequantize())(q), w, rtol=1e-4, atol=1e-5)
    scanned = jax.lax.scan(lambda _, q: (None, q.check().dequantize()), None, q)[1]
    np.testing.assert_allclose(scanned, w, rtol=1e-4, atol=1e-5)
    assert len(jax.tree.leaves(q)) == len(jax.tree.leaves(q.replace(side=None))) + 2 + takes
    same = jax.jit(lambda q: q)(q)
    assert same_tree(same, q) and same_bits(same.astype("bfloat16").dequantize(), q.dequantize().astype("bfloat16"))
    assert jq.core.qtensor.tree_nbytes(q) == q.nbytes


@pytest.mark.parametrize(
    "broken",
    [
        lambda s: s._replace(left=s.left[:, :4]), lambda s: s._replace(right=s.right[..., :5]),
        lambda s: s._replace(left=s.left[..., :1]), lambda s: s._replace(left=s.left.astype(jnp.int32)),
        lambda s: s._replace(taken=s.right[..., :5]), lambda s: s._replace(taken=s.right.astype(jnp.int32)),
    ],
)  # fmt: skip
def test_what_does_not_belong_to_the_codes_is_caught(broken):
    q = with_side()
    with pytest.raises(DamagedQTensorError, match="its side|what its side takes"):
        q.replace(side=broken(q.side)).dequantize()
