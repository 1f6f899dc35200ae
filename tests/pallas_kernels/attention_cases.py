"""Random caches for the tests of `decode_attention`, and attention over them in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import Coded, Layout, Rules
from pallas_kernels.decode_attention.layout import code_bytes
from pallas_kernels.quantized_matmul import reference as products
from pallas_kernels.quantized_matmul.elements import ELEMENTS, Element, values
from tests.pallas_kernels.cases import random_codes, random_scale

# Max (1960), to the digits of his table.
LLOYD2 = Element(2, "table", table=(-1.51, -0.4528, 0.4528, 1.51))
_HALF = (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733)
LLOYD4 = Element(4, "table", table=(*(-v for v in reversed(_HALF)), *_HALF))


class Kind(NamedTuple):
    """How keys or values of a test are stored."""

    element: str | Element | None
    group: int = 0
    tokens: int = 1
    scale: str | None = "bfloat16"
    zero: bool = False
    static: bool = False

    @property
    def layout(self) -> Layout:
        e = ELEMENTS[self.element] if isinstance(self.element, str) and self.element in ELEMENTS else self.element
        return Layout(None if isinstance(e, str) else e, self.group, self.tokens)


KINDS = {
    "float32": Kind("float32"),
    "bfloat16": Kind("bfloat16"),
    "float16": Kind("float16"),
    "fp8_e4m3": Kind("fp8_e4m3"),
    "fp8_e5m2": Kind("fp8_e5m2"),
    "fp8_e4m3-tensor": Kind("fp8_e4m3", scale=None, static=True),
    "fp8_e5m2-tensor": Kind("fp8_e5m2", scale=None, static=True),
    "int8": Kind("int8"),
    "int8-f32": Kind("int8", scale="float32"),
    "int8-asym": Kind("int8", zero=True),
    "int4": Kind("int4"),
    "int4-g64-asym": Kind("int4", 64, zero=True),
    "int4-g32-asym": Kind("int4", 32, zero=True),
    "int4-g16-asym": Kind("int4", 16, zero=True),
    "int4-t32-asym": Kind("int4", tokens=32, zero=True),
    "int2-t32-asym": Kind("int2", tokens=32, zero=True),
    "int2-g32-asym": Kind("int2", 32, zero=True),
    "int3-g32-asym": Kind("int3", 32, zero=True),
    "nvfp4": Kind("fp4_e2m1", 16, scale="float8_e4m3fn", static=True),
    "mxfp4": Kind("fp4_e2m1", 32, scale="float8_e8m0fnu"),
    "lloyd4": Kind(LLOYD4),
    "lloyd2": Kind(LLOYD2),
}


class Case(NamedTuple):
    """One call: `decode_attention(*arrays, **options)`."""

    arrays: tuple
    options: dict


def coded(rng: np.random.Generator, kind: Kind, shape: tuple[int, int, int, int]) -> Coded:
    """Random keys or values `[B, K, T, D]`, about as large as normal numbers."""
    layout = kind.layout
    static = jnp.asarray(rng.uniform(0.5, 2, shape[1]), jnp.float32) if kind.static else None
    e = layout.element
    if e is None:
        return Coded((jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(kind.element),))
    table = values(e, not kind.zero)
    finite = np.flatnonzero(np.isfinite(table) & (np.abs(table) < 100 if e.kind == "float" else True))
    codes = (
        rng.choice(finite, shape).astype(np.uint8) if e.kind == "float" else random_codes(rng, e, shape, not kind.zero)
    )
    planes = products.pack(jnp.asarray(codes), e.bits)
    size = float(np.sqrt(np.mean(table[finite] ** 2)))
    if kind.scale is None:
        return Coded(planes, static=static / size)
    blocks = _blocks(kind, shape)
    scale = random_scale(rng, blocks, kind.scale)
    if kind.scale in ("float32", "bfloat16"):
        scale = (scale.astype(jnp.float32) / size).astype(kind.scale)
    zero = jnp.asarray(rng.integers(0, 2**e.bits, blocks), jnp.uint8) if kind.zero else None
    return Coded(planes, scale, zero, static)


def make(
    keys: str,
    values: str | None = None,
    *,
    lengths: tuple[int, ...] = (50, 0, 96),
    slots: int = 96,
    kv_heads: int = 2,
    rows: int = 3,
    dim: int = 64,
    seed: int = 0,
    at: np.ndarray | None = None,
    **rules,
) -> Case:
    """Sequences of some lengths; the queries stand at the last position of each."""
    rng = np.random.default_rng(seed)
    kinds, shape = (KINDS[keys], KINDS[values or keys]), (len(lengths), kv_heads, slots, dim)
    stores = [coded(rng, kind, shape) for kind in kinds]
    q = jnp.asarray(rng.standard_normal((*shape[:2], rows, dim)), jnp.float32)
    end = np.asarray(lengths, np.int32)
    if at is None:
        at = np.broadcast_to(end[:, None] - 1, (len(lengths), rows))
    rules = Rules(**{"scale": dim**-0.5, **rules})
    return Case(
        (q, *stores, jnp.asarray(at, jnp.int32), jnp.asarray(end)),
        dict(layouts=tuple(k.layout for k in kinds), rules=rules),
    )


class Exact(NamedTuple):
    """Attention in float64, and what errors are measured by: the sum of absolute terms of the result and, of the
    scores, the largest sum of absolute terms."""

    top: np.ndarray
    total: np.ndarray
    out: np.ndarray
    size: np.ndarray
    score_size: float


def exact(case: Case) -> Exact:
    """One query after the other, one position after the other: not how the reference does it."""
    q, keys, values_, at, end = case.arrays
    rules, options = case.options["rules"], case.options
    k, v = (decode64(c, x, q.shape[-1]) for c, x in zip((keys, values_), options["layouts"]))
    shift, table = options.get("shift"), options.get("table")
    q, at, end = np.asarray(q, np.float64), np.asarray(at), np.asarray(end)
    written = np.asarray(options["written"]) if "written" in options else end
    out = Exact(np.full(q.shape[:3], -np.inf), np.zeros(q.shape[:3]), np.zeros(q.shape), np.zeros(q.shape), 0.0)
    largest = 0.0
    for b, h, r in np.ndindex(*q.shape[:3]):
        here = [p for p in range(rules.first, min(end[b], at[b, r] + 1)) if _seen(p, at[b, r], rules)]
        if rules.ring:
            here = [p for p in here if p >= written[b] - k.shape[2]]
        if not here:
            continue
        where = [_place(b, p, rules, table, k.shape[2]) for p in here]
        rows = np.stack([k[row, h, slot] for row, slot in where])
        scores = rows @ q[b, h, r]
        largest = max(largest, float((np.abs(rows) @ np.abs(q[b, h, r])).max() * rules.scale))
        scores = (scores + (0 if shift is None else float(shift[b, h, r]))) * rules.scale
        scores = rules.soft_cap * np.tanh(scores / rules.soft_cap) if rules.soft_cap else scores
        weights = np.exp(scores - scores.max())
        vs = np.stack([v[row, h, slot] for row, slot in where])
        out.top[b, h, r], out.total[b, h, r] = scores.max(), weights.sum()
        out.out[b, h, r], out.size[b, h, r] = weights @ vs, weights @ np.abs(vs)
    return out._replace(score_size=largest)


def _seen(p: int, at: int, rules: Rules) -> bool:
    return rules.window is None or p > at - rules.window or p < rules.sink_tokens


def _place(b: int, p: int, rules: Rules, table: jax.Array | None, slots: int) -> tuple[int, int]:
    if table is not None:
        return int(table[b, p // rules.page_size]), p % rules.page_size
    return b, p % slots if rules.ring else p


def decode64(c: Coded, layout: Layout, dim: int) -> np.ndarray:
    """The numbers that the codes stand for, float64 `[B, K, T, D]`."""
    as64 = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
    if layout.element is None:
        return as64(c.codes[0])
    codes = np.asarray(products.unpack(c.codes, layout.element.bits, dim))
    out = values(layout.element, c.zero_point is None).astype(np.float64)[codes]
    for how, a in ((np.subtract, c.zero_point), (np.multiply, c.scale)):
        if a is not None:
            axis, times = (-2, layout.tokens) if layout.tokens > 1 else (-1, layout.group or dim)
            out = how(out, as64(a).repeat(times, axis=axis)[..., :dim])
    return out if c.static is None else out * as64(c.static)[:, None, None]


def shapes(kind: Kind, shape: tuple[int, int, int, int]) -> Coded:
    """The shapes of `coded`."""
    s, e = jax.ShapeDtypeStruct, kind.layout.element
    static = s((shape[1],), jnp.float32) if kind.static else None
    if e is None:
        return Coded((s(shape, kind.element),))
    planes = tuple(s((*shape[:3], n), jnp.uint8) for n in code_bytes(e, shape[3]))
    blocks = _blocks(kind, shape)
    zero = s(blocks, jnp.uint8) if kind.zero else None
    return Coded(planes, None if kind.scale is None else s(blocks, kind.scale), zero, static)


def _blocks(kind: Kind, shape: tuple[int, int, int, int]) -> tuple[int, ...]:
    """The shape of scales."""
    if kind.tokens > 1:
        return (*shape[:2], shape[2] // kind.tokens, shape[3])
    return (*shape[:3], -(-shape[3] // kind.group) if kind.group else 1)
