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


def side_of(own, kept=KEPT, n=N, rank=R, dtype="float32") -> Side:
    lead = [s if i in own else 1 for i, s in enumerate(kept)]
    return Side(normal((*kept, rank), 1, dtype), normal((*lead, rank, n), 2, dtype))


def with_side(fmt=FMT, own=(0,)):
    return rtn(normal((*KEPT, N)), fmt, (2,)).replace(side=side_of(own))


def dense(side: Side) -> np.ndarray:
    """S, float64."""
    left, right = (np.asarray(a.astype(jnp.float32), np.float64) for a in side)
    return np.einsum("...r,...rn->...n", left, np.broadcast_to(right, (*left.shape[:-1], *right.shape[-2:])))


@pytest.mark.parametrize(("own", "first"), CASES)
def test_rows_and_products(own, first):
    side = side_of(own)
    np.testing.assert_allclose(sides.rows(side), dense(side), rtol=1e-5, atol=1e-5)
    x = normal((*(KEPT[i] for i in first), 4, N), 3)
    lead = "".join("ab"[i] for i in first)
    want = np.einsum(f"{lead}tn,abn->{lead}t{''.join(c for c in 'ab' if c not in lead)}", x, dense(side))
    np.testing.assert_allclose(sides.product(x, side, first), want, rtol=1e-4, atol=1e-4)


def test_products_run_in_the_dtype_of_the_input_and_make_no_matrix():
    side = side_of((), (40,), 30, 2, "bfloat16")
    jaxpr = jax.make_jaxpr(lambda x: sides.product(x, side, ()))(jnp.ones((5, 30), jnp.bfloat16))
    text = str(jaxpr)
    assert "[40,30]" not in text and "[30,40]" not in text and text.count("dot_general[") == 2
    assert sides.product(jnp.ones((5, 30), jnp.bfloat16), side, ()).dtype == jnp.float32


@pytest.mark.parametrize("fmt", SPECIAL[:3] + [Format("int4", "tensor")], ids=str)
def test_is_added_to_what_the_codes_stand_for(fmt):
    q = with_side(fmt)
    want = np.asarray(q.replace(side=None).dequantize(), np.float64) + dense(q.side)
    np.testing.assert_allclose(q.check().dequantize(), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(q.untiled().dequantize(), want, rtol=1e-5, atol=1e-5)
    assert q.nbytes == q.replace(side=None).nbytes + 4 * (3 * 9 * R + 3 * R * N)
    assert "side of rank 2" in repr(q)
    assert same_tree(pickle.loads(pickle.dumps(q)), q)


@pytest.mark.parametrize("own", [(), (0,), (1,)])
@pytest.mark.parametrize("axis", [-3, -2])
def test_kept_axes_are_cut_moved_and_looked_up(own, axis):
    q, at = with_side(SPECIAL[1], own), jnp.asarray([2, 0, 2])

    def cuts(q):
        one = kept.remove_axis(kept.slice_axis(q, axis, 1, 1), axis)
        few = [kept.slice_axis(q, axis, 1, 2), kept.move_to_front(q, axis), one]
        return [*(p.check().dequantize() for p in few), kept.map_taken(lambda s: s.check().dequantize(), q, axis, at)]

    w = np.asarray(q.dequantize())
    front = np.moveaxis(w, axis, 0)
    for got, want in zip(quick(cuts)(q), [np.moveaxis(front[1:3], 0, axis), front, front[1], front[at]]):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_transforms_see_one_more_pair_of_arrays():
    q = with_side()
    w = np.asarray(q.dequantize())
    np.testing.assert_allclose(jax.vmap(lambda q: q.dequantize())(q), w, rtol=1e-5, atol=1e-5)
    scanned = jax.lax.scan(lambda _, q: (None, q.check().dequantize()), None, q)[1]
    np.testing.assert_allclose(scanned, w, rtol=1e-5, atol=1e-5)
    assert len(jax.tree.leaves(q)) == len(jax.tree.leaves(q.replace(side=None))) + 2
    same = jax.jit(lambda q: q)(q)
    assert same_tree(same, q) and same_bits(same.astype("bfloat16").dequantize(), q.dequantize().astype("bfloat16"))
    assert jq.core.qtensor.tree_nbytes(q) == q.nbytes


@pytest.mark.parametrize(
    "broken",
    [
        lambda s: s._replace(left=s.left[:, :4]), lambda s: s._replace(right=s.right[..., :5]),
        lambda s: s._replace(left=s.left[..., :1]), lambda s: s._replace(left=s.left.astype(jnp.int32)),
    ],
)  # fmt: skip
def test_what_does_not_belong_to_the_codes_is_caught(broken):
    q = with_side()
    with pytest.raises(DamagedQTensorError, match="its side"):
        q.replace(side=broken(q.side)).dequantize()
