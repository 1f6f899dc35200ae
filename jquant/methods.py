"""`parse_method`: the methods by name, and a chain of them from a line of text."""

import ast
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from jquant.core.errors import JQuantError
from jquant.core.method import Method, chain
from jquant.fold.awq import awq
from jquant.fold.learned import learned_rotation
from jquant.fold.rotate import rotate
from jquant.fold.smoothquant import smoothquant
from jquant.solvers.gptaq import gptaq
from jquant.solvers.gptq import gptq
from jquant.solvers.hqq import hqq
from jquant.solvers.lowrank import lowrank
from jquant.solvers.lowrank_inputs import lowrank_inputs
from jquant.solvers.qronos import qronos
from jquant.solvers.rtn import rtn

METHODS: dict[str, Callable[..., Method]] = {
    "rtn": rtn,
    "rtn-search": partial(rtn, search=True),
    "rtn-weighted": partial(rtn, weighted=True),
    "hqq": hqq,
    "gptq": gptq,
    "gptq-act-order": partial(gptq, act_order=True),
    "gptq-search": partial(gptq, search=True),
    "gptaq": gptaq,
    "qronos": qronos,
    "best": partial(qronos, act_order=True, search=True),
    "awq": awq,
    "awq-scales": partial(awq, clip=False),
    "smoothquant": lambda alpha=0.8, **settings: smoothquant(alpha, **settings),
    "smoothquant-search": partial(smoothquant, alpha=None),
    "smoothquant-tokens": lambda alpha=0.6, **settings: smoothquant(
        alpha, **{"everywhere": True, "tokens_alike": True, **settings}
    ),
    "rotate": rotate,
    "lowrank": lowrank,
    "lowrank_inputs": lowrank_inputs,
    "learned_rotation": learned_rotation,
}
_COLUMNWISE = ("gptq", "gptaq", "qronos")  # those that take act_order and damp
_PART = re.compile(r"\s*([\w-]+)\s*(\(.*\))?\s*", re.S)


def parse_method(text: str, **settings: Any) -> Method:
    """The method that a text stands for: names joined by "+", from left to right, with settings as in a call if any.

        parse_method("gptq")
        parse_method("rotate+gptq-act-order")
        parse_method("rotate(seed=1)+qronos(act_order=True, search=True)")
        parse_method("gptq+lowrank(16)")

    Args:
      text: the names are those of the public functions, and some for settings that are often wanted; an error lists
        them.
      settings: for each of the methods that go column by column (act_order, damp); an error if there is none.

    Raises:
      JQuantError: a name that does not exist, or settings that can't be read or are out of range.
    """
    parts = re.split(r"\+(?![^(]*\))", text)
    if settings and not any(p.strip().startswith(_COLUMNWISE) for p in parts):
        raise JQuantError(f"{text} takes no {' and no '.join(settings)}; they are for {', '.join(_COLUMNWISE)}")
    try:
        return chain(*(_one(p, settings if p.strip().startswith(_COLUMNWISE) else {}) for p in parts))
    except (ValueError, TypeError) as e:
        raise JQuantError(f"{text}: {e}") from e


def _one(text: str, settings: dict[str, Any]) -> Method:
    found = _PART.fullmatch(text)
    name = found[1] if found else text.strip()
    if name not in METHODS:
        raise JQuantError(f"{name!r} does not exist; choose from {', '.join(METHODS)}")
    assert found is not None
    args, kwargs = _arguments(found[2] or "()")
    return METHODS[name](*args, **{**settings, **kwargs})


def _arguments(text: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        call = ast.parse(f"f{text}", mode="eval").body
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        args = [ast.literal_eval(a) for a in call.args]
        return args, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as e:
        raise JQuantError(f"the settings {text} can't be read; write them as in gptq(act_order=True, damp=0.02)") from e
