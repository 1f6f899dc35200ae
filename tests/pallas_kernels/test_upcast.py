"""The bit tricks of the kernels, on every code there is: the arithmetic that no simulator has to run."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import packed, reference, upcast
from pallas_kernels.quantized_matmul.elements import ELEMENTS, element, plane_widths, values
from tests.pallas_kernels.attention_cases import LLOYD2, LLOYD4

DTYPES = (jnp.bfloat16, jnp.float16)


def every_code(bits: int) -> jnp.ndarray:
    return jnp.arange(2**bits, dtype=jnp.uint16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_exact_for_every_code_and_zero_point(bits, dtype):
    codes = every_code(bits)
    np.testing.assert_array_equal(
        upcast.integers(codes, bits, None, dtype).astype(jnp.float32), values(f"int{bits}", signed=True)
    )
    zero = np.arange(2**bits, dtype=np.float32)[:, None]
    got = upcast.integers(codes[None], bits, jnp.asarray(zero).astype(dtype), dtype)
    np.testing.assert_array_equal(got.astype(jnp.float32), np.arange(2**bits) - zero)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_point_between_codes_is_rounded_once(dtype):
    zero = jnp.asarray([[0.3], [7.77], [14.5]], jnp.float32)
    got = upcast.integers(every_code(4)[None], 4, zero, dtype)
    assert got.dtype == dtype
    want = (np.arange(16, dtype=np.float32) - np.asarray(zero)).astype(np.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(got, np.float32), want.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [n for n, e in ELEMENTS.items() if e.kind == "float"])
def test_small_floats_are_exact_up_to_their_unit_subnormal_numbers_included(name, dtype):
    e, want = element(name), values(name, True)
    finite = np.isfinite(want)
    got = np.asarray(upcast.small_floats(every_code(e.bits), e, dtype), np.float32)[finite]
    np.testing.assert_array_equal(got / upcast.small_float_unit(e), want[finite])


def test_a_table_is_looked_up_in_every_dtype():
    table = element("nf4").table
    for dtype in (ml_dtypes.bfloat16, np.float16):
        near = tuple(np.asarray(table, np.float32).astype(dtype).astype(np.float32))
        got = upcast.table(every_code(4), near, jnp.dtype(dtype))
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(near, np.float32))


@pytest.mark.parametrize("bits, word_bytes", [*((b, 1) for b in range(2, 9)), (4, 2), (2, 2)])
def test_lanes_of_words_are_the_codes(bits, word_bytes):
    """Every code is found in its word and lane: lane l of word j is code j * lanes + l."""
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 64)).astype(np.uint8)
    words = upcast.as_words(reference.pack(jnp.asarray(codes), bits), bits, upcast.lanes(bits, word_bytes))
    assert len({w.shape for w in words}) == 1
    lanes = [upcast.lane_codes(tuple(words), bits, lane) for lane in range(upcast.lanes(bits, word_bytes))]
    np.testing.assert_array_equal(np.stack(lanes, -1).reshape(3, 64), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 32, 33])
def test_unpack_inverts_pack_and_no_bit_is_wasted(bits, count):
    codes = jnp.asarray(np.random.default_rng(1).integers(0, 2**bits, (2, count)), jnp.uint8)
    planes = reference.pack(codes, bits)
    assert [p.shape[-1] for p in planes] == [-(-count * w // 8) for w in plane_widths(bits)]
    np.testing.assert_array_equal(reference.unpack(planes, bits, count), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_layout_is_that_of_the_quantized_weights(bits):
    """What `jquant.core.packing` stores is read as it is."""
    packing = pytest.importorskip("jquant.core.packing")
    codes = jnp.asarray(np.random.default_rng(2).integers(0, 2**bits, (2, 37)), jnp.uint8)
    for ours, theirs in zip(reference.pack(codes, bits), packing.pack(codes, bits), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- the inline PTX, instruction by instruction ---


def run_ptx(text: str, operands: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs the few instructions that `packed` has, on arrays of 32-bit registers. Returns all of them."""
    registers = {name: np.asarray(value, np.uint32) for name, value in operands.items()}
    read = lambda name: np.uint32(int(name, 0)) if name[0].isdigit() else registers[name]

    def fma(kind, a, b, c):
        halves = lambda r: np.ascontiguousarray(r).view(kind).astype(np.float64)  # exact, then rounded once
        a, b, c = np.broadcast_arrays(a, b, c)
        return (halves(a) * halves(b) + halves(c)).astype(np.float32).astype(kind).view(np.uint32)

    def prmt(a, b, selector):
        a, b, selector = np.broadcast_arrays(a, b, selector)
        eight = np.stack([(r >> np.uint32(8 * i)) & np.uint32(0xFF) for r in (a, b) for i in range(4)])
        out = np.zeros(a.shape, np.uint32)
        for i in range(4):
            pick = (selector >> np.uint32(4 * i)) & np.uint32(0xF)
            byte = np.take_along_axis(eight, (pick & 7)[None].astype(np.int64), 0)[0]
            sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
            out |= np.where(pick & 8, sign, byte).astype(np.uint32) << np.uint32(8 * i)
        return out

    def lop3(a, b, c, table):
        bits = [((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) for i in np.arange(32, dtype=np.uint32)]
        return sum(((np.uint32(table) >> n) & np.uint32(1)) << np.uint32(i) for i, n in enumerate(bits))

    steps = {
        "prmt.b32": prmt, "lop3.b32": lop3, "shl.b32": lambda a, b: a << b, "shr.b32": lambda a, b: a >> b,
        "and.b32": lambda a, b: a & b, "or.b32": lambda a, b: a | b,
        "xor.b32": lambda a, b: a ^ b, "mov.b32": lambda a: a,
        "fma.rn.bf16x2": lambda *a: fma(ml_dtypes.bfloat16, *a), "fma.rn.f16x2": lambda *a: fma(np.float16, *a),
    }  # fmt: skip
    for line in filter(None, (part.strip() for part in text.strip("{} ").split(";"))):
        if not line.startswith(".reg"):
            op, rest = line.split(" ", 1)
            to, *sources = (name.strip() for name in rest.split(","))
            registers[to] = steps[op](*map(read, sources))
    return registers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_packed_upcast_is_the_plain_one_for_every_word(bits, dtype):
    words = np.arange(2**16, dtype=np.uint16)
    pairs = np.stack([words, words[::-1]], -1).view(np.uint32)[:, 0]
    both = jnp.asarray(pairs.view(np.uint16))
    for lane in range(16 // bits):
        codes = upcast.lane_codes((both,), bits, lane)
        got = run_ptx(packed.int_asm(bits, lane, True, dtype), {"$1": pairs})["$0"].view(np.dtype(dtype))
        np.testing.assert_array_equal(got, upcast.integers(codes, bits, None, dtype))
        for zero in (0, 1, 2**bits - 1) if bits < 8 or dtype == jnp.float16 else ():
            z = jnp.asarray(zero, jnp.float32).astype(dtype)
            offset = np.asarray(jnp.asarray(-{2: 128, 4: 1024}[2 if dtype == jnp.bfloat16 else 4], dtype) - z)
            twice = np.full(pairs.shape, int(offset.view(np.uint16)) * 0x10001, np.uint32)
            got = run_ptx(packed.int_asm(bits, lane, False, dtype), {"$1": pairs, "$2": twice})["$0"].view(
                np.dtype(dtype)
            )
            np.testing.assert_array_equal(got, upcast.integers(codes, bits, z, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_packed_small_floats_are_the_plain_ones_for_every_code(dtype):
    e, words = ELEMENTS["fp4_e2m1"], np.arange(2**16, dtype=np.uint16)
    pairs = np.stack([words, words[::-1]], -1).view(np.uint32)[:, 0]
    for lane in range(4):
        codes = upcast.lane_codes((jnp.asarray(pairs.view(np.uint16)),), 4, lane)
        got = run_ptx(packed.float_asm(e, lane, dtype), {"$1": pairs})["$0"].view(np.dtype(dtype))
        np.testing.assert_array_equal(got, upcast.small_floats(codes, e, dtype))
    e, four = ELEMENTS["fp8_e4m3"], np.arange(256, dtype=np.uint8)
    ran = run_ptx(packed.bytes_asm(e, dtype), {"$2": four.view(np.uint32)})
    got = np.stack([ran["$0"], ran["$1"]], -1).reshape(-1).view(np.dtype(dtype))
    np.testing.assert_array_equal(got, upcast.small_floats(jnp.asarray(four, jnp.uint16), e, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entries", [ELEMENTS["nf4"].table, LLOYD4.table])
def test_the_packed_table_is_the_plain_one_for_every_word(entries, dtype):
    words = np.arange(2**16, dtype=np.uint16)
    pairs = np.stack([words, words[::-1]], -1).view(np.uint32)[:, 0]
    for half in range(2):
        ran = run_ptx(packed.table_asm(entries, half, dtype), {"$2": pairs})
        got = np.stack([ran["$0"], ran["$1"]], -1).reshape(-1).view(np.dtype(dtype)).reshape(-1, 2)
        for lane in range(2):
            codes = upcast.lane_codes((jnp.asarray(pairs.view(np.uint16)),), 4, 2 * half + lane)
            np.testing.assert_array_equal(got[:, lane], upcast.table(codes, entries, dtype))


def test_a_large_symmetric_table_is_a_polynomial_of_the_code():
    """Every value to 2^-12 of itself, before it is rounded; tables that are not symmetric, or small, are none."""
    coefficients = upcast.odd_polynomial(LLOYD4.table)
    assert coefficients is not None
    got = upcast.polynomial(jnp.arange(16, dtype=jnp.uint16), coefficients, 4, jnp.float32)
    assert np.max(np.abs(np.asarray(got, np.float64) / np.asarray(LLOYD4.table) - 1)) < 2.0**-11.9
    assert upcast.odd_polynomial(ELEMENTS["nf4"].table) is None
    assert upcast.odd_polynomial(LLOYD2.table) is None
    jump = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 9.0, 9.1)  # no smooth function
    assert upcast.odd_polynomial((*(-v for v in jump[::-1]), *jump)) is None
