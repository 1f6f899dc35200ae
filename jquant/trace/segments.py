"""A model's line of instructions, cut where little crosses: what a derivative is taken through, segment by segment.

Between two products with parameters the line is narrowest somewhere; where that is no wider than in front of the one
and behind the other, it is cut: in a transformer where only the residual stream crosses. The product that makes the
logits is a segment of its own. Nothing is computed here.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.trace import compat, interpreter
from jquant.trace.line import Instr, Line, Sym
from jquant.trace.program import Numbered, Numbering, Operand, closure, producers_of, run_numbered, syms
from jquant.trace.rearrange import is_ref
from jquant.trace.uses import find_use


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """One segment of a line.

    Attributes:
      key: equal for segments that compute the same function, with the same derivative, of other values.
      instrs: what it is made of, in order.
      inputs: Syms that come in: activations of earlier segments, arguments, captured constants.
      operands: the parameters that it reads.
      outputs: Syms that later segments need and this one makes; of the last, the one that was asked for.
      run: `(inputs, operand values, reader) -> outputs`.
    """

    key: Any
    instrs: list[Instr]
    inputs: tuple[Sym, ...]
    operands: tuple[Operand, ...]
    outputs: tuple[Sym, ...]
    run: Callable[[Sequence[Any], Sequence[Any], interpreter.Reader], list[Any]]


class Head(NamedTuple):
    """A product of one value with a parameter, and entrywise operations, at the end of a line: its rows stand alone.

    Attributes:
      x: the value.
      path: the parameter.
      axis: the longest dimension of `x` that is one of the result too.
      instrs: the numbers of the instructions.
    """

    x: Sym
    path: str
    axis: int
    instrs: list[int]


def cut_line(line: Line, root: Sym, head: Head | None) -> list[Segment]:
    """What makes `root`, in segments; the last one is the head, if there is one."""
    found = closure(line, producers_of(line), [root], lambda i: True)
    tail = [] if head is None else head.instrs
    body = sorted(i for i in found if not line.instrs[i].static and i not in tail)
    last = root if head is None else head.x
    cuts = [0, *_narrow(line, body, last, bool(tail)), len(body)]
    runs = [body[a:b] for a, b in zip(cuts, cuts[1:]) if a < b]
    runs += [tail] if tail else []
    later = {root}
    segments = []
    for numbers in reversed(runs):
        segments.append(_segment(line, numbers, later))
        later = later | set(segments[-1].inputs)
    return segments[::-1]


def _narrow(line: Line, body: list[int], last: Sym, headed: bool) -> list[int]:
    """Where to cut: the places in `body` that are no wider than their neighbours between other products."""
    width = _widths(line, body, last)
    products = [p for p, i in enumerate(body) if _is_product(line.instrs[i])]
    products += [len(body)] if headed else []
    places = [min(range(a + 1, b + 1), key=width.__getitem__) for a, b in zip(products, products[1:])]
    sizes = [math.inf, *[width[p][0] for p in places], math.inf]
    return [p for k, p in enumerate(places, 1) if p < len(body) and sizes[k] <= min(sizes[k - 1], sizes[k + 1])]


def _is_product(instr: Instr) -> bool:
    """It multiplies by a parameter, looks one up, or does more than that."""
    if instr.eqn is None or not any(map(is_ref, instr.args)):
        return False
    return instr.eqn.primitive.name in interpreter.ENTER or find_use(instr.eqn, list(instr.args)) is not None


def _widths(line: Line, body: list[int], last: Sym) -> list[tuple[int, int]]:
    """For each place in `body`, bytes that cross it: of what parameters have a part in, and of everything."""
    end: dict[Sym, int] = {}
    for p, i in enumerate(body):
        end.update((s, p) for s in syms(line.instrs[i].args))
    end[last] = len(body)
    begin = dict.fromkeys(end, -1)
    begin.update((o, p) for p, i in enumerate(body) for o in line.instrs[i].outs)
    made: set[Sym] = set()
    for i in body:
        if any(is_ref(a) or (isinstance(a, Sym) and a in made) for a in line.instrs[i].args):
            made.update(line.instrs[i].outs)
    change = np.zeros((len(body) + 2, 2), np.int64)
    for s, p in end.items():
        if is_float(s):
            size = s.size * s.aval.dtype.itemsize * np.array([s in made, True])
            change[begin[s] + 1] += size
            change[p + 1] -= size
    return [(int(a), int(b)) for a, b in np.cumsum(change, axis=0)]


def is_float(s: Sym) -> bool:
    """Whether a value can have a derivative."""
    return bool(jnp.issubdtype(s.aval.dtype, jnp.inexact))


def _segment(line: Line, numbers: list[int], later: set[Sym]) -> Segment:
    made = {o for i in numbers for o in line.instrs[i].outs}
    wants = [s for i in numbers for s in syms(line.instrs[i].args) if s.static]
    static = closure(line, producers_of(line), wants, lambda i: line.instrs[i].static)
    order = [*sorted(static), *numbers]
    made |= {o for i in static for o in line.instrs[i].outs}
    numbering = Numbering()
    program = [numbering.instr(line.instrs[i]) for i in order]
    inputs = tuple(s for s in numbering.numbers if s not in made)
    outputs = tuple(o for i in numbers for o in line.instrs[i].outs if o in later)
    key = (
        tuple((p.instr.key, _derivative_key(p.instr), p.args, p.outs) for p in program),
        tuple(numbering.numbers[s] for s in inputs), tuple(numbering.numbers[s] for s in outputs),
        tuple((s.shape, str(s.aval.dtype)) for s in inputs),
    )  # fmt: skip
    operands = tuple(Operand(unit, cuts) for unit, cuts in numbering.refs)
    run = _runner(program, numbering, inputs, outputs)
    return Segment(key, [line.instrs[i] for i in numbers], inputs, operands, outputs, run)


def _runner(
    program: list[Numbered], numbering: Numbering, inputs: Sequence[Sym], outputs: Sequence[Sym]
) -> Callable[..., list[Any]]:
    ins, results = [numbering.numbers[s] for s in inputs], [numbering.numbers[s] for s in outputs]

    def run(inputs: Sequence[Any], operands: Sequence[Any], reader: interpreter.Reader) -> list[Any]:
        env = dict(zip(ins, inputs, strict=True))
        run_numbered(program, env, operands, reader, interpreter.Frame())
        return [v.array() if is_ref(v) else v for v in (env[i] for i in results)]

    return run


# --- derivatives that functions bring along ---


def _derivative_key(instr: Instr) -> Any:
    """What tells apart functions that compute the same and have other derivatives: `eqn_key` leaves those out."""
    eqn = instr.eqn
    if eqn is None or not _is_custom(eqn):
        return None
    free = [i for i, v in enumerate(eqn.invars) if jnp.issubdtype(v.aval.dtype, jnp.inexact)]

    def pulled(args: list[Any]) -> Any:
        def run(*some: Any) -> list[Any]:
            given = dict(zip(free, some, strict=True))
            outs = compat.bind(eqn, *[given.get(i, a) for i, a in enumerate(args)])
            return [o for o in outs if jnp.issubdtype(o.dtype, jnp.inexact)]

        outs, pull = jax.vjp(run, *[args[i] for i in free])
        return pull([o + o for o in outs])  # some cotangents that are no constants

    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    try:
        jaxpr, _ = compat.trace(pulled, shapes)
    except Exception:  # whatever a rule may not like: it is not shared
        return ("id", id(eqn))
    return compat.static_key(jaxpr)


def _is_custom(eqn: Any) -> bool:
    return eqn.primitive.name in compat.CUSTOM_CALLS or any(
        _is_custom(inner) for body in compat.sub_jaxprs(eqn) for inner in body.eqns
    )


# --- the head ---

_ENTRYWISE = frozenset(("convert_element_type", "mul", "div", "add", "sub", "max", "min", "neg", "tanh", "copy"))


def find_head(line: Line, root: Sym) -> Head | None:
    """The head whose result is `root`, or None."""
    producers, s = producers_of(line), root
    numbers: list[int] = []
    while s in producers:
        i = producers[s]
        instr = line.instrs[i]
        numbers.insert(0, i)
        if instr.eqn is None:
            return None
        if (found := _rows(instr)) is not None:
            return Head(*found, numbers)
        inner = syms(instr.args)
        rest = [a for a in instr.args if not isinstance(a, Sym)]
        if instr.eqn.primitive.name not in _ENTRYWISE or len(inner) != 1 or any(is_ref(a) or jnp.ndim(a) for a in rest):
            return None
        s = inner[0]
    return None


def _rows(instr: Instr) -> tuple[Sym, str, int] | None:
    """The value that is multiplied by a parameter, which, and its longest dimension that stays; the last dimension of
    the result must be the parameter's."""
    use = find_use(instr.eqn, list(instr.args))
    if use is None or use.kind != "dot" or not isinstance(use.x, Sym):
        return None
    contract, batch = instr.eqn.params["dimension_numbers"]
    mine = 1 - use.which
    free = [d for d in range(use.x.ndim) if d not in contract[mine] and d not in batch[mine]]
    theirs = len(use.ref.shape) - len(contract[use.which]) - len(batch[use.which])
    if use.which == 0 or theirs != 1 or batch[mine] or not free:
        return None
    return use.x, use.ref.path, max(free, key=lambda d: use.x.shape[d])
