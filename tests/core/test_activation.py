"""`Activation` and `Policy`: what can be said, and its names."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jquant as jq
from jquant.core.activation import ACTIVATION_ELEMENTS, POLICIES, parse_activation, split_policy
from jquant.core.errors import FormatError, RecipeError
from jquant.core.formats import PRESETS, Format


@st.composite
def activations(draw) -> jq.Activation:
    how = draw(st.sampled_from(["dynamic", "max", "percentile", "mse"]))
    block = "tensor" if how != "dynamic" else draw(st.sampled_from(["token", "tensor"]))
    element = draw(st.sampled_from(ACTIVATION_ELEMENTS))
    symmetric = True if element.startswith("fp8") else draw(st.booleans())
    percentile = draw(st.sampled_from([99.0, 99.99, 100.0])) if how == "percentile" else 99.99
    return jq.Activation(element, block, symmetric, how, percentile)


@given(activations(), st.sampled_from(list(PRESETS.values())))
def test_a_name_stands_for_one_policy(act, fmt):
    assert parse_activation(str(act)) == act
    policy = jq.Policy(fmt, act)
    assert jq.parse_policy(str(policy)) == policy
    assert jq.parse_policy(str(fmt)) == fmt
    assert hash(policy) == hash(jq.Policy(fmt, dataclasses.replace(act)))
    assert act.format.element == act.element and act.format.symmetric == act.symmetric


def test_presets():
    assert set(POLICIES) == {"W8A8", "W8A8_STATIC", "W4A8", "W4A16", "FP8", "FP8_STATIC"}
    for name, policy in POLICIES.items():
        assert getattr(jq, name) is policy
        assert jq.parse_policy(name.lower().replace("_", "-")) is policy
    assert str(jq.W8A8) == "int8+int8" and str(jq.W4A16) == "int4-g128"
    assert str(jq.W8A8_STATIC) == "int8+int8-max-asym"
    assert split_policy(jq.FP8) == (jq.FP8_E4M3, jq.Activation("fp8_e4m3"))
    assert split_policy(jq.INT8) == (jq.INT8, None)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: jq.Activation("nf4"), "nf4.*int8.*fp8_e4m3"),
        (lambda: jq.Activation(block="channel"), "'channel' must be 'token' or 'tensor'"),
        (lambda: jq.Activation(range="max"), "per token.*needs block='tensor'"),
        (lambda: jq.Activation(block="tensor", range="min"), "range 'min'.*percentile"),
        (lambda: jq.Activation("fp8_e4m3", symmetric=False), "no zero point"),
        (lambda: jq.Activation("int8", "tensor", range="percentile", percentile=20), "percentile 20"),
        (lambda: jq.Policy("int8"), "Policy: needs a Format"),
        (lambda: jq.Policy(jq.INT8, jq.INT8), "Policy: needs a Format and an Activation"),
        (lambda: jq.parse_policy("int8+int8-g64"), "'g64' is not understood.*int8-max-asym"),
        (lambda: jq.parse_policy("int8+"), "element ''"),
    ],
)
def test_what_can_not_be_is_said(make, words):
    with pytest.raises(FormatError, match=words):
        make()


def test_recipes_take_policies():
    recipe = jq.Recipe({"*head*": None, "*mlp*": jq.W4A8, "*": jq.INT8})
    assert recipe("a/mlp/up") == jq.W4A8 and recipe("q") == jq.INT8
    assert "'*mlp*': int4-g128+int8" in repr(recipe)
    assert jq.parse_recipe("*head*=none,*mlp*=int4-g128+int8,*=int8") == recipe
    assert jq.parse_recipe("w8a8", ["lm_head/kernel", "q"]).rules == (("*lm_head*", None), ("*", jq.W8A8))
    with pytest.raises(RecipeError, match="a Policy"):
        jq.Recipe({"*": jq.Activation()})
    assert isinstance(Format("int8"), Format)
