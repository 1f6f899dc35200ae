"""`quantize`: the driver. Each weight is solved on the inputs that the quantized part of the model produces."""

import importlib
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
import jquant.walk
from jquant.core.method import Rounding
from jquant.core.paths import flatten_with_paths
from jquant.core.stats import Stats
from jquant.walk import Walk
from tests.interrupts import interrupt_walk

WIDTH, HIDDEN, LAYERS = 32, 64, 3


def normal(seed, *shape, scale=1.0):
    return jax.random.normal(jax.random.key(seed), shape) * scale


def gated(p, x):
    """A residual block with a gate: a and b share their input."""
    return x + (jnp.tanh(x @ p["a"]) * (x @ p["b"])) @ p["c"]


def unrolled(p, x):
    for i in range(LAYERS):
        x = gated(p[f"layer{i}"], x)
    return x @ p["head"]


def scanned(p, x):
    x, _ = jax.lax.scan(lambda x, w: (gated(w, x), None), x, {n: p[n] for n in "abc"})
    return x @ p["head"]


def layer(i):
    shapes = {"a": (WIDTH, HIDDEN), "b": (WIDTH, HIDDEN), "c": (HIDDEN, WIDTH)}
    return {n: normal(10 * i + j, *s, scale=s[0] ** -0.5) for j, (n, s) in enumerate(shapes.items())}


def inputs(seed):
    """Correlated inputs, as those of real layers are: for independent ones GPTQ is round to nearest."""
    mix = normal(1234, WIDTH, WIDTH) * jnp.exp(-jnp.arange(WIDTH) / 6)[:, None]
    return normal(seed, 8, 16, WIDTH) @ mix


@pytest.fixture(scope="module")
def model():
    params = {f"layer{i}": layer(i) for i in range(LAYERS)} | {"head": normal(99, WIDTH, 10)}
    return params, [inputs(i) for i in range(3)]


RECIPE = {"head": None, "*": jq.INT3_G64}


@pytest.fixture(scope="module")
def by_gptq(model):
    """The quantized model that several tests compare with."""
    params, batches = model
    return jq.quantize(unrolled, params, RECIPE, jq.gptq(), batches)


def stacked(params):
    return {n: jnp.stack([params[f"layer{i}"][n] for i in range(LAYERS)]) for n in "abc"} | {"head": params["head"]}


def same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def by_hand(params, batches, method, fmt):
    """The sequential walk as a plain loop over this model, for the test to compare with."""
    out, xs = dict(params), list(batches)
    solve = jax.jit(lambda state, stats: method.solve(state, stats, fmt))
    for i in range(LAYERS):
        p = dict(params[f"layer{i}"])
        for names, read in ((("a", "b"), lambda x, p: x), ("c", lambda x, p: jnp.tanh(x @ p["a"]) * (x @ p["b"]))):
            rows = [np.asarray(read(x, p), np.float64).reshape(-1, p[names[0]].shape[0]) for x in xs]
            gram = jnp.asarray(sum(r.T @ r for r in rows), jnp.float32)[None]
            zero = jnp.zeros((1, gram.shape[-1]))
            for n in names:
                done = solve(Rounding(p[n].T[None]), Stats(gram, zero, zero, jnp.ones(1)))
                q = jq.core.qtensor.from_codes(
                    done.codes[0], jax.tree.map(lambda a: a[0], done.params), fmt, (-2,), p[n].shape, jnp.float32
                )
                p[n] = q.dequantize()
        out[f"layer{i}"] = p
        xs = [gated(p, x) for x in xs]
    return out


@pytest.mark.slow(optimized=False)
def test_the_walk_solves_each_weight_on_what_the_quantized_part_produces(model, by_gptq):
    params, batches = model
    got = jq.dequantize(by_gptq)
    want = by_hand(params, batches, jq.gptq(), jq.INT3_G64)
    same = [np.mean(np.asarray(a) == np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True)]
    assert min(same) > 0.99  # the loop's Gram matrices are sums in another order: a code at a tie may flip
    # The test can fail: on the float model's own activations the last weight comes out otherwise.
    stats = jq.calibrate(unrolled, params, batches, paths=["layer2/c"])["layer2/c"]
    rows, stats = params["layer2"]["c"].T[None], jax.tree.map(lambda a: a[None], stats)
    alone = jq.gptq().solve(Rounding(rows), stats, jq.INT3_G64)
    assert np.mean(np.asarray(alone.codes[0]) == np.asarray(by_gptq["layer2"]["c"].unpacked())) < 0.95


def test_scanned_layers_give_the_bits_of_unrolled_ones(model, by_gptq):
    params, batches = model
    one = by_gptq
    two = jq.quantize(scanned, stacked(params), RECIPE, jq.gptq(), batches)
    for i in range(LAYERS):
        for n in "abc":
            same_bits(jax.tree.map(lambda a, i=i: a[i], two[n].arrays), one[f"layer{i}"][n].arrays)


def test_equal_layers_are_compiled_once(model):
    params, batches = model
    wanted = {f"layer{i}/{n}" for i in range(LAYERS) for n in "abc"}
    walk = Walk(unrolled, params, batches, wanted, frozenset({"gram"}))
    walk.run(lambda jobs, seen: {})
    assert len(walk) == 2 * LAYERS
    # The first and second stop, and the two of any later layer: its input is no argument.
    assert len(walk.compiled) == 4
    assert sum(p.step._cache_size() for p in walk.compiled.values()) == 4


@pytest.mark.parametrize("method", [jq.gptq(), jq.qronos(), jq.rtn()], ids=lambda m: m.name)
def test_a_float_weight_is_freed_when_its_codes_are_there(model, method, monkeypatch):
    """If the caller holds no reference."""
    params, batches = model
    params = jax.tree.map(lambda a: a.astype(jnp.float32) + 0, params)
    refs = {p: weakref.ref(leaf) for p, leaf in flatten_with_paths(params)[0]}
    box, alive = [params], []
    del params

    def counting(*args):
        alive.append(sum(r() is not None for r in refs.values()))
        return solved(*args)

    quantize = importlib.import_module("jquant.quantize")
    solved = quantize._solved
    counting.lower = solved.lower
    monkeypatch.setattr(quantize, "_solved", counting)
    q = jq.quantize(unrolled, box.pop(), RECIPE, method, batches)
    same_bits(q, jq.quantize(unrolled, model[0], RECIPE, method, batches))
    # A layer has three weights and two stops, and what a stop solved is read between the next two.
    assert alive[0] == len(refs) and alive[-1] <= 5, alive


@pytest.mark.slow(optimized=False)
def test_a_function_is_traced_once_for_all_that_is_asked_of_it(model):
    """Its sites, what it folds, the walks; the proof of a fold asks for a few tokens, and is a trace of its own."""
    params, batches = model
    calls = []

    def apply(p, x):
        calls.append(x.shape)
        return unrolled(p, x)

    method = jq.chain(jq.rotate(), jq.awq(clip=False), jq.gptq())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jq.JQuantWarning)  # here is no stream that could be turned
        q = jq.quantize(apply, params, RECIPE, method, batches)
        assert sorted(calls) == [(2, 16, WIDTH), (8, 16, WIDTH)]
        jq.quantize(apply, params, RECIPE, method, batches)  # nothing is kept from call to call
        assert len(calls) == 4
        same_bits(q, jq.quantize(unrolled, params, RECIPE, method, batches))


@pytest.mark.slow(optimized=False)
def test_gptq_beats_rounding_on_inputs_it_did_not_see(model, by_gptq):
    params, batches = model
    x = inputs(77)

    def error(q):
        return float(jnp.mean((jq.quantized(unrolled)(q, x) - unrolled(params, x)) ** 2))

    assert error(by_gptq) < 0.8 * error(jq.quantize(unrolled, params, RECIPE, jq.rtn(), batches))


@pytest.mark.slow(optimized=False)
def test_batches_may_have_any_size_and_come_from_an_iterator(model):
    params, batches = model
    whole = jnp.concatenate(batches)
    pieces = [whole[:5], whole[5:6], whole[6:]]
    a = jq.dequantize(jq.quantize(unrolled, params, RECIPE, jq.gptq(), iter(pieces)))
    b = jq.dequantize(jq.quantize(unrolled, params, RECIPE, jq.gptq(), [whole]))
    assert np.mean(np.asarray(a["layer0"]["a"]) == np.asarray(b["layer0"]["a"])) > 0.99


def test_same_call_same_bits(model, by_gptq):
    params, batches = model
    same_bits(by_gptq, jq.quantize(unrolled, params, RECIPE, jq.gptq(), batches))


@pytest.mark.parametrize("stop", [1, 4])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bits(model, by_gptq, stop, tmp_path, monkeypatch):
    params, batches = model
    calls = interrupt_walk(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        jq.quantize(unrolled, params, RECIPE, jq.gptq(), batches, resume=tmp_path / "work")
    again = jq.quantize(unrolled, params, RECIPE, jq.gptq(), batches, resume=tmp_path / "work")
    assert calls == [*range(stop + 1), *range(stop, 2 * LAYERS)]  # nothing was done twice
    same_bits(again, by_gptq)


def test_the_work_of_another_job_is_refused(model, tmp_path):
    params, batches = model
    jq.quantize(unrolled, params, RECIPE, jq.gptq(), batches, resume=tmp_path / "work")
    with pytest.raises(jq.JQuantError, match="holds the work of another quantization"):
        jq.quantize(unrolled, params, {"head": None, "*": jq.INT4}, jq.gptq(), batches, resume=tmp_path / "work")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(jq.JQuantError, match="not empty"):
        jq.quantize(unrolled, params, RECIPE, jq.gptq(), batches, resume=tmp_path / "other")


def test_a_leaf_read_twice_is_solved_on_both_inputs():
    def twice(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"]

    p, x = {"w": normal(0, 16, 16)}, normal(1, 64, 16)
    q = jq.quantize(twice, p, jq.INT3_G64, jq.gptq(), [x])["w"]
    xs = np.concatenate([np.asarray(x), np.tanh(np.asarray(x) @ np.asarray(p["w"]))])
    zero = jnp.zeros((1, 16))
    stats = Stats(jnp.asarray(xs.T @ xs)[None], zero, zero, jnp.ones(1))
    want = jq.gptq().solve(Rounding(p["w"].T[None]), stats, jq.INT3_G64)
    np.testing.assert_array_equal(q.unpacked(), want.codes[0])


def test_a_tied_embedding_is_solved_at_its_matmul_and_a_table_is_rounded():
    def tied(p, t):
        return jnp.tanh(p["embed"][t] + p["position"][: t.shape[0], None]) @ p["embed"].T

    p = {"embed": normal(0, 20, 16), "position": normal(1, 5, 16)}
    with pytest.warns(jq.JQuantWarning, match="1 leaves that the recipe names stay in float.*position"):
        q = jq.quantize(tied, p, jq.INT4, jq.gptq(), [jnp.arange(20).reshape(5, 4)])
    assert q["embed"].contracted == (-1,)
    assert not jq.is_qtensor(q["position"])  # sliced, then added: nothing reads its codes

    def lookup_only(p, t):
        return p["table"][t]

    q = jq.quantize(lookup_only, {"table": normal(0, 20, 16)}, jq.INT4, jq.gptq(), [jnp.arange(4)])
    same_bits(q, jq.quantize(lookup_only, {"table": normal(0, 20, 16)}, jq.INT4, jq.rtn(), [jnp.arange(4)]))


def test_loops_that_are_not_walked_are_observed_whole():
    def rnn(p, x):
        h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x @ p["u"]), None), jnp.zeros((4, 16)), x)
        return h @ p["v"]

    p = {n: normal(i, 16, 16, scale=0.2) for i, n in enumerate("wuv")}
    x = normal(5, 12, 4, 16)
    q = jq.quantize(rnn, p, jq.INT3_G64, jq.gptq(), [x])
    stats = jq.calibrate(rnn, p, [x], paths=["w"])["w"]
    one = jax.tree.map(lambda a: a[None], stats)
    want = jq.gptq().solve(Rounding(p["w"].T[None]), one, jq.INT3_G64)
    np.testing.assert_array_equal(q["w"].unpacked(), want.codes[0])


def test_experts_are_solved_apart_and_one_without_tokens_is_reported():
    def moe(p, x, sizes):
        return jax.lax.ragged_dot(x, p["w"], sizes)

    p, x = {"w": normal(0, 3, 16, 8)}, normal(1, 40, 16)
    with pytest.warns(jq.JQuantWarning) as said:
        q = jq.quantize(moe, p, jq.INT3_G64, jq.gptq(), [(x, jnp.array([25, 0, 15]))])["w"]
    assert ["w: no calibration token reached 1 of its matrices" in str(w.message) for w in said] == [True]
    rounded = jq.quantize(moe, p, jq.INT3_G64, jq.rtn(), [(x, jnp.array([25, 0, 15]))])["w"]
    np.testing.assert_array_equal(q.unpacked()[1], rounded.unpacked()[1])
    assert np.any(q.unpacked()[0] != rounded.unpacked()[0])


def test_dead_channels_are_reported_with_the_path():
    model, p = (lambda p, x: x @ p["layer"]["w"]), {"layer": {"w": normal(0, 8, 4)}}
    x = normal(1, 30, 8).at[:, [2, 5]].set(0)
    with pytest.warns(jq.JQuantWarning, match="layer/w: 2 input channels are zero"):
        jq.quantize(model, p, jq.INT4, jq.gptq(), [x])


def test_what_cannot_be_observed_says_why():
    def grouped(p, x):
        dims = jax.lax.conv_dimension_numbers(x.shape, p["w"].shape, ("NWC", "WIO", "NWC"))
        return jax.lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=dims, feature_group_count=4)

    p, x = {"w": normal(0, 3, 2, 8)}, normal(1, 2, 10, 8)
    with pytest.warns(jq.JQuantWarning, match="w: a grouped convolution; rounded to nearest"):
        jq.quantize(grouped, p, jq.INT4, jq.gptq(), [x])
    with pytest.warns(jq.JQuantWarning, match="the statistics of w are left out: a grouped convolution"):
        assert jq.calibrate(grouped, p, [x]) == {}
    with pytest.raises(jq.JQuantError, match="w can't be observed: a grouped convolution"):
        jq.calibrate(grouped, p, [x], paths=["w"])


def test_bad_input_is_refused_before_any_work():
    model = lambda p, x: (x + p["bias"]) @ p["w"]
    p, x = {"w": normal(0, 8, 4), "bias": jnp.zeros(8)}, jnp.ones((2, 8))
    with pytest.raises(jq.JQuantError, match="matches no parameter"):
        jq.quantize(model, p, {"*kernel": jq.INT4}, jq.gptq(), [x])
    with pytest.raises(jq.JQuantError, match="no matmul and no lookup reads, such as bias"):
        jq.quantize(model, p, {"bias": jq.INT4, "*": jq.INT8}, jq.gptq(), [x])
    with pytest.raises(jq.JQuantError, match="give at least one batch"):
        jq.quantize(model, p, jq.INT4, jq.gptq(), [])
    with pytest.raises(jq.JQuantError, match="w: 1 of 32 weights are NaN"):
        jq.quantize(model, {**p, "w": p["w"].at[0, 0].set(jnp.nan)}, jq.INT4, jq.gptq(), [x])
    with pytest.raises(jq.JQuantError, match="w: 1 channels of its input hold NaN"):
        jq.quantize(model, {**p, "bias": p["bias"].at[0].set(jnp.inf)}, jq.INT4, jq.gptq(), [jnp.ones((8, 8))])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("bad", [(), (np.nan,), (np.inf, -np.inf), (np.nan, np.inf, 1e38)])
def test_what_is_not_finite_is_counted(dtype, bad):
    """Exactly, also beside numbers whose squares are too large; in numpy's arrays and in JAX's."""
    a = np.full((4, 5), 3e38 if dtype != "float64" else 1e300).astype(jnp.dtype(dtype))
    a.ravel()[: len(bad)] = bad
    want = sum(not np.isfinite(x) for x in bad)
    count = importlib.import_module("jquant.quantize")._count_not_finite
    assert count(a) == count(np.asarray(a, order="F")) == want
    if dtype != "float64":
        assert count(jnp.asarray(a)) == count(jnp.zeros_like(jnp.asarray(a)).at[:].set(a)) == want


def test_what_stays_in_float_is_said():
    model = lambda p, x: x @ (p["w"] * 2) + x @ p["v"]
    p = {"w": normal(0, 8, 4), "v": normal(1, 8, 4)}
    with pytest.warns(jq.JQuantWarning, match="1 leaves that the recipe names stay in float.*w"):
        q = jq.quantize(model, p, jq.INT4, batches=[jnp.ones((2, 8))])
    assert not jq.is_qtensor(q["w"]) and jq.is_qtensor(q["v"])


def test_chain_rounds_under_the_scales_that_were_searched(model):
    params, batches = model
    searched = jq.quantize(unrolled, params, RECIPE, jq.rtn(search=True), batches)
    both = jq.quantize(unrolled, params, RECIPE, jq.chain(jq.rtn(search=True), jq.gptq()), batches)
    same_bits(both["layer2"]["b"].scale, searched["layer2"]["b"].scale)
    assert np.any(both["layer2"]["b"].unpacked() != searched["layer2"]["b"].unpacked())


def test_data_free_methods_need_shapes_only(model):
    params, batches = model
    shapes = [jax.ShapeDtypeStruct(batches[0].shape, batches[0].dtype)]
    same_bits(*(jq.quantize(unrolled, params, RECIPE, jq.rtn(), b) for b in (shapes, batches)))


def test_quantized_leaves_stay_and_float_leaves_are_the_same_objects(model):
    params, batches = model
    first = jq.quantize(unrolled, params, {"layer0*": jq.INT8, "*": None}, jq.rtn(), batches)
    then = jq.quantize(unrolled, first, RECIPE, jq.gptq(), batches)
    assert then["layer0"]["a"] is first["layer0"]["a"] and then["layer0"]["a"].format == jq.INT8
    assert then["layer1"]["a"].format == jq.INT3_G64 and then["head"] is params["head"]


@pytest.mark.slow(optimized=False)
def test_bf16_parameters_stay_bf16(model):
    params, batches = model
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = jq.quantize(unrolled, half, RECIPE, jq.gptq(), [b.astype(jnp.bfloat16) for b in batches])
    assert q["layer0"]["a"].dtype == jnp.bfloat16
    assert jq.quantized(unrolled)(q, batches[0].astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("fmt", [jq.INT3_G64, jq.NVFP4, jq.Format("int4", (2, 16))], ids=str)
def test_the_solvers_are_compiled_before_there_are_activations(model, monkeypatch, fmt):
    """Compiling takes memory. Of the walk's solvers none is compiled behind its first stop."""
    params, batches = model
    behind, compiled = [], []
    step = Walk._stop
    monkeypatch.setattr(Walk, "_stop", lambda self, *args: (behind.append(1), step(self, *args))[1])
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **what: compiled.append(what.get("fun_name")) if behind and "compile" in event else None
    )
    try:
        recipe = {"head": None, "*": fmt}
        jq.quantize(unrolled, params, recipe, jq.gptq(damp=0.0137), batches)  # no other test's settings
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled and not [name for name in compiled if name and "_solved" in name]
