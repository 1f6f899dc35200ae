"""The walk with the float model beside the quantized one, for methods that ask for "cross"."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.core.method import Rounding
from jquant.core.stats import Stats
from jquant.walk import Walk
from tests.interrupts import interrupt_walk
from tests.test_quantize import (
    LAYERS,
    RECIPE,
    by_gptq,
    gated,
    inputs,
    model,
    normal,
    same_bits,
    scanned,
    stacked,
    unrolled,
)

__all__ = ["by_gptq", "model"]  # fixtures


@pytest.fixture(scope="module")
def by_qronos(model):
    params, batches = model
    return jq.quantize(unrolled, params, RECIPE, jq.qronos(), batches)


def test_each_weight_is_solved_on_what_both_models_produce(model, by_qronos, by_gptq):
    params, batches = model
    reads = ("ab", lambda x, p: x), ("c", lambda x, p: jnp.tanh(x @ p["a"]) * (x @ p["b"]))
    near, xs, same, others = list(batches), list(batches), [], []
    solve = jax.jit(lambda state, stats: jq.qronos().solve(state, stats, jq.INT3_G64))
    for i in range(LAYERS):
        w = params[f"layer{i}"]
        q = dict(w)
        for names, read in reads:
            pairs = [[np.asarray(a, np.float64).reshape(-1, w[names[0]].shape[0]) for a in (read(x, w), read(n, q))]
                     for x, n in zip(xs, near, strict=True)]  # fmt: skip
            gram, cross = sum(b.T @ b for _, b in pairs), sum((a - b).T @ b for a, b in pairs)
            stats = Stats(jnp.asarray(gram, jnp.float32)[None], None, None, jnp.ones(1), None, jnp.float32(cross)[None])
            assert (np.abs(cross).max() > 0) == ((i, names) != (0, "ab"))
            for n in names:
                done = solve(Rounding(w[n].T[None]), stats)
                params_ = jax.tree.map(lambda a: a[0], done.params)
                q[n] = jq.core.qtensor.from_codes(done.codes[0], params_, jq.INT3_G64, (-2,), w[n].shape, jnp.float32)
                # What follows is built on the walk's own: a flipped code changes what is to be made good behind it.
                mine, q[n] = q[n].dequantize(), by_qronos[f"layer{i}"][n].dequantize()
                same.append(np.mean(np.asarray(q[n]) == np.asarray(mine)))
                others.append(np.mean(np.asarray(by_gptq[f"layer{i}"][n].dequantize()) == np.asarray(mine)))
        xs, near = [gated(w, x) for x in xs], [gated(q, x) for x in near]
    # A code at a tie may flip, and then others of its row: sums in another order, differences in bfloat16.
    assert min(same) > 0.85 and max(others[2:]) < 0.7, (same, others)


def test_scanned_layers_give_the_codes_of_unrolled_ones(model, by_qronos):
    params, batches = model
    two = jq.quantize(scanned, stacked(params), RECIPE, jq.qronos(), batches)
    for i in range(LAYERS):
        for n in "abc":
            same_bits(jax.tree.map(lambda a, i=i: a[i], two[n].arrays), by_qronos[f"layer{i}"][n].arrays)


@pytest.mark.slow(optimized=False)
def test_qronos_beats_gptq_on_inputs_it_did_not_see(model, by_qronos):
    params, batches = model
    x = inputs(77)

    def error(q):
        return float(jnp.mean((jq.quantized(unrolled)(q, x) - unrolled(params, x)) ** 2))

    gptaq = jq.quantize(unrolled, params, RECIPE, jq.gptaq(alpha=1.0), batches)
    gptq = error(jq.quantize(unrolled, params, RECIPE, jq.gptq(), batches))
    assert error(by_qronos) < error(gptaq) < gptq


@pytest.mark.slow(optimized=False)
def test_an_interrupted_run_ends_in_the_same_bits(model, by_qronos, tmp_path, monkeypatch):
    params, batches = model
    calls = interrupt_walk(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        jq.quantize(unrolled, params, RECIPE, jq.qronos(), batches, resume=tmp_path / "work")
    again = jq.quantize(unrolled, params, RECIPE, jq.qronos(), batches, resume=tmp_path / "work")
    assert calls == [*range(4), *range(3, 2 * LAYERS)]
    same_bits(again, by_qronos)


def wide(p, x):
    for i in range(LAYERS):
        x = x + jnp.tanh(jnp.tanh(x) @ p[f"up{i}"]) @ p[f"down{i}"]
    return x


@pytest.mark.slow(optimized=False)
def test_the_widest_activations_are_made_twice_and_change_no_bit(tmp_path, monkeypatch):
    """Also where a run goes on behind a stop that kept none of them."""
    shapes = {"up": (16, 64), "down": (64, 16)}
    params = {f"{n}{i}": normal(i, *s, scale=0.3) for n, s in shapes.items() for i in range(LAYERS)}
    batches = [normal(9, 64, 16), normal(8, 64, 16)]
    run = lambda **how: jq.quantize(wide, params, jq.INT3_G64, jq.qronos(act_order=True), batches, **how)
    held: list[int] = []
    live = lambda self, *_: held.append(sum(a.nbytes for v in self.live_values() for a in v))
    monkeypatch.setattr(Walk, "_let_go", live)
    once = run()
    kept, walk = list(held), Walk(wide, params, batches, set(params), frozenset({"gram", "cross"}))
    assert walk.again == {1, 3}  # behind the last stop nothing is read
    # In front of `up` crosses x in both streams, and tanh x: 16 channels each; the 64 in front of `down` don't.
    assert max(kept) == 2 * 64 * 2 * 16 * (4 + 2)
    monkeypatch.setattr("jquant.walk._widest", lambda parts: frozenset())
    held.clear()
    same_bits(run(), once)
    assert max(held) == 2 * 64 * (16 + 64) * (4 + 2)
    monkeypatch.undo()
    for stop in (2, 3):
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            interrupt_walk(m, stop)
            run(resume=tmp_path / str(stop))
        same_bits(run(resume=tmp_path / str(stop)), once)


@pytest.mark.slow(optimized=False)
def test_integers_masks_and_loops_that_are_not_walked_are_in_both_streams():
    """A quantized table decides what is looked up and masked behind it; a loop sums its statistics of both."""

    def apply(p, ids):
        h = jnp.tanh(p["table"][ids] @ p["a"])
        top = jnp.argmax(h @ p["b"], axis=-1)  # where the two models may disagree
        h = jnp.where((top % 2 == 0)[..., None], h, -h) + jax.nn.one_hot(top, 16)
        h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), h, length=3)
        return h @ p["v"]

    p = {n: normal(i, 16, 16, scale=0.5) for i, n in enumerate(["table", "a", "b", "w", "v"])}
    ids = jax.random.randint(jax.random.key(9), (4, 64), 0, 16)
    recipe = {"table": None, "*": jq.INT3_G64}
    q = jq.quantize(apply, p, recipe, jq.qronos(), [ids])
    again = jq.quantize(apply, p, recipe, jq.qronos(), [ids[:1], ids[1:]])
    for n in "abwv":
        assert np.mean(np.asarray(q[n].dequantize()) == np.asarray(again[n].dequantize())) > 0.9, n
    by = {m.name: jq.quantize(apply, p, recipe, m, [ids])["v"].dequantize() for m in (jq.gptq(), jq.qronos())}
    assert np.any(by["gptq()"] != by["qronos()"])  # what the loop hands on differs in the two


@pytest.mark.slow(optimized=False)
def test_experts_are_solved_as_by_gptq():
    """The two models may send a token to different experts, or list an expert's tokens in another order."""

    def ragged(p, x, sizes):
        return jax.lax.ragged_dot(jnp.tanh(x @ p["a"]), p["w"], sizes)

    def batched(p, x, sizes):
        return jnp.einsum("etn,enm->etm", jnp.tanh(x @ p["a"]).reshape(3, -1, 16), p["w"])

    p, x = {"a": normal(2, 16, 16), "w": normal(0, 3, 16, 8)}, normal(1, 45, 16)
    for apply in (ragged, batched):
        args = [(x, jnp.array([20, 10, 15]))]
        qronos, gptq = (jq.quantize(apply, p, jq.INT3_G64, m, args) for m in (jq.qronos(), jq.gptq()))
        same_bits(qronos["a"].arrays, gptq["a"].arrays)  # nothing is quantized before it
        same_bits(qronos["w"].arrays, gptq["w"].arrays)


def test_only_the_walk_has_both_models(model):
    params, batches = model
    with pytest.raises(ValueError, match="only the walk"):
        stats = jq.calibrate(unrolled, params, batches, paths=["layer0/a"])["layer0/a"]
        jq.qronos().solve(Rounding(params["layer0"]["a"].T[None]), jax.tree.map(lambda a: a[None], stats), jq.INT4)


@pytest.mark.slow(optimized=False)
@pytest.mark.parametrize("method", [jq.gptq(), jq.qronos()], ids=lambda m: m.name)
def test_inputs_that_will_be_rounded_are_rounded_in_the_walk(method):
    """Every weight is solved on the rounded inputs that the quantized part produces, beside the float model's own."""
    p = {"a": normal(0, 16, 24, scale=0.3), "b": normal(1, 24, 8)}
    x = normal(2, 2, 40, 16) @ normal(3, 16, 16)

    def apply(p, x):
        return jnp.tanh(jnp.einsum("btn,nm->mbt", x, p["a"])).transpose(1, 2, 0) @ p["b"]

    policy = jq.Policy(jq.INT3_G64, jq.Activation("int4"))
    q, plain = (jq.quantize(apply, p, value, method, [x[:1], x[1:]]) for value in (policy, jq.INT3_G64))

    def rounded(x):
        rows = x.reshape(-1, x.shape[-1])
        codes, params = jq.core.activation.encode_input(rows, policy.activation)
        return jq.core.formats.decode(codes, params, policy.activation.format)

    first, second = x.reshape(-1, 16), jnp.tanh(x.reshape(-1, 16) @ p["a"])
    near = rounded(jnp.tanh(rounded(first) @ q["a"].dequantize()))
    for name, other, seen in (("a", first, rounded(first)), ("b", second, near)):
        other, seen = np.asarray(other, np.float64), np.asarray(seen, np.float64)
        cross = jnp.float32((other - seen).T @ seen)[None]
        stats = Stats(jnp.float32(seen.T @ seen)[None], None, None, jnp.ones(1), None, cross)
        want = jax.jit(lambda w, s: method.solve(Rounding(w), s, jq.INT3_G64))(p[name].T[None], stats)
        mine, unrounded = np.asarray(q[name].unpacked()), np.asarray(plain[name].unpacked())
        assert np.mean(want.codes[0] == mine) > max(0.9, np.mean(unrounded == mine) + 0.05), name


def test_infinite_inputs_are_found_though_they_are_rounded():
    x = jnp.ones((8, 16)).at[3, 2].set(jnp.inf)
    with pytest.raises(jq.JQuantError, match="w: .* channels of its input hold NaN"):
        jq.quantize(lambda p, x: x @ p["w"], {"w": normal(0, 16, 4)}, jq.W8A8, jq.gptq(), [x])
