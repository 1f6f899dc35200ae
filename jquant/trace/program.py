"""A model's line of instructions, cut into parts that are run one after the other.

`plan` cuts the line in front of every group of wanted matmuls that share an input. Parts of the same structure (the
layers of a model) have the same `key` and are compiled once. Nothing is computed here.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jquant.core.activation import Activation
from jquant.trace import compat, interpreter
from jquant.trace.line import Instr, Line, Sym
from jquant.trace.observe import Member, Observed, ObserveReader
from jquant.trace.rearrange import is_ref
from jquant.trace.sites import input_key
from jquant.trace.streams import RoundingReader
from jquant.trace.uses import Use, find_use
from jquant.trace.view import Ref


class Unit(NamedTuple):
    """What is solved at once: a leaf, or one slice of a stacked leaf.

    Attributes:
      path: the leaf.
      at: `(axis, index)` of the full leaf, for each stacked axis that was walked.
      cuts: the cuts that take it from the full leaf.
    """

    path: str
    at: tuple[tuple[int, int], ...]
    cuts: tuple[tuple[int, ...], ...]


def unit_of(ref: Ref) -> tuple[Unit, tuple[tuple[int, ...], ...]]:
    """The unit that a Ref of a `kept.Later` belongs to, and the cuts that take the Ref's value from the unit's."""
    cuts, n = ref.value.cuts, 0
    # Dropping one index is a slice of size 1 and the removal of its axis.
    while n + 1 < len(cuts) and len(cuts[n]) == 3 and cuts[n][2] == 1 and len(cuts[n + 1]) == 1:
        n += 2
    at = tuple((i.axis, i.at) for i in ref.stack[: n // 2])
    return Unit(ref.path, at, cuts[:n]), cuts[n:]


def unit_axes(axes: tuple[int, ...], at: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """Axes of the full leaf as a unit names them, without those that were walked."""
    gone = {axis for axis, _ in at}
    return tuple(-sum(b not in gone for b in range(a, 0)) for a in axes if a not in gone)


class Operand(NamedTuple):
    """A parameter that a part reads: a unit, and the cuts that remain."""

    unit: Unit
    cuts: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One part of the line.

    Attributes:
      key: equal for parts that run the same program on other values.
      inputs: Syms that come in: activations of earlier parts, arguments, captured constants.
      operands: the parameters that it reads.
      outputs: Syms that later parts need and this one makes.
      later: all Syms that later parts need.
      observed: operand number -> unit, for the wanted uses at its end.
      run: `(inputs, operand values) -> (outputs, statistics by group)`, to be jitted.
      members: filled when `run` is traced: for each observed operand, where its statistics are.
      skipped: likewise, for each that has a use without statistics, why.
    """

    key: Any
    inputs: tuple[Sym, ...]
    operands: tuple[Operand, ...]
    outputs: tuple[Sym, ...]
    later: frozenset[Sym]
    observed: dict[int, Unit]
    run: Callable[..., Any]
    members: dict[int, dict[Member, None]]
    skipped: dict[int, str]


class _Group(NamedTuple):
    position: int
    instrs: tuple[int, ...]
    wanted: tuple[str, ...]


def _groups(line: Line, wanted: set[str]) -> list[_Group]:
    """Instructions that read wanted leaves; those that share their input are one group, at the place of its first."""
    found: dict[Any, list[int]] = {}
    paths: dict[Any, list[str]] = {}
    for i, instr in enumerate(line.instrs):
        mine = [a.path for a in instr.args if is_ref(a) and a.path in wanted]
        if not mine or instr.eqn is None:
            continue
        use = find_use(instr.eqn, list(instr.args))
        if use is None and instr.eqn.primitive.name not in interpreter.ENTER:
            continue
        if use is not None and use.kind == "lookup":
            continue
        key = (i,) if use is None else (*_input(use), *map(id, syms(instr.args)))
        found.setdefault(key, []).append(i)
        paths.setdefault(key, []).extend(mine)
    groups = [_Group(min(v), tuple(v), tuple(paths[k])) for k, v in found.items()]
    return sorted(groups, key=lambda g: g.position)


def _input(use: Use) -> tuple[Any, ...]:
    # The layer that a weight belongs to says nothing about its input.
    kind, x, extra, _ = input_key(use)
    return (kind, x, extra)


def plan(
    line: Line, wanted: set[str], needs: frozenset[str], rounds: Mapping[str, Activation] = MappingProxyType({})
) -> list[Part]:
    """Cuts the line in front of every group of uses of the wanted leaves.

    The parts together run what the inputs of those uses need, once, and nothing behind the last.

    Args:
      line: the program.
      wanted: paths.
      needs: the statistics.
      rounds: path -> how the inputs of a leaf's products are rounded.
    """
    groups = _groups(line, wanted)
    needed = _needed(line, groups)
    ends = [g.position for g in groups]
    parts, start = [], 0
    for group, end in zip(groups, ends, strict=True):
        parts.append(_part(line, start, end, group, groups, needed, needs, rounds))
        start = end
    return parts


def syms(args: Iterable[Any]) -> list[Sym]:
    return [a for a in args if isinstance(a, Sym)]


def producers_of(line: Line) -> dict[Sym, int]:
    return {o: i for i, instr in enumerate(line.instrs) for o in instr.outs}


def closure(line: Line, producers: dict[Sym, int], roots: Iterable[Sym], keep: Callable[[int], bool]) -> set[int]:
    """The instructions that `roots` depend on, through instructions for which `keep` holds."""
    found: set[int] = set()
    stack = [producers[s] for s in roots if s in producers]
    while stack:
        i = stack.pop()
        if i in found or not keep(i):
            continue
        found.add(i)
        stack.extend(producers[s] for s in syms(line.instrs[i].args) if s in producers)
    return found


def _needed(line: Line, groups: list[_Group]) -> set[int]:
    roots = [s for g in groups for i in g.instrs for s in syms(line.instrs[i].args)]
    return closure(line, producers_of(line), roots, lambda i: True)


def _part(
    line: Line, start: int, end: int, group: _Group, groups: list[_Group], needed: set[int], needs: frozenset[str],
    rounds: Mapping[str, Activation],
) -> Part:  # fmt: skip
    producers = producers_of(line)
    body = [i for i in range(start, end) if i in needed and not line.instrs[i].static]
    made = {o for i in body for o in line.instrs[i].outs}
    ends = [s for i in group.instrs for s in syms(line.instrs[i].args)]
    later = _later_needs(line, end, groups, needed, producers)
    # The observed instructions' operands that this part does not make itself come in like any other.
    wants = [*[s for i in body for s in syms(line.instrs[i].args)], *ends]
    static = closure(line, producers, [s for s in wants if s.static], lambda i: line.instrs[i].static)
    order = [*sorted(static), *body]
    made |= {o for i in static for o in line.instrs[i].outs}
    outputs = [o for i in body for o in line.instrs[i].outs if o in later]
    numbering = Numbering()
    program = [numbering.instr(line.instrs[i]) for i in order]
    tail = [numbering.instr(line.instrs[i], outs=False) for i in group.instrs]
    inputs = tuple(s for s in numbering.numbers if s not in made)
    outs = tuple(sorted(outputs, key=lambda s: numbering.numbers[s]))
    acts = {str(i): rounds[unit.path] for i, (unit, _) in enumerate(numbering.refs) if unit.path in rounds}
    key = (
        tuple((p.instr.key, p.args, p.outs) for p in program), tuple((p.instr.key, p.args) for p in tail),
        tuple(numbering.numbers[s] for s in inputs), tuple(numbering.numbers[s] for s in outs), needs,
        tuple(acts.items()), tuple((s.shape, str(s.aval.dtype)) for s in inputs),
    )  # fmt: skip
    observed = {
        numbering.refs.index(unit_of(a)): unit_of(a)[0]
        for i in group.instrs
        for a in line.instrs[i].args
        if is_ref(a) and a.path in group.wanted
    }
    members: dict[int, dict[Member, None]] = {}
    skipped: dict[int, str] = {}
    run = _runner(program, tail, numbering, inputs, outs, set(observed), needs, acts, members, skipped)
    operands = tuple(Operand(unit, cuts) for unit, cuts in numbering.refs)
    return Part(key, inputs, operands, outs, frozenset(later), observed, run, members, skipped)


def _later_needs(line: Line, end: int, groups: list[_Group], needed: set[int], producers: dict[Sym, int]) -> set[Sym]:
    """Values that instructions from `end` on read, directly or as observed operands of a later group."""
    later = {s for i in range(end, len(line.instrs)) if i in needed for s in syms(line.instrs[i].args)}
    return later | {s for g in groups if g.position > end for i in g.instrs for s in syms(line.instrs[i].args)}


class Numbered(NamedTuple):
    """An instruction whose values have numbers instead of names."""

    instr: Instr
    args: tuple[Any, ...]
    outs: tuple[int, ...]

    def values(self, env: Mapping[int, Any], operands: Sequence[Any]) -> list[Any]:
        """Its arguments."""

        def value(a: Any, original: Any) -> Any:
            if a[0] == "sym":
                return env[a[1]]
            if a[0] == "ref":
                return Ref(operands[a[1]], None, str(a[1]), *a[2:5])
            return original

        return [value(a, o) for a, o in zip(self.args, self.instr.args, strict=True)]


def run_numbered(
    program: Iterable[Numbered], env: dict[int, Any], operands: Sequence[Any], reader: Any, frame: interpreter.Frame
) -> None:
    """Runs instructions in order; what they give goes into `env`."""
    for one in program:
        env.update(zip(one.outs, one.instr.run(one.values(env, operands), reader, frame), strict=True))


class Numbering:
    """Names that are equal in parts of equal structure: Syms and operands by the order in which they are met."""

    def __init__(self) -> None:
        self.numbers: dict[Sym, int] = {}
        self.refs: list[tuple[Unit, Any]] = []

    def sym(self, s: Sym) -> int:
        return self.numbers.setdefault(s, len(self.numbers))

    def instr(self, instr: Instr, outs: bool = True) -> "Numbered":
        args = tuple(self._operand(a) for a in instr.args)
        return Numbered(instr, args, tuple(self.sym(s) for s in instr.outs) if outs else ())

    def _operand(self, a: Any) -> Any:
        if isinstance(a, Sym):
            return ("sym", self.sym(a))
        if is_ref(a):
            unit = unit_of(a)
            if unit not in self.refs:
                self.refs.append(unit)
            return ("ref", self.refs.index(unit), a.dims, a.casts, a.sliced, a.value.shape, str(a.value.dtype))
        return ("value", compat.static_key(np.asarray(a)), str(jnp.result_type(a)))


def _runner(
    program: list[Numbered], tail: list[Numbered], numbering: Numbering, inputs: Sequence[Sym], outs: Sequence[Sym],
    observed: set[int], needs: frozenset[str], acts: Mapping[str, Activation], members: dict[int, dict[Member, None]],
    skipped: dict[int, str],
) -> Callable[..., Any]:  # fmt: skip
    ins, results = [numbering.numbers[s] for s in inputs], [numbering.numbers[s] for s in outs]

    def run(inputs: Sequence[Any], operands: Sequence[Any]) -> tuple[list[Any], dict[int, Observed]]:
        env = dict(zip(ins, inputs, strict=True))
        frame, execute = interpreter.Frame(), RoundingReader(acts, "cross" in needs)
        observe = ObserveReader({str(i) for i in observed}, needs, acts)

        run_numbered(program, env, operands, execute, frame)
        for one in tail:
            one.instr.run(one.values(env, operands), observe, frame)
        members.update({int(p): m for p, m in observe.members.items()})
        skipped.update({int(p): reason for p, reason in observe.skipped.items()})
        arrays = [v.array() if is_ref(v) else v for v in (env[i] for i in results)]
        return arrays, observe.collect(frame)

    return run
