"""`parse_method`."""

import pytest

import jquant as jq
from jquant.methods import METHODS


@pytest.mark.parametrize(
    "text, name",
    [
        ("gptq", "gptq()"),
        (" rotate + gptq-act-order ", "rotate() + gptq(act_order=True)"),
        ("rotate(seed=1)+qronos(True, damp=0.02)", "rotate(seed=1) + qronos(act_order=True, damp=0.02)"),
        ("smoothquant(0.5)+rtn()", "smoothquant() + rtn()"),
        ("gptq(damp=1e+0)", "gptq(damp=1.0)"),
        ("best", "qronos(act_order=True, search=True)"),
        ("rotate+gptq(act_order=True)+lowrank(16)", "rotate() + gptq(act_order=True) + lowrank(rank=16)"),
        ("lowrank_inputs(4)+gptq-act-order", "lowrank_inputs(rank=4) + gptq(act_order=True)"),
        ("lowrank(budget=5000, dtype='float32')", "lowrank(budget=5000, dtype=float32)"),
    ],
)
def test_names_and_settings(text, name):
    assert jq.parse_method(text).name == name


def test_settings_for_all_that_go_column_by_column():
    assert jq.parse_method("rotate+gptq", act_order=True).name == "rotate() + gptq(act_order=True)"
    with pytest.raises(jq.JQuantError, match="takes no act_order"):
        jq.parse_method("rotate+rtn", act_order=True)


@pytest.mark.parametrize("name", METHODS)
def test_every_name_is_a_method(name):
    assert isinstance(jq.parse_method(name), jq.Method)


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "does not exist"), ("gptq+", "does not exist"), ("gptq(", "does not exist"), ("rtnn", "choose from rtn,"),
        ("gptq(damp=x)", "can't be read"), ("gptq(damp=-1)", "damp >= 0"), ("gptq(dampen=1)", "unexpected keyword"),
        ("lowrank(8)+gptq", "put gptq"), ("gptq+lowrank_inputs(2)", "put gptq"), ("lowrank(8, budget=9)", "not both"),
        ("gptq(open('x'))", "can't be read"), ("gptq()()", "can't be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(text, match):
    with pytest.raises(jq.JQuantError, match=match):
        jq.parse_method(text)
