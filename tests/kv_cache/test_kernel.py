"""The kernel in the place of `codes_attention`: the same running softmax, and in the programs of GPUs only."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant import kv_cache
from jquant.core.errors import CacheError
from jquant.kv_cache import attention, kernel
from jquant.kv_cache.cache import read_ranges
from jquant.kv_cache.softmax import Rules
from jquant.ops import attention as ops
from pallas_kernels.decode_attention import Tiling, decode_attention
from tests.kv_cache.cases import FORMATS, append, tokens

TARGET = "__gpu$xla.gpu.triton"


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel on any machine."""
    run = partial(decode_attention, interpret=True, tiling=Tiling(32, 2, 1, 1))
    monkeypatch.setattr(ops, "decode_attention", run)


def filled(name, length=45, slots=64, kv_heads=2, dim=64, groups=2, **options):
    """A cache of two sequences, of `length` and of 7 tokens, and queries at their ends."""
    q, k, v = tokens(2, length, kv_heads, dim, groups)
    cache = kv_cache.init(2, slots, kv_heads, dim, name, dtype="float32", **options)
    return append(cache, k, v, jnp.asarray([length, 7])), q[:, -1:]


def both(cache, q, **rules):
    """`codes_attention`, and the kernel."""
    kv_heads = cache.keys.codes[0].shape[1]
    q5 = q.reshape(q.shape[0], q.shape[1], kv_heads, -1, q.shape[-1]).transpose(0, 2, 3, 1, 4)
    at = cache.length[:, None] - q.shape[1] + jnp.arange(q.shape[1], dtype=jnp.int32)
    known = Rules(at, **{"window": None, "sink_tokens": 0, "scale": 0.125, "soft_cap": None, **rules})
    shift = None if cache.center is None else jnp.einsum("bkgld,kd->bkgl", q5, cache.center)
    args = (q5, cache.keys, cache.values, cache.format, known, read_ranges(cache), shift, cache.table)
    more = dict(page_size=cache.page_size, ring=cache.ring)
    return attention.codes_attention(*args, cache.capacity, **more), kernel.codes_attention(*args, **more)


def close(want, got, tolerance=2e-5):
    """Scores and sums to float32 sums of two bfloat16 numbers; or as far as elements are rounded to bfloat16."""
    np.testing.assert_allclose(got.top, want.top, atol=tolerance * 4, rtol=tolerance)
    np.testing.assert_allclose(got.total, want.total, rtol=tolerance * 8)
    size = float(jnp.max(jnp.abs(want.out / jnp.where(want.total == 0, 1, want.total))))
    normal = lambda s: s.out / jnp.where(s.total == 0, 1, s.total)
    np.testing.assert_allclose(normal(got), normal(want), atol=tolerance * 8 * size)


QUICK = ("int8", "int4-g64-asym-rot", "keys=int4-t8-asym-search,values=nvfp4,sinks=5,residual=7")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FORMATS])
def test_the_kernel_gives_the_running_softmax(name):
    """Of every format, with a short sequence, sinks and float windows left out."""
    rounded = any(s in name for s in ("lloyd", "-t", "int3", "int2", "g16"))
    close(*both(*filled(name)), tolerance=2.0**-9 if rounded else 2e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "options, rules",
    [
        (dict(pages=5, page_size=32), dict(soft_cap=1.5)),
        pytest.param(dict(ring=True, slots=32), dict(window=20), marks=pytest.mark.slow),
        (dict(center=0.25, gain=2.0), dict(window=20, sink_tokens=3)),
    ],
)
def test_pages_rings_windows_centers(options, rules):
    close(*both(*filled("int4-g32-asym-rot", **options), **rules))


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_several_tokens_and_under_vmap():
    """Two tokens of two heads; two layers at a time."""
    cache, q = filled("int8")
    q = jnp.concatenate([q, -q], axis=1)
    want, got = both(cache, q)
    close(want, got)
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), (cache, q))
    mapped = jax.vmap(lambda args: both(*args)[1])(twice)
    close(want, jax.tree.map(lambda a: a[1], mapped))


# --- which programs have it ---


def lowered(f, *args, platform="cuda"):
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def decode(cache, q):
    return kv_cache.attend(q, cache)


def test_the_kernel_is_in_the_program_of_a_gpu_and_only_there():
    cache, q = filled("int8")
    assert lowered(decode, cache, q).count(TARGET) == 1
    assert TARGET not in lowered(decode, cache, q, platform="cpu")
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), (cache, q))
    layers = lambda stack: jax.lax.scan(lambda c, args: (c, decode(*args)), 0.0, stack)[1]
    assert lowered(layers, twice).count(TARGET) == 1
    assert lowered(lambda s: jax.vmap(decode)(*s), twice).count(TARGET) == 1


def test_a_derivative_is_that_of_the_plain_path():
    cache, q = filled("int8")
    forward = lambda q: jax.jvp(lambda q: decode(cache, q), (q,), (jnp.ones_like(q),))[1]
    assert "while" in lowered(forward, q)
    np.testing.assert_array_equal(forward(q), jax.jvp(lambda q: plain(cache, q), (q,), (jnp.ones_like(q),))[1])


def plain(cache, q):
    """`attend` with no kernel to choose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "why_not", lambda *args: "not now")
        return kv_cache.attend(q, cache)


@pytest.mark.parametrize("name", ["int8", "int4-g32-asym-rot"])
def test_the_program_of_a_cpu_is_the_one_without_a_kernel(name):
    """Instruction for instruction after XLA's passes, and bit for bit."""
    cache, q = filled(name)
    program = lambda f: [
        line.split(", metadata=")[0] for line in jax.jit(f).lower(cache, q).compile().as_text().splitlines()[1:]
    ]
    strip = lambda lines: sorted(line.split("=", 1)[-1].split("(")[0] for line in lines if " = " in line)
    assert strip(program(decode)) == strip(program(plain))
    np.testing.assert_array_equal(jax.jit(decode)(cache, q), jax.jit(plain)(cache, q))


def test_reasons_say_why_a_gpu_runs_the_plain_path():
    why = lambda name, rows=4, page=0: kernel.why_not(kv_cache.parse(name), 64, rows, page)
    assert why("int8") is None and why("kivi2") is None and why("turbo4") is None and why("nvfp4", 4, 64) is None
    assert "40 queries" in why("int8", 40)
    assert "pages of 8" in why("int8", 4, 8)
    cache, q = filled("int8", groups=40)
    assert TARGET not in lowered(decode, cache, q)


@pytest.mark.parametrize(
    "name, heads, tokens, reason",
    [
        ("int8", 8, 1, ""), ("turbo4", 8, 4, ""), ("int8", 8, 40, "160 queries"), ("kivi4", 8, 1, ""),
        ("int8", 8, 1, "pages of 8"),
    ],
)  # fmt: skip
def test_explain_says_what_the_program_of_a_gpu_is_made_of(name, heads, tokens, reason):
    """Of a cache, or of its shapes alone."""
    paged = dict(pages=16, page_size=8) if "pages" in reason else {}
    make = lambda: kv_cache.init(2, 64, 2, 64, name, **paged)
    found = kv_cache.explain(jax.eval_shape(make), heads, tokens)
    assert found == kv_cache.explain(make(), heads, tokens)
    assert (reason in found.reason) if reason else not found.reason
    assert found.text.startswith(str(kv_cache.parse(name))) and found.reason in found.text
    q = jnp.zeros((2, tokens, heads, 64))
    assert (TARGET in lowered(decode, make(), q)) == bool(found.kernel) == (not reason)


def test_explain_refuses_heads_that_do_not_fit():
    with pytest.raises(CacheError, match="heads=3 must be a multiple of 2"):
        kv_cache.explain(kv_cache.init(1, 8, 2, 64), 3)
