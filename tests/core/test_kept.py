"""Cutting kept axes: what is cut stands for the cut of what the whole stands for, whatever the format shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jquant.checkpoint.sharding import qtensor_sharding
from jquant.core import kept
from jquant.core.errors import DamagedQTensorError
from jquant.core.format_type import Format, fitted
from jquant.core.qtensor import QTensor
from tests.core.cases import SPECIAL, normal, rtn, same_bits, same_tree

FORMATS = [*SPECIAL, Format("int3", 5, False, "bfloat16")]


@pytest.fixture(params=FORMATS, ids=str)
def q(request):
    return rtn(normal((3, 9, 12)), request.param, (2,))  # kept axes -3 and -2, tiles along -2


@pytest.mark.parametrize(("axis", "start", "size"), [(-3, 1, 2), (-2, 0, 4), (-2, 3, 5), (-2, 8, 1)])
def test_slices(q, axis, start, size):
    want = jax.lax.slice_in_dim(q.dequantize(), start, start + size, axis=axis)
    assert same_bits(kept.slice_axis(q, axis, start, size).dequantize(), want)
    traced = jax.jit(lambda q, i: kept.slice_axis(q, axis, i, size).dequantize())(q, start)
    assert same_bits(traced, want)


@pytest.mark.parametrize("axis", [-3, -2])
def test_lookups_and_moves(q, axis):
    w, at = q.dequantize(), jnp.asarray([0, 2, 2, 1])
    assert same_bits(kept.map_taken(QTensor.dequantize, q, axis, at), jnp.moveaxis(w, axis, 0)[at])
    assert same_bits(kept.move_to_front(q, axis).dequantize(), jnp.moveaxis(w, axis, 0))
    one = kept.remove_axis(kept.slice_axis(q, axis, 1, 1), axis)
    assert same_bits(one.dequantize(), jnp.take(w, 1, axis))


def test_untiled_stands_for_the_same_numbers(q):
    single = q.untiled().check()
    assert same_bits(single.dequantize(), q.dequantize())
    assert single.format.tile_rows == 1 and not single.shares_rows
    assert same_tree(single.untiled(), single)
    assert (single is q) == (not q.shares_rows)


def test_tiles_that_are_cut_by_hand_are_caught():
    q = rtn(normal((9, 12)), Format("int4", (4, 3)), (1,))
    with pytest.raises(DamagedQTensorError, match="do not belong together"):
        q.replace(scale=q.scale[:2]).dequantize()
    with pytest.raises(DamagedQTensorError, match="do not belong together"):
        q.replace(outer=(q.scale,)).dequantize()
    part = jax.tree.map(lambda a: a[:1] if a.shape[0] == 3 else a[:4], q)  # at the end of a tile
    assert same_bits(part.dequantize(), q.dequantize()[:4])


def test_shards_lie_along_tiles_where_devices_divide_them():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    for rows, cut in ((16, True), (12, False)):
        q = rtn(normal((16 * 8, 6)), Format("int4", (rows, 3), False), (1,))
        where = qtensor_sharding(q, NamedSharding(mesh, PartitionSpec("x")))
        assert (where.scale.spec[0] == "x") == cut and where.codes[0].spec[0] == "x"
        placed = jax.device_put(q, where)
        assert same_bits(jax.jit(lambda q: q.dequantize())(placed), q.dequantize())
        if cut:
            specs = jax.tree.map(lambda s: s.spec, where)
            run = lambda part: part.check().dequantize()
            out = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec("x"))(placed)
            assert same_bits(out, q.dequantize())


@pytest.mark.parametrize(
    ("shape", "contracted", "batch", "rows"),
    [
        ((64, 300), (-2,), (), 128),  # a matrix: tiles of 128, the last one smaller
        ((64, 4, 96), (-3,), (), 96),  # heads of 96 channels: no tile crosses two
        ((64, 4, 192), (-3,), (), 96),  # of 192: the largest divisor
        ((8, 64, 300), (-2,), (-3,), 128),  # experts in front
        ((64, 300, 8), (-3,), (-1,), 1),  # experts behind: rows share nothing
        ((64, 4, 127), (-3,), (), 127),
        ((64,), (-1,), (), 1),
    ],
)
def test_tiles_fit_the_axes(shape, contracted, batch, rows):
    fmt = fitted(Format("fp8_e4m3", (128, 128)), shape, contracted, batch)
    assert (fmt.tile_rows, fmt.group_size) == (rows, 128)


def test_second_levels_fit_the_axes():
    fmt = Format("nf4", 16, scale_dtype="uint8", outer_block=256)
    assert fitted(fmt, (64, 300), (-2,), ()) == fmt
    assert fitted(fmt, (64, 4, 96), (-3,), ()).outer_block == "channel"
    assert fitted(fmt, (16 * 256, 4, 96), (-3,), ()) == fmt  # 256 scales in a row: no rows share one
    nv = Format("fp4_e2m1", 16, scale_dtype="float8_e4m3fn", outer_block="tensor")
    assert fitted(nv, (64, 300, 8), (-3,), (-1,)) == nv


def test_one_dimension_has_no_rows_to_share():
    for fmt in FORMATS:
        q = rtn(normal((13,)), fmt, (0,))
        assert q.shape == (13,) and not q.shares_rows and np.isfinite(q.dequantize()).all()
