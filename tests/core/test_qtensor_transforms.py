"""QTensor under every transformation of JAX: a pytree whose numbers never change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jquant.core.formats import Format
from jquant.core.qtensor import QTensor, is_qtensor, tree_nbytes
from tests.core.cases import FEW_FORMATS, normal, rtn, same_bits, same_tree

ONE, TWO = ((12, 6), (0,)), ((3, 6, 4), (0, 2))


def stack(q: list[QTensor]) -> QTensor:
    return jax.tree.map(lambda *a: jnp.stack(a), *q)


@pytest.mark.parametrize("fmt", FEW_FORMATS, ids=str)
@pytest.mark.parametrize(("shape", "contracted"), [ONE, TWO], ids=["matrix", "two axes"])
class TestEveryFormat:
    def test_flatten_and_unflatten(self, fmt, shape, contracted):
        q = rtn(normal(shape), fmt, contracted)
        leaves, treedef = jax.tree.flatten(q)
        assert all(isinstance(x, jax.Array) for x in leaves)
        assert same_tree(treedef.unflatten(leaves), q)
        assert same_tree(jax.tree.map(lambda x: x, q), q)

    def test_key_paths_name_its_arrays(self, fmt, shape, contracted):
        q = rtn(normal(shape), fmt, contracted)
        flat, treedef = jax.tree_util.tree_flatten_with_path({"w": q})
        names = [jax.tree_util.keystr(keys) for keys, _ in flat]
        planes = [f"['w'].codes[{i}]" for i in range(len(q.codes))]
        outer = [f"['w'].outer[{i}]" for i in range(len(q.outer))]
        assert names == [*planes, "['w'].scale", *(["['w'].zero_point"] if not fmt.symmetric else []), *outer]
        assert [x for _, x in flat] == jax.tree.leaves(q)
        assert treedef == jax.tree.structure({"w": q})
        assert names[0].endswith("codes[0]")  # first of the leaves: what reads shape and dtype off a leaf sees uint8

    def test_jit(self, fmt, shape, contracted):
        q = rtn(normal(shape), fmt, contracted)
        assert same_tree(jax.jit(lambda q: q)(q), q)
        assert same_bits(jax.jit(QTensor.dequantize)(q), q.dequantize())

    def test_eval_shape_knows_all_but_the_numbers(self, fmt, shape, contracted):
        q = rtn(normal(shape), fmt, contracted)
        abstract = jax.eval_shape(lambda: q)
        assert jax.tree.structure(abstract) == jax.tree.structure(q)
        same = [getattr(abstract, name) == getattr(q, name) for name in ("shape", "dtype", "size", "ndim", "nbytes")]
        assert all(same) and tree_nbytes(abstract) == tree_nbytes(q)
        assert jax.eval_shape(QTensor.dequantize, abstract).shape == shape
        assert repr(abstract) == repr(q)

    def test_vmap_over_a_leading_axis(self, fmt, shape, contracted):
        """A stack reads as the stack of its parts, and vmap sees the parts."""
        parts = [rtn(normal(shape, seed=i), fmt, contracted) for i in range(3)]
        q, want = stack(parts), jnp.stack([p.dequantize() for p in parts])
        assert q.shape == (3, *shape) and q.contracted == parts[0].contracted
        assert same_bits(q.dequantize(), want)
        assert same_bits(jax.vmap(QTensor.dequantize)(q), want)

        def inside(part):
            assert part.shape == shape
            return part.dequantize() * 2

        assert same_bits(jax.jit(jax.vmap(inside))(q), want * 2)
        out = jax.vmap(lambda w: rtn(w, fmt, tuple(a - len(shape) for a in contracted)))(want)
        assert out.shape == (3, *shape)

    def test_scan_over_a_leading_axis(self, fmt, shape, contracted):
        parts = [rtn(normal(shape, seed=i), fmt, contracted) for i in range(3)]

        def body(carry, part):
            assert part.shape == shape
            return carry + 1, part.dequantize()

        count, out = jax.jit(lambda q: jax.lax.scan(body, 0, q))(stack(parts))
        assert count == 3
        assert same_bits(out, jnp.stack([p.dequantize() for p in parts]))

    def test_indexing_a_leading_axis(self, fmt, shape, contracted):
        parts = [rtn(normal(shape, seed=i), fmt, contracted) for i in range(3)]
        assert same_tree(jax.tree.map(lambda a: a[1], stack(parts)), parts[1])


def test_carried_through_a_while_loop_and_a_cond():
    q = rtn(normal((12, 6)), FEW_FORMATS[2], (0,))
    out = jax.jit(lambda q: jax.lax.fori_loop(0, 3, lambda i, q: jax.lax.cond(i > 1, lambda q: q, lambda q: q, q), q))(
        q
    )
    assert same_tree(out, q)


def test_static_data_tells_formats_apart():
    """jit compiles again for another format: the treedef differs."""
    a, b = rtn(normal((12, 6)), Format("int8"), (0,)), rtn(normal((12, 6)), Format("int8", symmetric=False), (0,))
    assert jax.tree.structure(a) != jax.tree.structure(b)
    assert jax.tree.structure(a) == jax.tree.structure(rtn(normal((24, 5)), Format("int8"), (0,)))  # no absolute shape
    with pytest.raises(ValueError):
        jax.tree.map(lambda x, y: x, a, b)


def test_gradient_with_respect_to_the_other_operand():
    q, x = rtn(normal((12, 6)), FEW_FORMATS[1], (0,)), normal((2, 12))
    g = jax.grad(lambda x: (x @ q).sum())(x)
    np.testing.assert_array_equal(g, jax.grad(lambda x: (x @ q.dequantize()).sum())(x))


# --- sharded ---------------------------------------------------------------------------------------------------------


def place(q: QTensor, mesh, *spec) -> QTensor:
    """Puts every array under one spec, with axes of one element whole."""

    def put(a):
        parts = [None if a.shape[i] == 1 else s for i, s in enumerate(spec)]
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*parts)))

    return jax.tree.map(put, q)


# Rows that share a scale can't be cut by hand (`place`); `checkpoint.sharding` does it.
SHARDED = [f.replace(block=8) if f.group_size else f for f in FEW_FORMATS if not isinstance(f.outer_block, int)]


@pytest.fixture(scope="module")
def mesh():
    assert jax.device_count() >= 8
    return jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize("fmt", SHARDED, ids=str)
@pytest.mark.parametrize("spec", [("x", None), (None, "x")], ids=["kept", "contracted"])
def test_sharded_over_eight_devices(mesh, fmt, spec):
    """Codes and scales cut along a kept axis, or along the packed one (a multiple of 8 codes a device)."""
    q, x = rtn(normal((64, 16)), fmt, (0,)), normal((3, 64))
    sharded = place(q, mesh, *spec)
    assert all(len(c.sharding.device_set) == 8 and not c.sharding.is_fully_replicated for c in sharded.codes)
    assert sharded.shape == q.shape
    assert same_bits(sharded.dequantize(), q.dequantize())
    assert same_bits(jax.jit(QTensor.dequantize)(sharded), q.dequantize())
    want = x @ q.dequantize()
    # Cut along the contracted axis the sum is of eight parts: 64 terms, each rounded once on the way.
    bound = 64 * 2.0**-24 * (np.abs(x) @ np.abs(q.dequantize()))
    assert (np.abs(jax.jit(jnp.matmul)(x, jnp.asarray(sharded)) - want) <= bound).all()


@pytest.mark.parametrize("spec", [("x", None), (None, "x")], ids=["kept", "contracted"])
def test_shard_map_sees_a_part_that_is_a_qtensor(mesh, spec):
    fmt = Format("int4", 8, symmetric=False)
    q = rtn(normal((64, 16)), fmt, (0,))
    local = {"x": (64, 2), None: (8, 16)}[spec[0]]

    def body(part):
        assert part.shape == local and is_qtensor(part.check())
        return part.dequantize()

    specs = jax.tree.map(lambda _: PartitionSpec(*spec), q)
    run = jax.shard_map(body, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(*reversed(spec)))
    assert same_bits(run(q), q.dequantize())
