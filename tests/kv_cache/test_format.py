"""Names of cache formats, and what a format may not be."""

import dataclasses

import pytest

from jquant.core.errors import FormatError
from jquant.kv_cache import CacheFormat, Coding, init, parse
from jquant.kv_cache.format import PRESETS, parse_coding
from tests.kv_cache.cases import FORMATS


@pytest.mark.parametrize("name", [*FORMATS, *PRESETS, "int8-f32", "fp8_e4m3-f16", "int4-g64-asym-rot,seed=3"])
def test_a_name_is_the_inverse_of_str(name):
    fmt = parse(name)
    assert parse(str(fmt)) == fmt == parse(fmt)
    assert hash(fmt) == hash(parse(str(fmt)))


def test_a_preset_is_changed_by_what_follows_it():
    assert parse("kivi4,residual=32,sinks=2") == dataclasses.replace(PRESETS["kivi4"], residual=32, sinks=2)


def test_keys_and_values_have_their_own_codings():
    fmt = parse("keys=int4-t32-asym,values=lloyd3-rot")
    assert (fmt.keys, fmt.values) == (parse_coding("int4-t32-asym"), Coding("lloyd3", rotations=1))
    assert fmt.keys.tokens == 32 and fmt.values.bits == 3


def test_scales_of_a_token_and_head_are_two_bytes_unless_said():
    assert parse_coding("int8").format.scale_dtype == "bfloat16"
    assert parse_coding("int8-f32").format.scale_dtype == "float32"


@pytest.mark.parametrize(
    "name, message",
    [
        ("int9", "int9"),
        ("int4-oops", "'oops' is not understood.*lloyd4, behind a format any of -t32.*fine4"),
        ("keys=int8", "does not say how keys and values"),
        ("int8,sinks=-1", "is not understood"),
        ("int8,depth=3", "depth=3"),
        ("int8-tensor", "one static scale is for fp8"),
        ("int4-128x128", "tiles"),
        ("nf4-dq", "uint8 scales"),
        ("ternary-tensor", "fp8_e4m3 and fp8_e5m2|ternary"),
        ("int4-g32-t64", "blocks of tokens"),
        ("float32-rot", "floats no rotation"),
        ("lloyd4-t32", "no blocks of tokens"),
    ],
)
def test_errors_of_names(name, message):
    with pytest.raises(FormatError, match=message):
        parse(name)


def test_errors_of_fields():
    with pytest.raises(FormatError, match="rotations <= 2"):
        Coding("lloyd4", rotations=3)
    with pytest.raises(FormatError, match="must not be negative"):
        CacheFormat(Coding("float32"), Coding("float32"), sinks=-1)


# Shares of bfloat16's bytes with head_dim 64: the goals are 0.52 of 8 bits, 0.29 of 4 bits, 0.17 of 2 bits.
@pytest.mark.parametrize(
    "name, most",
    [
        ("int8", 0.52), ("fp8_e4m3", 0.52), ("fp8_e4m3-tensor", 0.5), ("int4-g64-asym", 0.29), ("nvfp4", 0.29),
        ("lloyd4-rot", 0.29), ("keys=int4-t64-asym,values=int4-g64-asym-rot", 0.29), ("lloyd2-rot2", 0.17),
        ("keys=int2-t64-asym,values=int2-g64-asym", 0.17), ("fp8_e5m2", 0.52), ("fp8_e5m2-tensor", 0.5),
        ("nvfp4-4o6", 0.29), ("kivi4", 0.29), ("kivi2", 0.17), ("turbo4", 0.29), ("turbo2", 0.17),
        ("fine4", 0.29), ("fine2", 0.17),
    ],
)  # fmt: skip
def test_bytes_scales_included(name, most):
    count = lambda fmt: sum(a.nbytes for a in (*_stored(fmt, "keys"), *_stored(fmt, "values")))
    assert count(name) <= most * count("bfloat16")


def _stored(name, which):
    store = getattr(init(2, 128, 2, 64, name), which)
    return [a for a in (*store.codes, store.scale, store.zero_point) if a is not None]
