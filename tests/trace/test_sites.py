"""`find_sites` finds what the mathematics says, over every kind of model, and says it in a table."""

from collections import Counter, defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from tests import model_bank
from tests.model_bank import MODELS, Model, S, params


def _groups(pairs) -> Counter:
    groups = defaultdict(list)
    for site, key in pairs:
        groups[key].append(site)
    return Counter(tuple(sorted(g)) for g in groups.values())


def check_sites(sites: jq.Sites, want: tuple[S, ...]) -> None:
    """The same reads, each as often, and the same sites sharing one input."""
    found = [((s.path, s.kind, s.contracted, s.batch), s) for s in sites]
    assert Counter(key for key, _ in found) == Counter(tuple(s[:4]) for s in want)
    shared = _groups((key, s.input) for key, s in found if s.quantizable)
    assert shared == _groups((tuple(s[:4]), s.x) for s in want if s.kind != "read")
    assert all(s.input == -1 for _, s in found if not s.quantizable)


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_sites_are_those_of_the_mathematics(model: Model):
    sites = jq.find_sites(model.apply, model.params, *model.args, **model.kwargs)
    check_sites(sites, model.sites)
    shapes = dict(zip(*_paths_and_shapes(model)))
    for site in sites:
        assert site.shape == shapes[site.path]
        assert all(-len(site.shape) <= a < 0 for a in (*site.contracted, *site.batch))


def _paths_and_shapes(model: Model):
    from jquant.core.paths import flatten_with_paths

    flat, _ = flatten_with_paths(model.params)
    return [p for p, _ in flat], [jnp.shape(v) for _, v in flat]


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_the_table_has_a_row_a_site(model: Model):
    sites = jq.find_sites(model.apply, model.params, *model.args, **model.kwargs)
    lines = repr(sites).splitlines()
    assert len(lines) == 2 + len(sites) and lines[0].split()[:3] == ["path", "shape", "contracted"]
    for line, site in zip(lines[2:], sites):
        assert line.split()[0] == site.path and site.kind in line.split()
        assert site.quantizable or site.note


def test_shapes_are_enough():
    model = model_bank.BANK["linen_scan"]
    shape = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    check_sites(jq.find_sites(model.apply, shape(model.params), *shape(model.args)), model.sites)


def test_a_quantized_tree_has_the_sites_of_the_float_one():
    model = model_bank.BANK["both"]
    q = model_bank.quantize("both", model_bank.FORMATS[1])
    assert tuple(jq.find_sites(model.apply, q, *model.args)) == tuple(
        jq.find_sites(model.apply, model.params, *model.args)
    )


def test_a_helper_traced_outside_before_is_found_all_the_same():
    w = jnp.ones((8, 6))
    for _ in range(2):
        model_bank.helper(w, model_bank.X)  # its jaxpr is in JAX's cache now
        check_sites(jq.find_sites(lambda p, x: model_bank.helper(p["w"], x), {"w": w}, model_bank.X), (
            S("w", "dot", (-2,), (), "x"),
        ))  # fmt: skip


def test_slices_are_named_by_the_whole_leafs_axes_and_numbers():
    def f(p, x):
        return x @ p["w"][1:3][1] + x @ p["w"][0] + x @ p["v"][:, 2:5][:, 1]

    sites = jq.find_sites(f, params(w=(4, 8, 8), v=(8, 6, 8)), model_bank.X)
    assert [(s.path, s.contracted, s.batch) for s in sites] == [
        ("w", (-2,), (-3,)), ("w", (-2,), (-3,)), ("v", (-3,), (-2,)),
    ]  # fmt: skip
    assert [s.note for s in sites] == ["axis -3 [2]", "axis -3 [0]", "axis -2 [3]"]


def test_what_is_no_float_is_read_not_quantized():
    p = {"i": jnp.ones((8, 6), jnp.int8), "c": jnp.ones((8, 6), jnp.complex64)}
    f = lambda p, x: (x.astype(jnp.int8) @ p["i"], x.astype(jnp.complex64) @ p["c"])
    sites = jq.find_sites(f, p, model_bank.X)
    assert [s.kind for s in sites] == ["read", "read"]
    assert [s.note for s in sites] == ["int8 is not quantized", "complex64 is not quantized"]


def test_a_returned_parameter_is_listed():
    (site,) = jq.find_sites(lambda p, x: (x, p["w"].T), params(w=(3, 4)), model_bank.X)
    assert (site.kind, site.by) == ("read", "return")


def test_a_leaf_that_is_no_array_is_named():
    with pytest.raises(jq.core.errors.TraceError, match="block/name: .* not str"):
        jq.find_sites(lambda p, x: x, {"block": {"name": "relu"}}, np.ones(3))
