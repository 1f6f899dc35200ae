"""Checkpoints onto devices: the sharding of the logical array, mapped to the arrays of a QTensor. Orbax alone."""

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jquant.checkpoint import load, qtensor_sharding, save
from jquant.core.errors import CheckpointError
from jquant.core.formats import Format
from jquant.core.qtensor import is_qtensor
from tests.checkpoint.cases import small_tree
from tests.core.cases import FEW_FORMATS, normal, rtn, same_bits, same_tree


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def specs(q):
    """The spec of each array, without trailing None."""

    def one(a):
        parts = list(a.sharding.spec)
        while parts and parts[-1] is None:
            parts.pop()
        return tuple(parts)

    out = jax.tree.map(one, q)
    return [*out.codes, out.scale, *([out.zero_point] if q.zero_point is not None else [])]


CASES = [
    # shape, contracted, format, spec of the logical array, spec of codes, spec of scale
    ((64, 16), (0,), Format("int8"), P(None, "model"), ("model",), ("model",)),
    ((64, 16), (0,), Format("int8"), P("data"), (None, "data"), ()),  # one scale a channel: nothing to cut
    ((64, 16), (0,), Format("int4", 16), P("data", "model"), ("model", "data"), ("model", "data")),
    ((64, 16), (0,), Format("int4", 32), P("data", "model"), ("model", "data"), ("model",)),  # two blocks, four devices
    (
        (64, 16),
        (0,),
        Format("int4", 32),
        P(
            ("model", "data"),
        ),
        (None, ("model", "data")),
        (None, "model"),
    ),
    ((20, 16), (0,), Format("int4", 4), P("data"), (), ()),  # 10 bytes, 5 blocks: replicated
    ((16, 64), (1,), Format("int3", 16, False), P("data", "model"), ("data", "model"), ("data", "model")),
    ((8, 4, 16), (0, 1), Format("int4", 4), P("data", "model"), (None, ("data", "model")), (None, ("data", "model"))),
    ((8, 64, 16), (1,), Format("int4", 16), P("data", None, "model"), ("data", "model"), ("data", "model")),
    ((64, 16), (0,), Format("int4", "tensor"), P("data", "model"), ("model", "data"), ()),
    ((64, 16), (0,), Format("int4", 16), P(), (), ()),
]


@pytest.mark.parametrize(("shape", "contracted", "fmt", "spec", "codes", "scale"), CASES, ids=str)
def test_logical_specs_are_mapped_to_the_arrays(tmp_path, mesh, shape, contracted, fmt, spec, codes, scale):
    q = rtn(normal(shape), fmt, contracted)
    save(tmp_path / "c", {"w": q})
    out = load(tmp_path / "c", NamedSharding(mesh, spec))["w"]
    assert same_tree(out, q)
    want = [*[codes] * len(q.codes), scale, *([scale] if q.zero_point is not None else [])]
    assert specs(out) == want
    placed = jax.device_put(q, qtensor_sharding(q, NamedSharding(mesh, spec)))
    assert same_tree(placed, q) and specs(placed) == want
    assert same_bits(jax.jit(lambda q: q.dequantize())(out), q.dequantize())


def test_planes_are_cut_together_or_not_at_all(mesh):
    """int3 has planes of 2 and 1 bits: 16 codes are 4 and 2 bytes. Four devices would divide only one of them."""
    q = rtn(normal((16, 2)), Format("int3"), (0,))
    assert [c.shape[-1] for c in q.codes] == [4, 2]
    out = qtensor_sharding(q, NamedSharding(mesh, P("data")))
    assert [s.spec for s in out.codes] == [P(None, None)] * 2
    two = qtensor_sharding(q, NamedSharding(mesh, P("model")))
    assert [s.spec for s in two.codes] == [P(None, "model")] * 2


def test_a_device_holds_its_part_only(tmp_path, mesh):
    q = rtn(normal((64, 16)), Format("int4", 16), (0,))
    save(tmp_path / "c", {"w": q})
    out = load(tmp_path / "c", NamedSharding(mesh, P("data", "model")))["w"]
    assert [s.data.shape for s in out.codes[0].addressable_shards] == [(8, 8)] * 8


def test_ways_to_say_where(tmp_path, mesh):
    tree = small_tree()
    save(tmp_path / "c", tree)
    whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "model"))
    device = SingleDeviceSharding(jax.devices()[3])

    same = {
        "one for all": load(tmp_path / "c", whole),
        "tree": load(tmp_path / "c", jax.tree.map(lambda _: whole, tree, is_leaf=is_qtensor)),
        "prefix": load(tmp_path / "c", {"layers": whole, "step": whole}),
        "function": load(tmp_path / "c", lambda path: whole),
        "like": load(tmp_path / "c", like=_abstract(tree, lambda q: whole)),
    }
    for how, out in same.items():
        assert same_tree(out, tree), how
        assert all(x.sharding.is_equivalent_to(whole, x.ndim) for x in jax.tree.leaves(out)), how

    out = load(tmp_path / "c", lambda path: cut if path == "layers/0/kernel" else None)
    assert specs(out["layers"][0]["kernel"])[0] == ("model",)
    assert not out["step"].committed
    out = load(tmp_path / "c", {"layers": device, "step": None})
    assert out["layers"][1]["kernel"].scale.devices() == {jax.devices()[3]} and not out["step"].committed
    where = {
        "layers": [{"kernel": qtensor_sharding(tree["layers"][0]["kernel"], cut), "bias": None}, whole],
        "step": None,
    }
    assert specs(load(tmp_path / "c", where)["layers"][0]["kernel"])[0] == ("model",)


def _abstract(tree, sharding):
    """The tree as ShapeDtypeStructs that say where they go."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), tree)


def test_a_sharded_tree_is_saved_whole(tmp_path, mesh):
    q = rtn(normal((64, 16)), Format("int4", 16, False), (0,))
    placed = jax.device_put(q, qtensor_sharding(q, NamedSharding(mesh, P("data", "model"))))
    save(tmp_path / "c", {"w": placed})
    assert same_tree(load(tmp_path / "c")["w"], q)
    assert same_tree(load(tmp_path / "c", NamedSharding(mesh, P("model")))["w"], q)


def test_empty_arrays_and_keys_are_placed_too(tmp_path, mesh):
    tree = {"a": jnp.zeros((0, 4)), "q": rtn(jnp.zeros((0, 8)), Format("int4"), (0,)), "key": jax.random.key(1)}
    save(tmp_path / "c", tree)
    out = load(tmp_path / "c", NamedSharding(mesh, P()))
    assert all(len(x.sharding.device_set) == 8 for x in (out["a"], out["q"].codes[0], out["key"]))


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (lambda mesh: {"layers": None}, "says nothing of 'step'"),
        (lambda mesh: {"layers": None, "step": None, "stepp": None}, "were not saved: 'stepp'"),
        (lambda mesh: P(), "NamedSharding"),
        (lambda mesh: {"layers": P(), "step": None}, "NamedSharding"),
        (lambda mesh: lambda path: "cpu", "is a str"),
        (lambda mesh: NamedSharding(mesh, P("data")), "sharding of layers/0/bias does not fit it"),
        (lambda mesh: lambda p: NamedSharding(mesh, P(None, None, "model")) if "0/k" in p else None, "more axes"),
        (lambda mesh: lambda p: NamedSharding(mesh, P(None, "data")) if "0/k" in p else None, "layers/0/kernel"),
    ],
)
def test_shardings_that_do_not_fit(tmp_path, mesh, where, says):
    save(tmp_path / "c", small_tree())
    with pytest.raises(CheckpointError, match=says):
        load(tmp_path / "c", where(mesh))


# --- Orbax itself ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FEW_FORMATS, ids=str)
def test_orbax_alone_saves_and_restores_a_quantized_tree(tmp_path, mesh, fmt):
    """A QTensor is a pytree like any other: what a training loop with its own CheckpointManager relies on."""
    q = rtn(normal((64, 16)), fmt, (0,))
    tree = {"layer": [{"w": q}], "b": jnp.ones(3)}
    sharding = qtensor_sharding(q, NamedSharding(mesh, P(None, "model")))
    where = {"layer": [{"w": sharding}], "b": NamedSharding(mesh, P())}
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(lambda: tree), where
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", tree)
        checkpointer.wait_until_finished()
        out = checkpointer.restore(tmp_path / "c", target)
    assert same_tree(out, tree)
    assert specs(out["layer"][0]["w"])[0] == ("model",)
    assert same_bits(out["layer"][0]["w"].dequantize(), q.dequantize())
