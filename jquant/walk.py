"""The sequential walk: every weight is solved on what the already quantized part of the model produces.

The model's line of parts (`trace.program`) is run once. In front of each group of matmuls that share an input the walk
stops, accumulates that input's statistics over all batches, has the group solved, and goes on with the quantized
weights. It holds the parameters (those that are solved and not read any more as codes only, if the caller let go of
them), the activations that cross the cut, two batches of a part's temporaries and one group's statistics.

For methods that ask for "cross" the float model walks beside it, part by part, on its own activations. Where those of
both would be widest they are not kept: the part that makes them runs once more when they are read.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.core import kept, memory
from jquant.core.activation import Activation
from jquant.core.errors import JQuantError, NonFiniteError
from jquant.core.per_use import held, holding
from jquant.core.qtensor import is_qtensor
from jquant.core.stats import Stats
from jquant.progress import Progress
from jquant.trace.function import call_args, call_key, trace_call
from jquant.trace.line import Line, Sym
from jquant.trace.observe import Member, Observed, gather_stats, merge_all, nothing
from jquant.trace.program import Operand, Part, Unit, plan, unit_axes
from jquant.trace.streams import Both, Weights, in_both


class Job(NamedTuple):
    """A unit to be solved at a stop of the walk.

    Attributes:
      unit: what.
      members: where its statistics are in `seen`.
      last: no later stop observes it.
      skipped: why one of its uses has no statistics, or "".
    """

    unit: Unit
    members: dict[Member, None]
    last: bool
    skipped: str = ""


Axes = tuple[tuple[int, ...], tuple[int, ...]]  # the contracted axes of a weight, and those that are solved apart
Solve = Callable[[list[Job], dict[int, Observed]], dict[Unit, Any]]


class _Program(NamedTuple):
    """The compiled part of a model.

    Attributes:
      step: `(inputs, operands, totals) -> (outputs, totals)`, the statistics added to those of the batches before.
      outputs: `(inputs, operands) -> outputs`.
      run: what both are made of.
      part: whose, and of all parts of its key.
    """

    step: Callable[..., Any]
    outputs: Callable[..., Any]
    run: Callable[..., Any]
    part: Part


class _Batch:
    """One batch on its way through the model: the plan for its shape, and the live values."""

    def __init__(self, arrays: list[Any], line: Line, parts: list[Part]):
        self.parts = parts
        self.fixed = {**dict(zip(line.arrays, arrays, strict=True)), **line.consts}
        self.live: dict[Sym, Any] = {}

    def value(self, s: Sym) -> Any:
        return self.live[s] if s in self.live else self.fixed[s]

    def advance(self, part: Part, outs: Iterable[Any]) -> None:
        live = {**self.live, **dict(zip(part.outputs, outs, strict=True))}
        self.live = {s: v for s, v in live.items() if s in part.later}


class Walk:
    """A model and its batches, ready to be walked.

    Args:
      apply, params: the function and its float parameters.
      batches: what `apply` takes after the parameters.
      wanted: paths of the leaves to be solved.
      needs: the statistics that are accumulated.
      rounds: path -> how the inputs of a leaf's matmuls will be rounded; the walk rounds them too.
      label: what is being done, for the line that shows it.

    Attributes:
      units: every unit that some stop observes.
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        params: Any,
        batches: list[Any],
        wanted: set[str],
        needs: frozenset[str],
        rounds: Mapping[str, Activation] = MappingProxyType({}),
        label: str = "quantizing",
    ):
        self.label = label
        self.plans: dict[Any, tuple[Line, list[Part]]] = {}
        self.batches = [self._prepare(apply, params, b, wanted, needs, rounds) for b in batches]
        first = self.batches[0].parts
        stops = [set(p.observed.values()) for p in first]
        if any([set(p.observed.values()) for p in b.parts] != stops for b in self.batches):
            raise JQuantError("quantize: batches of different shapes run through different matmuls; give one shape")
        self.stops = stops
        self.units = set().union(*stops) if stops else set()
        self.compiled: dict[Any, _Program] = {}
        self.two = "cross" in needs
        self.again = _widest(self.batches[0].parts) if self.two else frozenset()
        self.solved_at = {unit: k for k, units in enumerate(self.ready()) for unit in units}
        self.units_of = Counter(unit.path for unit in self.units)
        self.last_read = {o.unit.path: k for k in range(len(stops)) for b in self.batches for o in b.parts[k].operands}
        memory.give_back()

    def _prepare(
        self,
        apply: Any,
        params: Any,
        batch: Any,
        wanted: set[str],
        needs: frozenset[str],
        rounds: Mapping[str, Activation],
    ) -> _Batch:
        args, kwargs = call_args(batch)
        arrays, key = call_key(args, kwargs)
        if key not in self.plans:
            traced = trace_call(apply, params, args, kwargs)
            self.leaves = dict(zip(traced.paths, traced.leaves, strict=True))
            line = Line(traced)
            self.plans[key] = (line, plan(line, wanted, needs, rounds))
        return _Batch(arrays, *self.plans[key])

    def __len__(self) -> int:
        return len(self.stops)

    def ready(self) -> list[list[Unit]]:
        """The units that are solved at each stop, in the order in which `solve` gets them."""
        orders = [list(dict.fromkeys(part.observed.values())) for part in self.batches[0].parts]
        last = {unit: k for k, units in enumerate(orders) for unit in units}
        return [[u for u in units if last[u] == k] for k, units in enumerate(orders)]

    def run(
        self, solve: Solve, start: int = 0, solved: dict[Unit, Any] | None = None, after: Any = None
    ) -> dict[Unit, Any]:
        """Walks from stop `start` to the last.

        Args:
          solve: `(jobs, statistics by group) -> unit -> QTensor`, called at each stop.
          start, solved: where an interrupted walk goes on, and what it had solved (see `restore`).
          after: called as `after(stop, newly solved)` behind each stop.

        Returns:
          unit -> QTensor.

        Raises:
          NonFiniteError: an input holds NaN or infinity.
        """
        done = dict(solved or {})
        runs = len(self.batches)
        with Progress(len(self) * runs, self.label, "steps", done=start * runs) as progress:
            for k in range(start, len(self)):
                jobs, seen = self._stop(k, done, progress)
                memory.give_back(_SLACK)
                new = solve(jobs, seen)
                done.update(new)
                self._let_go(k, done)
                if after is not None:
                    after(k, new)
        return done

    def _stop(self, k: int, done: dict[Unit, Any], progress: Progress) -> tuple[list[Job], dict[int, Observed]]:
        totals: dict[int, Observed] | None = None
        values: dict[Operand, Any] = {}
        name = sorted(u.path for u in self.stops[k])[0]
        members: dict[Unit, dict[Member, None]] = {}
        skipped: dict[Unit, str] = {}
        compiled: dict[int, _Program] = {}  # batches of one shape have one part, whose key is long
        outs: list[Any] = []
        gone, catch_up = 0, self._catching_up(k, done)
        for batch in self.batches:
            catch_up(batch)
            part = batch.parts[k]
            inputs = [batch.value(s) for s in part.inputs]
            operands = [self._value(o, done, values) for o in part.operands]
            if id(part) not in compiled:
                compiled[id(part)] = self._compile(part)
            program = compiled[id(part)]
            model = program.part
            if totals is None:
                totals = nothing(jax.eval_shape(program.run, inputs, operands)[1])
            # The temporaries of two batches at a time: one is sent off while the one before it runs.
            jax.block_until_ready(outs)
            outs, totals = program.step(inputs, operands, totals)
            if self.two:  # they are twice as large
                jax.block_until_ready((outs, totals))
            del inputs
            gone += _bytes(batch.live)
            if k not in self.again:
                batch.advance(part, outs)
            if not outs:
                jax.block_until_ready(totals)
            if gone > _SLACK:
                memory.give_back(_SLACK)
                gone = 0
            members = {unit: model.members.get(i, {}) for i, unit in part.observed.items()}
            skipped = {unit: model.skipped.get(i, "") for i, unit in part.observed.items()}
            progress.step(name)
        assert totals is not None
        self._check_finite(members, totals)
        later = set().union(*self.stops[k + 1 :])
        return [Job(u, m, u not in later, skipped[u]) for u, m in members.items()], totals

    def _catching_up(self, k: int, done: dict[Unit, Any]) -> Callable[[_Batch], None]:
        """What brings a batch in front of stop k where the part before it was run for its statistics only."""
        if k - 1 not in self.again:
            return lambda batch: None
        then = {unit: q for unit, q in done.items() if self.solved_at[unit] < k - 1}
        values: dict[Operand, Any] = {}

        def catch_up(batch: _Batch) -> None:
            part = batch.parts[k - 1]
            operands = [self._value(o, then, values) for o in part.operands]
            batch.advance(part, self._compile(part).outputs([batch.value(s) for s in part.inputs], operands))

        return catch_up

    def _let_go(self, k: int, done: dict[Unit, Any]) -> None:
        """Behind stop k: a leaf that is solved as a whole, and that no part reads that is still to run."""
        for unit, q in done.items():
            if self.units_of[unit.path] == 1 and not unit.at and self.last_read[unit.path] < k:
                self.leaves[unit.path] = holding(self.leaves[unit.path], q)

    def _compile(self, part: Part) -> _Program:
        if part.key not in self.compiled:
            run = in_both(part.run) if self.two else part.run
            step = jax.jit(_accumulating(run), donate_argnums=2)
            outputs = jax.jit(lambda inputs, operands: run(inputs, operands)[0])
            self.compiled[part.key] = _Program(step, outputs, run, part)
        return self.compiled[part.key]

    def _value(self, operand: Operand, done: dict[Unit, Any], values: dict[Operand, Any]) -> Any:
        """What a part reads, in float: a quantized weight is decoded once for all batches."""
        if operand not in values:
            unit = operand.unit
            whole = self.unit_value(unit)
            value = kept.apply_cuts(holding(whole, done[unit]) if unit in done else whole, operand.cuts)
            value = _decoded(value) if is_qtensor(held(value)) else value
            if self.two and unit in done:
                value = Weights(value, kept.apply_cuts(whole, operand.cuts))
            values[operand] = value
        return values[operand]

    def unit_value(self, unit: Unit) -> Any:
        """The float weight of a unit."""
        return kept.apply_cuts(self.leaves[unit.path], unit.cuts)

    def _check_finite(self, members: dict[Unit, Any], totals: dict[int, Observed]) -> None:
        for unit, groups in members.items():
            bad = sum(int(jnp.sum(totals[m.group].nonfinite)) for m in groups)
            if bad:
                raise NonFiniteError(
                    f"{unit_name(unit)}: {bad} channels of its input hold NaN or infinity; look at the batches "
                    "and at what comes before it (in 16 bits, an overflow). With `resume`, what was solved is kept"
                )

    def live_values(self) -> list[list[Any]]:
        """The activations that cross the cut, batch by batch, in the order that `restore` takes."""
        return [jax.tree.leaves(list(b.live.values())) for b in self.batches]

    def restore(self, k: int, values: list[list[Any]]) -> None:
        """Puts back what `live_values` gave behind stop `k - 1`."""
        for batch, arrays in zip(self.batches, values, strict=True):
            live: dict[Sym, Any] = {}
            for part in batch.parts[: k - (k - 1 in self.again)]:
                live = {s: None for s in [*live, *part.outputs] if s in part.later}
            arrays = [jnp.asarray(a) for a in arrays]
            if self.two:
                arrays = [Both(*pair) for pair in zip(arrays[::2], arrays[1::2], strict=True)]
            batch.live = dict(zip(live, arrays, strict=True))


class Gathered:
    """Statistics of units, put together from the stops that observe them.

    Args:
      walk: whose.
      axes: for each path the axes of the leaf that are contracted, and those that are solved apart.

    Attributes:
      skipped: units one of whose uses has no statistics, and why.
    """

    def __init__(self, walk: Walk, axes: Mapping[str, Axes]):
        self.walk, self.axes = walk, axes
        self.waiting: dict[Unit, Observed] = {}
        self.skipped: dict[Unit, str] = {}

    def ready(self, jobs: list[Job], seen: dict[int, Observed]) -> dict[Unit, Observed | None]:
        """The units that no later stop observes, with what all stops saw, or None. What is the same is one object."""
        shared: dict[Any, Observed] = {}
        out: dict[Unit, Observed | None] = {}
        for job in jobs:
            mine = self._statistics(job, seen, shared)
            if job.last:
                out[job.unit] = mine
            elif mine is not None:
                self.waiting[job.unit] = mine
        return out

    def _statistics(self, job: Job, seen: dict[int, Observed], shared: dict[Any, Observed]) -> Observed | None:
        (all_contracted, batch), unit = self.axes[job.unit.path], job.unit
        if job.skipped:
            self.skipped[unit] = job.skipped
        contracted = unit_axes(all_contracted, unit.at)
        members = {m: None for m in job.members if m.contracted == contracted}
        before = self.waiting.pop(unit, None)
        if not members:
            return before
        shape = jnp.shape(held(self.walk.unit_value(unit)))
        lead = unit_axes(batch, unit.at)
        if any(tuple(sorted((*m.axes, *(a for a, _ in m.at)))) != lead for m in members):
            self.skipped[unit] = "its uses share their axes with their inputs in different ways"
            return before
        key = (tuple((m.group, m.axes, m.at) for m in members), shape if any(m.at for m in members) else ())
        if key not in shared:
            shared[key] = gather_stats(members, seen, shape)
        return shared[key] if before is None else before.merge(shared[key])


def observe(
    apply: Callable[..., Any], params: Any, batches: list[Any], axes: Mapping[str, Axes], paths: Iterable[str],
    needs: frozenset[str], take: Callable[[dict[str, dict[Any, Stats]]], None],
) -> None:  # fmt: skip
    """Walks the model as it is, and gives the statistics of each unit away when they are complete.

    In memory are those of one stop, and of units that a later stop observes again: not those of all the model.

    Args:
      apply, params, batches: as for `quantize`.
      axes: as for `Gathered`.
      paths: the leaves to observe.
      needs: the statistics.
      take: gets `path -> at -> Stats`, leading axes those of `axes` that were not walked. A unit that can't be observed
        never comes.
    """
    walk = Walk(apply, params, batches, set(paths), needs, label="calibrating")
    gathered = Gathered(walk, axes)

    def step(jobs: list[Job], seen: dict[int, Observed]) -> dict[Unit, Any]:
        found: dict[str, dict[Any, Stats]] = {}
        for unit, mine in gathered.ready(jobs, seen).items():
            if mine is not None and unit not in gathered.skipped:
                found.setdefault(unit.path, {})[unit.at] = mine.stats
        take(found)
        return {}

    walk.run(step)


# Bytes of activations: what is freed one by one stays in glibc's heaps, in pieces that fit nothing. Half as many are
# less memory and more time; benchmarks/gptq.py shows both.
_SLACK = 2**26


def _bytes(live: dict[Sym, Any]) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(list(live.values())))


def _widest(parts: list[Part]) -> frozenset[int]:
    """The parts to run twice: behind them more activations cross than need to be kept anywhere, if those are not."""
    held, live = [0], dict[Sym, None]()
    for part in parts:
        live = {s: None for s in [*live, *part.outputs] if s in part.later}
        held.append(sum(s.size * s.aval.dtype.itemsize for s in live))
    least = max(map(min, held[1:], held[:-1]))
    found: set[int] = set()
    for k, size in enumerate(held[1:]):
        if size > 1.1 * least and k - 1 not in found:
            found.add(k)
    return frozenset(found)


_decoded: Any = jax.jit(lambda q: q.dequantize())


def _accumulating(run: Callable[..., Any]) -> Callable[..., Any]:
    """A part's `run` that adds its statistics to those of the batches before."""

    def step(
        inputs: list[Any], operands: list[Any], totals: dict[int, Observed]
    ) -> tuple[list[Any], dict[int, Observed]]:
        outs, seen = run(inputs, operands)
        return outs, merge_all(totals, seen)

    return step


def unit_name(unit: Unit) -> str:
    """`layers/kernel[3]`: the leaf's path, and the slice of a stacked leaf."""
    return unit.path + "".join(f"[{i}]" for _, i in unit.at)
