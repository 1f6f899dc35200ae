"""A `Ref` is either the exact array that NumPy makes of the same steps, or it is refused: never a wrong view."""

import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

import jquant as jq
from jquant.core import kept
from jquant.core.formats import Format
from jquant.core.qtensor import QTensor
from jquant.trace import rearrange, view

CASTS = ("float32", "bfloat16", "float16")


def bits(x) -> tuple:
    return np.shape(x), str(np.asarray(x).dtype), np.asarray(x).tobytes()


@st.composite
def factorizations(draw, n: int) -> tuple[int, ...]:
    """Shapes of n elements, with axes of size 1 here and there."""
    sizes = []
    while n > 1:
        size = draw(st.sampled_from([d for d in range(2, n + 1) if n % d == 0]))
        sizes.append(size)
        n //= size
    for _ in range(draw(st.integers(0, 2))):
        sizes.insert(draw(st.integers(0, len(sizes))), 1)
    return tuple(sizes)


@st.composite
def steps(draw, shape: tuple[int, ...]):
    """One rearrangement that an array of `shape` may go through: the name of its primitive and its parameters."""
    ones = [i for i, s in enumerate(shape) if s == 1]
    kinds = ["transpose", "cast", "reshape", "broadcast_in_dim"] + ["squeeze"] * bool(ones) + ["slice"] * bool(shape)
    kind = draw(st.sampled_from(kinds))
    if kind == "transpose":
        return kind, tuple(draw(st.permutations(range(len(shape)))))
    if kind == "cast":
        return kind, draw(st.sampled_from(CASTS))
    if kind == "reshape":
        return kind, draw(factorizations(math.prod(shape)))
    if kind == "squeeze":
        return kind, tuple(draw(st.lists(st.sampled_from(ones), min_size=1, unique=True)))
    if kind == "broadcast_in_dim":
        at = draw(st.integers(0, len(shape)))
        return kind, (*shape[:at], 1, *shape[at:]), tuple(i + (i >= at) for i in range(len(shape)))
    dim = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, shape[dim] - 1))
    return kind, dim, start, draw(st.integers(1, shape[dim] - start))


def by_numpy(x: np.ndarray, step) -> np.ndarray:
    kind, *how = step
    if kind == "transpose":
        return x.transpose(how[0])
    if kind == "cast":
        return x.astype(jnp.dtype(how[0]))
    if kind in ("reshape", "broadcast_in_dim"):
        return x.reshape(how[0])
    if kind == "squeeze":
        return x.squeeze(how[0])
    dim, start, size = how
    return x[(*[slice(None)] * dim, slice(start, start + size))]


def by_view(ref: view.Ref, step) -> view.Ref | None:
    kind, *how = step
    run = lambda name, **params: rearrange.REARRANGE[name](ref, SimpleNamespace(params=params), [])
    if kind == "transpose":
        outs = run(kind, permutation=how[0])
    elif kind == "cast":
        outs = run("convert_element_type", new_dtype=jnp.dtype(how[0]))
    elif kind == "reshape":
        outs = run(kind, new_sizes=how[0], dimensions=None)
    elif kind == "squeeze":
        outs = run(kind, dimensions=how[0])
    elif kind == "broadcast_in_dim":
        outs = run(kind, shape=how[0], broadcast_dimensions=how[1])
    else:
        dim, start, size = how
        starts = [start if i == dim else 0 for i in range(len(ref.shape))]
        limits = [start + size if i == dim else s for i, s in enumerate(ref.shape)]
        outs = run(kind, start_indices=starts, limit_indices=limits, strides=None)
    return outs and outs[0]


SHAPES = [(), (1,), (6,), (4, 6), (1, 4), (4, 1, 6), (2, 3, 4), (1, 1), (2, 4, 3, 2)]


def quantized_leaf(shape: tuple[int, ...], contracted: tuple[int, ...]) -> tuple[QTensor, np.ndarray]:
    """An asymmetric int4 leaf in groups of 3 (which need not divide), and the array that it is, made by NumPy alone."""
    rng = np.random.default_rng([*shape, *[-a for a in contracted]])
    kept = [a for a in range(-len(shape), 0) if a not in contracted]
    rows_shape = (*[shape[a] for a in kept], n := math.prod(shape[a] for a in contracted))
    codes = rng.integers(0, 16, rows_shape).astype(np.uint8)
    groups = (*rows_shape[:-1], -(-n // 3))
    scale, zero = rng.integers(1, 9, groups).astype(np.float32) / 8, rng.integers(0, 16, groups).astype(np.uint8)
    spread = lambda a: np.repeat(a, 3, axis=-1)[..., :n].astype(np.float32)
    rows = (codes - spread(zero)) * spread(scale)
    order = [*kept, *contracted]
    w = rows.reshape([shape[a] for a in order]).transpose([order.index(a) for a in range(-len(shape), 0)])
    even = np.concatenate([codes, np.zeros((*codes.shape[:-1], n % 2), np.uint8)], -1)
    packed = even[..., ::2] | even[..., 1::2] << 4
    inner = tuple(shape[a] for a in contracted[1:])
    return QTensor((packed,), scale, zero, Format("int4", 3, symmetric=False), contracted, inner, n % 2, "float32"), w


@st.composite
def leaves(draw):
    """A leaf (float or quantized) and the array that it is."""
    shape = draw(st.sampled_from(SHAPES))
    axes = range(-len(shape), 0)
    contracted = draw(st.sampled_from([(), *itertools.combinations(axes, 1), *itertools.combinations(axes, 2)]))
    if contracted:
        return quantized_leaf(shape, contracted)
    w = np.random.default_rng(0).permutation(math.prod(shape)).reshape(shape).astype(np.float32) - 3
    return w, w


@st.composite
def chains(draw):
    """A leaf, the steps that it goes through as far as a view can say them, and the array after each."""
    leaf, array = draw(leaves())
    arrays, done, ref = [array], [], view.new_ref("w", leaf)
    shapes = jax.eval_shape(lambda x: x, leaf)
    for _ in range(draw(st.integers(0, 6))):
        step = draw(steps(arrays[-1].shape))
        new = jax.eval_shape(lambda leaf, done=done, step=step: by_view(chain(leaf, done), step), shapes)
        if new is None:
            event(f"{step[0]} refused")
            assert step[0] in ("reshape", "slice"), "the other rearrangements can always be expressed"
            break
        done, ref = [*done, step], new
        arrays.append(by_numpy(arrays[-1], step))
        assert ref.shape == arrays[-1].shape and ref.dtype == arrays[-1].dtype
    return leaf, done, ref, arrays[-1]


def chain(leaf, done) -> view.Ref:
    ref = view.new_ref("w", leaf)
    for step in done:
        ref = by_view(ref, step)
    return ref


@given(chains())
def test_a_view_is_what_numpy_makes(case):
    leaf, done, _, array = case
    assert bits(jax.jit(lambda leaf: chain(leaf, done).array())(leaf)) == bits(array)


@given(chains())
def test_a_stackable_view_is_a_stack_of_the_views_of_its_slices(case):
    leaf, done, ref, array = case
    if not ref.dims or not view.stackable(ref):
        event("not stackable")
        return
    event("stackable")

    @jax.jit
    def run(leaf):
        stack = view.to_stack(chain(leaf, done))
        slices = [jax.tree.map(lambda a, i=i: a[i], stack) for i in range(ref.shape[0])]
        return stack.array(), [view.from_stack(s, ref, by=0).array() for s in slices]

    whole, rows = run(leaf)
    assert bits(whole) == bits(array)
    assert [bits(r) for r in rows] == [bits(a) for a in array]
    first = jax.eval_shape(lambda: jax.tree.map(lambda a: a[0], view.to_stack(chain(leaf, done))))
    one = view.from_stack(first, ref, by=0)
    named = [view.full_axis(one, a) for a in range(-len(one.value.shape), 0)] + [index.axis for index in one.stack]
    assert sorted(named) == list(range(-np.ndim(jq.dequantize(leaf)), 0))


@given(st.data())
def test_slices_of_slices_remember_where_they_are_in_the_leaf(data):
    shape = (5, 4, 6)
    w = np.arange(120, dtype=np.float32).reshape(shape)
    ref, array = view.new_ref("w", kept.Later(shape, w.dtype)), w  # it only notes the cuts
    where = {-3: (0, 5), -2: (0, 4), -1: (0, 6)}
    for _ in range(data.draw(st.integers(1, 5))):
        if not array.ndim:
            break
        dim = data.draw(st.integers(0, array.ndim - 1))
        start = data.draw(st.integers(0, array.shape[dim] - 1))
        size = data.draw(st.integers(1, array.shape[dim] - start))
        if size == array.shape[dim]:
            continue
        axis = view.full_axis(ref, view.whole_axis(ref, dim))
        where[axis] = (where[axis][0] + start, size)
        ref = view.cut(ref, dim, start, size)
        array = array[(*[slice(None)] * dim, slice(start, start + size))]
        if size == 1:
            ref, array = ref.replace(dims=tuple(d for i, d in enumerate(ref.dims) if i != dim)), array.squeeze(dim)
    assert ref.shape == array.shape
    assert {i.axis: i.at for i in ref.stack} == {a: s for a, (s, n) in where.items() if n == 1}
    assert all(i.size == shape[i.axis] for i in ref.stack)
    shortened = {view.full_axis(ref, a) for a in ref.sliced}
    assert shortened == {a for a, (s, n) in where.items() if 1 < n < shape[a]}


@pytest.mark.parametrize("sizes", [(2, 12), (24,), (3, 8), (12, 2), (4, 3, 2)], ids=str)
def test_even_regroupings_are_never_refused(sizes):
    w = np.arange(24, dtype=np.float32).reshape(4, 6)
    ref = view.new_ref("w", w)
    if sizes == (3, 8):  # neither 3 in 4 nor 4 in 3
        assert view.reshape(ref, sizes) is None
    else:
        assert bits(view.reshape(ref, sizes).array()) == bits(w.reshape(sizes))


# --- products of views: any einsum of a leaf and an array ---


@st.composite
def einsums(draw):
    """Letters of the leaf's axes and of the other operand's, the output, and the sizes."""
    ndim = draw(st.integers(1, 4))
    sizes = {c: draw(st.sampled_from((1, 2, 3, 4))) for c in "abcdxy"}
    leaf = "abcd"[:ndim]
    roles = {c: draw(st.sampled_from(("contracted", "batch", "free"))) for c in leaf}
    shared = [c for c in leaf if roles[c] != "free"]
    other = draw(st.permutations([*shared, *"xy"[: draw(st.integers(0, 2))]]))
    out = draw(st.permutations([c for c in {*leaf, *other} if roles.get(c) != "contracted"]))
    contracted = tuple(i - ndim for i, c in enumerate(leaf) if roles[c] == "contracted")
    return leaf, "".join(other), "".join(out), sizes, contracted, draw(st.booleans())


@given(einsums())
def test_every_einsum_runs_on_the_codes_and_is_numpys(case):
    leaf, other, out, sizes, contracted, first = case
    shape = tuple(sizes[c] for c in leaf)
    q, w = quantized_leaf(shape, contracted or (-1,))
    x = np.random.default_rng(2).normal(size=[sizes[c] for c in other]).astype(np.float32)
    spec = f"{leaf},{other}->{out}" if first else f"{other},{leaf}->{out}"
    apply = lambda p, x: jnp.einsum(spec, *((p["w"], x) if first else (x, p["w"])))
    got = jax.jit(jq.quantized(apply))({"w": q}, x)
    want = np.einsum(spec, *((w, x) if first else (x, w)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    reads = jq.explain(apply, {"w": q}, x)
    if any(sizes[c] > 1 for c, a in zip(leaf, range(-len(leaf), 0)) if a in contracted):
        event("fused")
        assert [r.fused for r in reads] == [True]
