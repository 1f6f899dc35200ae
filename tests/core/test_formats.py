"""Formats as a whole: blocks, scales, zero points, degenerate numbers, names."""

import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import FormatError, JQuantError
from jquant.core.formats import (
    ELEMENTS,
    PRESETS,
    Format,
    block_params,
    code_table,
    compute_params,
    decode,
    encode,
    parse_format,
)
from tests.core.cases import (
    COMPUTED,
    E4M3,
    E8M0,
    EVERY_FORMAT,
    FEW_FORMATS,
    INTS,
    PRESET_FORMATS,
    normal,
    params_of_elements,
    same_bits,
)

F32_EPS = 2.0**-24  # largest relative error of one rounding to float32


def representable(rows: np.ndarray, params, fmt: Format) -> np.ndarray:
    """Every value that each element of `rows` could take under `params`: float64 `[..., n, codes]`."""
    table = code_table(fmt).astype(np.float64)
    table = table[np.isfinite(table)]
    scale, zero = (np.asarray(a, np.float64)[..., None] for a in params_of_elements(params, fmt, rows.shape))
    return (table - zero) * scale


@pytest.mark.parametrize("fmt", [*FEW_FORMATS, *PRESET_FORMATS], ids=str)
def test_encode_is_nearest_under_its_scales(fmt):
    """No representable value is nearer, but for two roundings of the quotient x * (1 / scale): 4 |x| eps."""
    rows = normal((3, 37))
    params = compute_params(rows, fmt)
    x = np.asarray(rows, np.float64)
    decoded = np.asarray(decode(encode(rows, params, fmt), params, fmt), np.float64)
    best = np.abs(representable(x, params, fmt) - x[..., None]).min(-1)
    # The decoded value is itself rounded once more.
    assert (np.abs(decoded - x) <= best + 4 * np.abs(x) * F32_EPS + np.abs(decoded) * F32_EPS).all()


@pytest.mark.parametrize("fmt", [f for f in FEW_FORMATS if f.symmetric and not f.outer_block], ids=str)
def test_encode_is_exactly_nearest_where_the_quotient_is_exact(fmt):
    """With a power of two for a scale nothing is rounded but the number itself."""
    rows = normal((3, 37), seed=1)
    params = compute_params(rows, fmt)
    params = params._replace(
        scale=jnp.exp2(jnp.round(jnp.log2(params.scale.astype("float32")))).astype(fmt.scale_dtype)
    )
    x = np.asarray(rows, np.float64)
    decoded = np.asarray(decode(encode(rows, params, fmt), params, fmt), np.float64)
    assert (np.abs(decoded - x) == np.abs(representable(x, params, fmt) - x[..., None]).min(-1)).all()


def step_bound(x: np.ndarray, params, fmt: Format) -> np.ndarray:
    """Half an integer step, and what the rounding of the scale cuts off at the ends of the block's range."""
    n = x.shape[-1]
    low, high, step, size = np.zeros(x.shape), np.zeros(x.shape), fmt.tile_rows, fmt.group_size or n
    step = len(x) if fmt.block == "tensor" else step
    for i in range(0, len(x), step):
        for j in range(0, n, size):
            block = np.s_[i : i + step, j : j + size]
            low[block], high[block] = min(x[block].min(), 0), max(x[block].max(), 0)
    top = 2**fmt.bits - 1
    scale = np.asarray(params_of_elements(params, fmt, x.shape)[0], np.float64)
    reach = 2 * np.maximum(-low, high) if fmt.symmetric else high - low
    return scale / 2 + np.maximum(0, reach - top * scale)


@pytest.mark.parametrize("fmt", [f for f in COMPUTED if f.element in INTS], ids=str)
def test_integers_err_by_half_a_step(fmt):
    rows = normal((2, 13), seed=2)
    x = np.asarray(rows, np.float64)
    params = compute_params(rows, fmt)
    decoded = np.asarray(decode(encode(rows, params, fmt), params, fmt), np.float64)
    rounding = 6 * F32_EPS * np.abs(x).max()  # twice in the scale, twice in the quotient, the product, the value
    assert (np.abs(decoded - x) <= step_bound(x, params, fmt) + rounding).all()


@pytest.mark.parametrize("fmt", COMPUTED, ids=str)
def test_shapes_and_dtypes(fmt):
    rows = normal((2, 3, 13))
    params = compute_params(rows, fmt)
    blocks = {"channel": (2, 3, 1), "tensor": (1, 1, 1)}.get(fmt.block) or (2, -(-3 // fmt.tile_rows), fmt.blocks(13))
    assert params.scale.shape == blocks and params.scale.dtype == jnp.dtype(fmt.scale_dtype)
    assert fmt.blocks(13) == blocks[-1]
    assert (params.zero_point is None) == fmt.symmetric
    if params.zero_point is not None:
        assert params.zero_point.shape == blocks and params.zero_point.dtype == jnp.dtype(fmt.zero_dtype)
    codes = encode(rows, params, fmt)
    assert codes.shape == rows.shape and codes.dtype == jnp.uint8 and int(codes.max()) < 2**fmt.bits


@pytest.mark.parametrize(
    ("fmt", "shape"),
    [
        *[(fmt, (16, 256)) for fmt in [*FEW_FORMATS, Format("int4", 4), Format("int8", 1, False)]],
        (Format("int2", "tensor", False), (1, 1)),  # XLA does not rewrite a division of one element
        (Format("fp8_e4m3"), (1, 1)),
        (Format("int4", 5), (4, 37)),
    ],
    ids=str,
)
def test_jit_changes_no_bit(fmt, shape):
    rows = normal(shape, seed=3)

    def run(rows):
        params = compute_params(rows, fmt)
        codes = encode(rows, params, fmt)
        return params, codes, decode(codes, params, fmt)

    for a, b in zip(jax.tree.leaves(run(rows)), jax.tree.leaves(jax.jit(run)(rows))):
        assert same_bits(a, b)


@pytest.mark.parametrize("fmt", [f for f in FEW_FORMATS if isinstance(f.block, int) and not f.outer_block], ids=str)
@pytest.mark.parametrize("n", [4, 5, 11])
def test_groups_are_independent_and_the_last_may_be_shorter(fmt, n):
    fmt = fmt.replace(block=5)
    rows = normal((2, n), seed=4)
    params = compute_params(rows, fmt)
    whole = decode(encode(rows, params, fmt), params, fmt)
    channel = fmt.replace(block="channel")
    for i, start in enumerate(range(0, n, 5)):
        part = rows[:, start : start + 5]
        alone = compute_params(part, channel)
        assert same_bits(params.scale[:, i : i + 1], alone.scale)
        assert same_bits(whole[:, start : start + 5], decode(encode(part, alone, channel), alone, channel))


@pytest.mark.parametrize("symmetric", [True, False])
def test_tensor_blocks_keep_stacked_tensors_apart(symmetric):
    fmt = Format("int4", "tensor", symmetric)
    rows = normal((2, 3, 7)) * jnp.asarray([1.0, 100.0])[:, None, None]
    stacked = compute_params(rows, fmt, stacked=1)
    assert stacked.scale.shape == (2, 1, 1)
    for i in range(2):
        assert same_bits(stacked.scale[i], compute_params(rows[i], fmt).scale)


@pytest.mark.parametrize("fmt", [f for f in COMPUTED if f.zero_dtype == "uint8"], ids=str)
def test_zero_is_exact_whatever_the_block(fmt):
    """Every format has zero, but for zero points between codes: it comes back exactly from a block far from zero."""
    rows = jnp.asarray([[0.0, 3.0, 5.0, 4.0, 3.5, 0.0], [-9.0, 0.0, -8.0, -7.0, -9.5, 0.0]], jnp.float32)
    params = compute_params(rows, fmt)
    decoded = np.asarray(decode(encode(rows, params, fmt), params, fmt))
    assert (decoded[np.asarray(rows) == 0] == 0).all()


@hypothesis.given(
    element=st.sampled_from(INTS),
    block=st.sampled_from(["channel", 3]),
    rows=hnp.arrays(np.float32, (2, 7), elements=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)),
)
def test_asymmetric_blocks_always_contain_zero_exactly(element, block, rows):
    fmt = Format(element, block, symmetric=False)
    params = compute_params(jnp.asarray(rows), fmt)
    decoded = np.asarray(decode(encode(jnp.zeros_like(rows), params, fmt), params, fmt))
    assert (decoded == 0).all()


@pytest.mark.parametrize("fmt", COMPUTED, ids=str)
def test_zero_blocks_are_zeros(fmt):
    rows = jnp.zeros((2, 13), jnp.float32)
    params = compute_params(rows, fmt)
    assert (params_of_elements(params, fmt, rows.shape)[0] == (2.0**-126 if fmt.scale_dtype == E8M0 else 0)).all()
    assert (np.asarray(decode(encode(rows, params, fmt), params, fmt)) == 0).all()


@pytest.mark.parametrize("fmt", [f for f in COMPUTED if f.scale_dtype == "float32"], ids=str)
@pytest.mark.parametrize("value", [1.0, -0.3, 1e-30, -1e30])
def test_constant_blocks(fmt, value):
    """A constant comes back within half a step, the symmetric scale's own distance between absmax and its code."""
    rows = jnp.full((2, 13), value, jnp.float32)
    params = compute_params(rows, fmt)
    decoded = np.asarray(decode(encode(rows, params, fmt), params, fmt), np.float64)
    half = 0.5 / ELEMENTS[fmt.element].top if fmt.element in INTS and fmt.symmetric else 0.0
    assert (np.abs(decoded - np.float64(np.float32(value))) <= abs(value) * (half + 4 * F32_EPS)).all()
    assert len(np.unique(decoded)) == 1 or fmt.element == "ternary"  # the mean of fewer numbers is rounded differently


@pytest.mark.parametrize("fmt", [f for f in EVERY_FORMAT if f.block == 5], ids=str)
@pytest.mark.parametrize("size", [1e-38, 1e37])
def test_tiny_and_huge_numbers_stay_finite(fmt, size):
    """Underflow of a scale gives zeros, overflow the largest scale of its dtype; neither gives NaN or infinity.

    int2's -2 stands for 4/3 of the largest absolute value: below 3/4 of float32's range there is room for it.
    """
    rows = normal((2, 13)) * np.float32(size)
    params = compute_params(rows, fmt)
    decoded = np.asarray(decode(encode(rows, params, fmt), params, fmt))
    assert np.isfinite(np.asarray(params.scale, np.float32)).all()
    assert np.isfinite(decoded).all()
    assert np.abs(decoded).max() <= 2 * np.abs(np.asarray(rows)).max()


@pytest.mark.parametrize("fmt", [f for f in FEW_FORMATS if f.scale_dtype != "float16"], ids=str)
@pytest.mark.parametrize("exponent", [-80, 80])
def test_scaling_by_a_power_of_two_scales_the_result(fmt, exponent):
    """The codes do not change and the values scale exactly: no hidden epsilon in any scale."""
    rows, factor = normal((2, 13), seed=5), np.float32(2.0**exponent)
    params, scaled = compute_params(rows, fmt), compute_params(rows * factor, fmt)
    codes = encode(rows, params, fmt)
    assert same_bits(codes, encode(rows * factor, scaled, fmt))
    assert same_bits(decode(codes, params, fmt) * factor, decode(codes, scaled, fmt))


@pytest.mark.parametrize("fmt", FEW_FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(3, 0), (0, 5)], ids=str)
def test_empty_rows(fmt, shape):
    rows = jnp.zeros(shape, jnp.float32)
    params = compute_params(rows, fmt)
    assert decode(encode(rows, params, fmt), params, fmt).shape == shape


def test_asymmetric_range_may_be_wider_than_float32():
    """high - low overflows, the scale does not."""
    params = block_params(jnp.float32([-1e38]), jnp.float32([3e38]), Format("int8", symmetric=False))
    np.testing.assert_allclose(params.scale, 4e38 / 255, rtol=2e-7)
    assert params.zero_point.tolist() == [64]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    params = compute_params(jnp.asarray([[1.0, bad, 2.0]], jnp.float32), Format("int8"))
    assert not np.isfinite(np.asarray(params.scale)).any()


# --- names and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [*EVERY_FORMAT, *PRESET_FORMATS], ids=str)
def test_names_are_read_back(fmt):
    assert parse_format(str(fmt)) == fmt
    assert parse_format(f"  {str(fmt).upper()} ") == fmt


def test_names_are_different_for_different_formats():
    assert len({str(f) for f in EVERY_FORMAT}) == len(set(EVERY_FORMAT)) == len(EVERY_FORMAT)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("int8", Format("int8")),
        ("int4-g64", Format("int4", 64, scale_dtype="bfloat16")),
        ("int3-g64-asym", Format("int3", 64, symmetric=False, scale_dtype="bfloat16")),
        ("int4-asym-f16-g32", Format("int4", 32, symmetric=False, scale_dtype="float16")),
        ("nf4-g64-f32", Format("nf4", 64)),
        ("fp8_e4m3-tensor-bf16", Format("fp8_e4m3", "tensor", scale_dtype="bfloat16")),
        ("fp8_e4m3-128x128", Format("fp8_e4m3", (128, 128))),
        ("mxfp4", Format("fp4_e2m1", 32, scale_dtype=E8M0)),
        ("mxfp6-ceil", Format("fp6_e2m3", 32, scale_dtype=E8M0, scale_rule="ceil")),
        ("nvfp4-g32-4o6", Format("fp4_e2m1", 32, scale_dtype=E4M3, outer_block="tensor", four_over_six=True)),
        ("nf4-dq", Format("nf4", 64, scale_dtype="uint8", outer_block=256)),
        ("int4-g32-asym-zf16-u8-outer64", Format("int4", 32, False, "uint8", 64, zero_dtype="float16")),
        ("int8-g32-e8m0", Format("int8", 32, scale_dtype=E8M0)),
    ],
)
def test_names(text, want):
    assert parse_format(text) == want


@pytest.mark.parametrize(
    "text",
    [
        "int9",
        "",
        "int4-",
        "int4-g0",
        "int4-64",
        "int4-g64-foo",
        "nf4-asym",
        "mxfp4-asym",
        "int4-0x4",
        "int4-outer",
        "nvfp4-f32",
        "int4--g64",
        "4",
    ],
)
def test_names_that_cannot_be_read(text):
    with pytest.raises(FormatError, match="Format|format"):
        parse_format(text)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"element": "int1"}, "choose one of int2"),
        ({"element": "int4", "block": 0}, "group size >= 1"),
        ({"element": "int4", "block": True}, "group size >= 1"),
        ({"element": "int4", "block": 2.0}, "group size >= 1"),
        ({"element": "int4", "block": "row"}, "'channel' or 'tensor'"),
        ({"element": "fp8_e4m3", "symmetric": False}, "only int2 to int8"),
        ({"element": "nf4", "symmetric": False}, "only int2 to int8"),
        ({"element": "int4", "scale_dtype": "int8"}, "must be one of float32"),
        ({"element": "int4", "block": (128, 128, 1)}, r"\(rows, size\) of a tile"),
        ({"element": "int4", "block": (0, 128)}, r"\(rows, size\) of a tile"),
        ({"element": "int4", "block": (1, 128)}, "written block=128"),
        ({"element": "ternary", "symmetric": False}, "only int2 to int8"),
        ({"element": "int4", "scale_dtype": "uint8"}, "give an outer_block, such as 256"),
        ({"element": "int4", "outer_block": 256}, "for uint8 and e4m3 scales, not float32"),
        ({"element": "int4", "scale_dtype": "uint8", "outer_block": 0}, "None, 'tensor', 'channel' or a size >= 1"),
        ({"element": "int4", "symmetric": False, "scale_dtype": E8M0}, "e8m0 scales are for symmetric"),
        ({"element": "int4", "scale_rule": "up"}, "must be one of floor, even, ceil"),
        ({"element": "int4", "scale_rule": "ceil"}, "is for scale_dtype='float8_e8m0fnu'"),
        ({"element": "int4", "scale_rule": "even", "scale_dtype": E8M0}, "int4 has no mantissa"),
        ({"element": "int4", "four_over_six": True}, "four_over_six is for fp4_e2m1"),
        ({"element": "int4", "zero_dtype": "float32"}, "give symmetric=False"),
        ({"element": "int4", "symmetric": False, "zero_dtype": "int8"}, "zero_dtype 'int8' must be one of uint8"),
    ],
)
def test_fields_that_are_wrong(fields, says):
    with pytest.raises(FormatError, match=says) as e:
        Format(**fields)
    assert isinstance(e.value, (JQuantError, ValueError))


def test_formats_are_frozen_values():
    assert hash(Format("int4", 64)) == hash(Format("int4", 64))
    assert Format("int4").replace(block=32) == Format("int4", 32)
    with pytest.raises(AttributeError):
        Format("int4").block = 3  # type: ignore[misc]
    with pytest.raises(FormatError):
        Format("int4").replace(element="int44")


# Of the OCP MX specification v1.0 (table 1), NVIDIA's NVFP4, QLoRA, BitNet b1.58 and DeepSeek-V3's tiles.
MORE_PRESETS = {
    **{
        name: Format(element, 32, scale_dtype=E8M0)
        for name, element in [
            ("MXFP8", "fp8_e4m3"), ("MXFP8_E5M2", "fp8_e5m2"), ("MXFP6", "fp6_e2m3"), ("MXFP6_E3M2", "fp6_e3m2"),
            ("MXFP4", "fp4_e2m1"),
        ]
    },
    "NVFP4": Format("fp4_e2m1", 16, scale_dtype=E4M3, outer_block="tensor"),
    "NVFP4_FOUR_OVER_SIX": Format("fp4_e2m1", 16, scale_dtype=E4M3, outer_block="tensor", four_over_six=True),
    "NF4_DQ": Format("nf4", 64, scale_dtype="uint8", outer_block=256),
    "TERNARY": Format("ternary", "tensor"),
    "FP8_E4M3_BLOCK128": Format("fp8_e4m3", (128, 128)),
}  # fmt: skip


def test_presets_are_what_their_names_say():
    for name, fmt in PRESETS.items():
        if name in MORE_PRESETS:
            assert fmt == MORE_PRESETS[name]
            continue
        element, *words = name.lower().replace("fp8_", "fp8.").split("_")
        assert fmt.element.replace("_", ".") == element
        group = next((int(w[1:]) for w in words if w[0] == "g"), None)
        assert fmt.group_size == group or name == "NF4"
        assert fmt.symmetric == ("asym" not in words)
        assert (fmt.block == "tensor") == ("tensor" in words)
        assert parse_format(str(fmt)) == fmt


def test_every_element_can_be_asked_for():
    for element, block in itertools.product(ELEMENTS, ["channel", 64]):
        assert Format(element, block).bits == ELEMENTS[element].bits
