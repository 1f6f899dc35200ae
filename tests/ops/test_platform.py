"""Which GPU a program knows that it is lowered for."""

import jax
import jax.numpy as jnp
import pytest

from jquant.ops.platform import on_cuda
from pallas_kernels import compat


@pytest.fixture
def seen(monkeypatch):
    """The names that kernels are told, where the devices of this machine are H200s."""
    monkeypatch.setattr(compat, "named", lambda kind: "h200" if kind == jax.devices()[0].device_kind else None)
    return []


def doubled(seen):
    def twice(x):
        seen.append(compat.target())
        return (x * 2,)

    return lambda x: on_cuda(twice, x)[0]


def lowered_for(f, *args):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))


def test_a_program_of_one_device_has_that_of_its_backend(seen):
    f = doubled(seen)
    lowered_for(f, jnp.ones(4))
    assert seen[-1] == "h200"
    lowered_for(jax.vmap(f), jnp.ones((2, 4)))
    assert seen[-1] == "h200"
    lowered_for(lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=3)[0], jnp.ones(4))
    assert seen[-1] == "h200"
    assert compat.target() is None  # nothing is left behind


def test_a_program_of_a_mesh_has_that_of_its_devices(seen):
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    lowered_for(doubled(seen), jax.device_put(jnp.ones(4), place))
    assert seen[-1] == "h200"


def test_a_program_to_export_is_for_any_gpu(seen):
    jax.export.export(jax.jit(doubled(seen)), platforms=("cuda",))(jnp.ones(4))
    assert seen[-1] is None


def test_where_it_is_told_by_hand_a_kernel_takes_that(seen):
    with compat.lowering_on("a100"):
        assert compat.device_of(None) == "a100" and compat.device_of("h100") == "h100"
    assert compat.device_of(None) == "any"
