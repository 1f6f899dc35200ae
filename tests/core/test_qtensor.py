"""QTensor: what it says of itself, and that it stands for the same numbers whatever its axes."""

import copy
import itertools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core import packing
from jquant.core.errors import DamagedQTensorError, FormatError, JQuantError
from jquant.core.formats import Format, code_table, encode
from jquant.core.qtensor import (
    QTensor,
    dequantize,
    from_rows,
    is_qtensor,
    normalize_axes,
    to_rows,
    tree_nbytes,
)
from tests.core.cases import (
    CODINGS,
    FEW_FORMATS,
    any_bits,
    normal,
    params_of_elements,
    rtn,
    same_bits,
    same_tree,
)

SHAPES = [(5,), (3, 7), (2, 3, 5), (2, 3, 1, 4)]
AXES = [
    (shape, contracted)
    for shape in SHAPES
    for count in range(len(shape) + 1)
    for contracted in itertools.combinations(range(len(shape)), count)
]


@pytest.mark.parametrize(("shape", "contracted"), AXES, ids=str)
def test_rows_and_back(shape, contracted):
    w = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    rows = to_rows(jnp.asarray(w), contracted)
    kept = [a for a in range(len(shape)) if a not in contracted]
    want = np.moveaxis(w, contracted, range(len(kept), len(shape)))
    assert same_bits(rows, want.reshape([shape[a] for a in kept] + [-1]))
    axes = normalize_axes(contracted, len(shape))
    assert same_bits(from_rows(rows, axes, [shape[a] for a in axes]), w)


@pytest.mark.parametrize(("shape", "contracted"), AXES, ids=str)
def test_shape_and_size_whatever_the_axes(shape, contracted):
    fmt = Format("int3", 3, symmetric=False, scale_dtype="bfloat16")  # groups that divide few of these axes
    q = any_bits(fmt, shape, contracted)
    n = math.prod(shape[a] for a in contracted)
    kept = tuple(shape[a] for a in range(len(shape)) if a not in contracted)
    rows = math.prod(kept)
    assert (q.shape, q.ndim, q.size, q.dtype) == (shape, len(shape), math.prod(shape), jnp.float32)
    assert q.contracted == tuple(a - len(shape) for a in contracted) == tuple(sorted(q.contracted))
    assert q.row_length == n and q.contracted_shape == tuple(shape[a] for a in contracted)
    assert q.nbytes == rows * (packing.packed_nbytes(n, 3) + -(-n // 3) * (2 + 1))
    assert tree_nbytes({"a": q, "b": jnp.zeros(3)}) == q.nbytes + 12
    assert q.scale.shape == (*kept, -(-n // 3))


@pytest.mark.parametrize(
    ("shape", "contracted", "fmt"),
    [
        *[(*case, Format("int3", 4, False)) for case in AXES if len(case[0]) == 3],
        *[((2, 3, 5), (0, 2), fmt) for fmt in FEW_FORMATS],
    ],
    ids=str,
)
def test_dequantize_is_the_formula_of_the_format(shape, contracted, fmt):
    """(element - zero point) * scale, each block with its own, axes where they were. In NumPy, from the codes."""
    q = any_bits(fmt, shape, contracted)
    different = lambda a: (1 + jnp.arange(a.size).reshape(a.shape) / 8).astype(a.dtype)
    q = q.replace(scale=different(q.scale), outer=tuple(map(different, q.outer)))
    if fmt.zero_dtype != "uint8":
        q = q.replace(zero_point=different(q.zero_point))
    out, codes = jax.jit(lambda q: (q.dequantize(), q.unpacked()))(q)
    scale, zero = params_of_elements(q.params, fmt, codes.shape)
    rows = (code_table(fmt)[np.asarray(codes)] - zero) * scale
    kept = [a for a in range(len(shape)) if a not in contracted]
    whole = rows.reshape([shape[a] for a in (*kept, *contracted)])
    np.testing.assert_array_equal(out, np.moveaxis(whole, range(len(shape)), (*kept, *contracted)))


@pytest.mark.parametrize("fmt", CODINGS, ids=str)
def test_every_coding_in_groups_and_an_odd_length(fmt):
    fmt, n = fmt.replace(block=4), 13
    q = rtn(normal((n, 3)), fmt, (0,))
    codes = q.unpacked()
    assert codes.shape == (3, n)
    rows = to_rows(normal((n, 3)), (0,))
    assert same_bits(codes, encode(rows, q.params, fmt))
    assert q.shape == (n, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_the_weights_own(dtype):
    q = rtn(normal((4, 6), dtype=dtype), Format("int8"), (0,))
    assert q.dtype == jnp.dtype(dtype) and q.dequantize().dtype == jnp.dtype(dtype)
    assert q.dequantize("float32").dtype == jnp.float32
    assert same_bits(q.dequantize("float32").astype(dtype), q.dequantize())


def test_repr_says_what_it_is():
    q = rtn(normal((64, 6)), Format("int4", 32, scale_dtype="bfloat16"), (0,))
    assert repr(q) == "QTensor(int4-g32, float32[64, 6], contracted=(-2,), 216 bytes)"
    assert "None" in repr(jax.tree.map(lambda _: None, q))


def test_axes_named_twice():
    with pytest.raises(FormatError, match="twice"):
        normalize_axes((0, -2), 2)


# --- empty -----------------------------------------------------------------------------------------------------------


EMPTY = [((0,), (0,)), ((0, 3), (0,)), ((3, 0), (0,)), ((0, 3, 2), (0, 1)), ((0, 0), (0, 1)), ((2, 0, 3), (0, 2))]


@pytest.mark.parametrize(
    ("shape", "contracted", "fmt"),
    [*[(*case, Format("int3", 5, False)) for case in EMPTY], *[((0, 3), (0,), fmt) for fmt in FEW_FORMATS]],
    ids=str,
)
def test_arrays_without_elements(shape, contracted, fmt):
    q = rtn(jnp.zeros(shape, jnp.float32), fmt, contracted)
    assert q.shape == shape and q.size == 0
    assert same_bits(q.dequantize(), np.zeros(shape, np.float32))
    assert same_bits(jax.jit(lambda q: q.dequantize())(q), np.zeros(shape, np.float32))


def test_an_empty_inner_axis_would_forget_the_first_one():
    with pytest.raises(FormatError, match="without elements"):
        rtn(jnp.zeros((3, 0)), Format("int8"), (0, 1))


# --- read as an array ------------------------------------------------------------------------------------------------


def test_reads_as_the_array_it_stands_for():
    q, x = rtn(normal((8, 6)), Format("int4", 4), (0,)), normal((3, 8))
    w = q.dequantize()
    assert same_bits(jnp.asarray(q), w)
    assert same_bits(x @ q, x @ w)
    assert same_bits(jnp.einsum("bi,io->bo", x, q), jnp.einsum("bi,io->bo", x, w))
    # Compiled together with the decoding, the eight terms may be added in another order.
    bound = 2 * 8 * 2.0**-24 * (np.abs(x) @ np.abs(w))
    assert (np.abs(jax.jit(lambda x, q: x @ q)(x, q) - x @ w) <= bound).all()
    assert (
        same_bits(q[...], w)
        and same_bits(q[2:4, 0], w[2:4, 0])
        and same_bits(q[jnp.asarray([1, 1])], w[jnp.asarray([1, 1])])
    )
    assert len(list(q)) == 8


def test_reads_as_a_numpy_array():
    q = rtn(normal((8, 6)), Format("int4", 4), (0,))
    assert same_bits(np.asarray(q), q.dequantize())
    assert np.asarray(q, np.float64).dtype == np.float64


def test_dequantize_maps_over_a_tree():
    q = rtn(normal((8, 6)), Format("int4", 4), (0,))
    tree = dequantize({"a": [q, jnp.ones(2)], "b": None})
    assert same_tree(tree, {"a": [q.dequantize(), jnp.ones(2)], "b": None})


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FEW_FORMATS[1:3], ids=str)
def test_a_cast_mapped_over_its_arrays_is_caught(fmt):
    q = rtn(normal((8, 6)), fmt, (0,))
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), q)
    for read in (jnp.asarray, QTensor.dequantize, QTensor.rows, QTensor.unpacked, jax.jit(lambda q: q.dequantize())):
        with pytest.raises(DamagedQTensorError, match=r"cast was mapped.*is_leaf=jquant.is_qtensor.*QTensor.astype"):
            read(cast)
    assert issubclass(DamagedQTensorError, JQuantError) and issubclass(DamagedQTensorError, TypeError)
    right = jax.tree.map(lambda a: a.astype(jnp.bfloat16), {"q": q, "b": normal((2,))}, is_leaf=is_qtensor)
    assert right["q"].dtype == jnp.bfloat16 and same_bits(right["q"].dequantize(), q.dequantize(jnp.bfloat16))


def test_a_cast_of_the_floats_alone_is_caught():
    """The usual `x.astype(bf16) if floating` would round float32 scales and change every number a little."""
    q = rtn(normal((8, 6)), Format("int8"), (0,))
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a, q)
    with pytest.raises(DamagedQTensorError, match="scales of a QTensor .* are bfloat16, not float32"):
        cast.dequantize()


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.replace(codes=tuple(c[:, :-1] for c in q.codes)),
        lambda q: q.replace(codes=(q.codes[0][:2], q.codes[1])),
        lambda q: q.replace(scale=q.scale[:, :-1]),
        lambda q: q.replace(scale=q.scale[:, :1]),
        lambda q: q.replace(scale=q.scale[:3]),
        lambda q: q.replace(zero_point=q.zero_point[:, :-1]),
        lambda q: jax.tree.map(lambda a: a[..., :2], q),
    ],
)
def test_arrays_that_do_not_belong_together_are_caught(change):
    q = any_bits(Format("int3", 1, symmetric=False), (19, 6), (0,))
    with pytest.raises(DamagedQTensorError, match="do not belong together"):
        change(q).dequantize()


def test_astype_keeps_codes_and_refuses_integers():
    q = rtn(normal((8, 6)), Format("int4", 4), (0,))
    half = q.astype(jnp.bfloat16)
    assert half.dtype == jnp.bfloat16 and half.codes is q.codes and half.scale is q.scale
    with pytest.raises(DamagedQTensorError, match="dequantize it first"):
        q.astype(jnp.int8)


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FEW_FORMATS[2:4], ids=str)
@pytest.mark.parametrize("duplicate", [lambda q: pickle.loads(pickle.dumps(q)), copy.copy, copy.deepcopy])
def test_pickle_and_copy(fmt, duplicate):
    q = rtn(normal((9, 6), dtype="bfloat16"), fmt, (0,))
    again = duplicate(q)
    assert same_tree(again, q)
    assert same_bits(again.dequantize(), q.dequantize())


def test_an_abstract_one_pickles_too():
    q = jax.eval_shape(lambda: rtn(jnp.zeros((9, 6)), Format("int4", 4), (0,)))
    again = pickle.loads(pickle.dumps(q))
    assert again.shape == q.shape and again.nbytes == q.nbytes and jax.tree.structure(again) == jax.tree.structure(q)
