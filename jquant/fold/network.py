"""The objective "network": the divergence of the rounded network, and its derivative, in little memory.

The model's line is cut into segments (`trace.segments`). Forward, only what crosses the cuts is kept; backward, each
segment runs again and is pulled back, its weights turned and rounded anew. The logits, and what softmax makes of them,
exist for a few positions at a time. Segments of equal layers are compiled once.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.core import kept, memory
from jquant.core.errors import JQuantError
from jquant.core.method import Folding
from jquant.core.per_use import held
from jquant.fold.objectives import Objective, Stacks, Turns, policies
from jquant.fold.rotate import Ready
from jquant.fold.turning import Turning, find_turning
from jquant.trace.execute import ExecuteReader
from jquant.trace.function import Traced, call_args, call_key, trace_call
from jquant.trace.line import Line, Sym
from jquant.trace.program import Unit
from jquant.trace.rearrange import is_ref
from jquant.trace.segments import Head, Segment, cut_line, find_head, is_float
from jquant.trace.sites import find_sites
from jquant.trace.targets import Target, plan_targets

_CHUNK = 2**25  # bytes of logits at a time
_KEPT = 8  # batches whose float values in front of the head are kept: those that are measured again and again

Arrays = list[jax.Array]
Matrices = dict[int, jax.Array]  # of blocks, by their number


class _Piece(NamedTuple):
    """A segment of the rounded model.

    Attributes:
      segment: what it runs.
      units: what it reads.
      turnings: of each unit.
      which: for each operand the number of its unit, and the cuts that take it from the unit.
      blocks: the numbers of the blocks whose matrices it takes.
      ins, outs: the numbers of its inputs and outputs that depend on a matrix and have a derivative.
      programs: shared by all pieces that compute the same.
    """

    segment: Segment
    units: list[Unit]
    turnings: list[Turning]
    which: list[tuple[int, Any]]
    blocks: list[int]
    ins: list[int]
    outs: list[int]
    programs: "_Programs"


class _Programs(NamedTuple):
    """Compiled functions.

    Attributes:
      plain: `(inputs, values) -> outputs`, of the float model.
      forward: `(inputs, values, matrices) -> outputs`.
      backward: `(inputs, values, matrices, cotangents) -> those of inputs and of matrices`.
      loss: of the last piece, `(the float model's inputs, inputs, values, matrices) -> loss`.
      gradient: likewise, the loss and the cotangents of inputs and of matrices.
    """

    plain: Any
    forward: Any
    backward: Any
    loss: Any
    gradient: Any


class _Course(NamedTuple):
    """The pieces for batches of one shape, and what they are given."""

    line: Line
    pieces: list[_Piece]


def network(job: Folding, ready: Ready, turns: Turns) -> Objective:
    """KL(float || rounded), nats for each position of the logits; a part is a batch. SpinQuant's objective, but
    that the target is the float model's prediction and not the text.

    Raises:
      JQuantError: the function returns no logits.
    """
    args, kwargs = call_args(job.batches[0])
    targets = plan_targets(find_sites(job.apply, ready.params, *args, **kwargs), ready.params, policies(job))
    courses: dict[Any, _Course] = {}
    programs: dict[Any, _Programs] = {}
    compiled: set[int] = set()
    known: dict[int, Arrays] = {}

    def course(i: int) -> tuple[_Course, dict[Sym, Any]]:
        args, kwargs = call_args(job.batches[i])
        arrays, key = call_key(args, kwargs)
        if key not in courses:
            traced = trace_call(job.apply, ready.params, args, kwargs)
            courses[key] = _course(job, ready, turns, targets, traced, programs)
        line = courses[key].line
        return courses[key], {**dict(zip(line.arrays, arrays, strict=True)), **line.consts}

    def start(i: int, stacks: Stacks) -> tuple["_Run", Arrays]:
        found, fixed = course(i)
        run = _Run(ready, found.pieces, fixed, _matrices(turns, stacks))
        if i in known:
            return run, known[i]
        plain = run.plain()
        if i < _KEPT:
            known[i] = plain
        return run, plain

    def value(stacks: Stacks, i: int) -> jax.Array:
        run, plain = start(i, stacks)
        return run.loss(plain)

    def gradient(stacks: Stacks, i: int) -> tuple[jax.Array, Stacks]:
        run, plain = start(i, stacks)
        run.compile(compiled)
        loss, found = run.gradient(plain)
        return loss, _stacked(turns, stacks, found)

    return Objective(len(job.batches), value, gradient)


def _matrices(turns: Turns, stacks: Stacks) -> Matrices:
    return {i: stacks[g][k] for i, (g, k) in enumerate(turns.groups)}


def _stacked(turns: Turns, stacks: Stacks, found: Matrices) -> Stacks:
    """Cotangents of matrices as those of the stacks."""
    parts: list[Arrays] = [[] for _ in stacks]
    for i, (g, _) in enumerate(turns.groups):
        parts[g].append(found[i] if i in found else jnp.zeros_like(stacks[g][0]))
    return [jnp.stack(p) for p in parts]


# --- the pieces ---


def _course(
    job: Folding, ready: Ready, turns: Turns, targets: dict[str, Target], traced: Traced, programs: dict[Any, _Programs]
) -> _Course:
    line = Line(traced, inline=True, derivatives=True)
    root = _logits(line)
    head = find_head(line, root)
    if head is not None and (t := targets.get(head.path)) and t.activation and t.activation.block != "token":
        head = None  # one range for all positions
    segments = cut_line(line, root, head)
    if len(segments) == 1:
        job.miss("learned_rotation", "the function has no narrow place; the gradient holds all activations")
    moving: set[Sym] = set()
    pieces = []
    for k, segment in enumerate(segments):
        units = list(dict.fromkeys(o.unit for o in segment.operands))
        turnings = [find_turning(ready, turns.blocks, targets, u) for u in units]
        turned = {u for u, t in zip(units, turnings) if t.blocks}
        _spread(segment, turned, moving)
        last = k == len(segments) - 1
        what = (segment, units, turnings, moving)
        pieces.append(_piece(*what, root if last else None, head if last else None, programs))
    return _Course(line, pieces)


def _logits(line: Line) -> Sym:
    """The first output that can be logits `[..., vocab]`."""
    for o in line.outputs:
        if isinstance(o, Sym) and jnp.issubdtype(o.aval.dtype, jnp.floating) and o.ndim > 1 and o.shape[-1] > 1:
            return o
    raise JQuantError(
        'learned_rotation: the function returns no logits [..., vocab] to compare; write objective="layers"'
    )


def _spread(segment: Segment, turned: set[Unit], moving: set[Sym]) -> None:
    """Adds to `moving` what depends on a turned leaf, and has a derivative."""
    paths = {u.path for u in turned}
    for instr in segment.instrs:
        if any(a in moving if isinstance(a, Sym) else is_ref(a) and a.path in paths for a in instr.args):
            moving.update(o for o in instr.outs if is_float(o))


def _piece(
    segment: Segment, units: list[Unit], turnings: list[Turning], moving: set[Sym], root: Sym | None,
    head: Head | None, programs: dict[Any, _Programs],
) -> _Piece:  # fmt: skip
    blocks = list(dict.fromkeys(i for t in turnings for i in t.blocks))
    own = tuple(tuple(map(blocks.index, t.blocks)) for t in turnings)
    which = [(units.index(o.unit), o.cuts) for o in segment.operands]
    ins = [i for i, s in enumerate(segment.inputs) if s in moving]
    outs = [i for i, s in enumerate(segment.outputs) if s in moving]
    at = None if head is None else (segment.inputs.index(head.x), head.axis)
    key = (segment.key, tuple(t.key for t in turnings), own, tuple(which), tuple(ins), tuple(outs), root is None, at)
    piece = _Piece(segment, units, turnings, which, blocks, ins, outs, programs.get(key, _NONE))
    if key not in programs:
        programs[key] = _compiled(piece, own, root, at, head)
    return piece._replace(programs=programs[key])


_NONE: Any = None


def _compiled(piece: _Piece, own: Any, root: Sym | None, at: tuple[int, int] | None, head: Head | None) -> _Programs:
    segment = piece.segment
    cut = lambda units: [kept.apply_cuts(units[n], cuts) for n, cuts in piece.which]

    def operands(values: list[Any], matrices: Arrays) -> list[Any]:
        """Turned and rounded."""
        done = [t.make(v, [matrices[i] for i in mine]) for t, v, mine in zip(piece.turnings, values, own, strict=True)]
        return cut([kept.apply_cuts(d, t.rest) for d, t in zip(done, piece.turnings, strict=True)])

    def floats(values: list[Any]) -> list[Any]:
        return cut([kept.apply_cuts(t.plain(v), t.rest) for v, t in zip(values, piece.turnings, strict=True)])

    def plain(inputs: list[Any], values: list[Any]) -> Arrays:
        return segment.run(inputs, floats(values), ExecuteReader())

    def rounded(inputs: list[Any], ready: list[Any]) -> Arrays:
        return segment.run(inputs, ready, ExecuteReader(train=True))

    def forward(inputs: list[Any], values: list[Any], matrices: Arrays) -> Arrays:
        return rounded(inputs, operands(values, matrices))

    def backward(inputs: list[Any], values: list[Any], matrices: Arrays, cotangents: Arrays) -> tuple[Arrays, Arrays]:
        def run(moving: Arrays, matrices: Arrays) -> Arrays:
            outs = forward(_put(inputs, piece.ins, moving), values, matrices)
            return [outs[i] for i in piece.outs]

        return jax.vjp(run, [inputs[i] for i in piece.ins], matrices)[1](cotangents)

    if root is None:
        return _Programs(jax.jit(plain), jax.jit(forward), jax.jit(backward), _NONE, _NONE)
    last = partial(_last, piece, operands, floats, rounded, _chunks(root, at, segment), at, math.prod(root.shape[:-1]))
    loss = jax.jit(lambda *args: last(False, *args)[0])
    return _Programs(jax.jit(plain), jax.jit(forward), jax.jit(backward), loss, jax.jit(partial(last, True)))


def _put(values: list[Any], where: list[int], others: Arrays) -> list[Any]:
    out = list(values)
    for i, v in zip(where, others, strict=True):
        out[i] = v
    return out


# --- the last piece ---


def _chunks(root: Sym, at: tuple[int, int] | None, segment: Segment) -> int:
    """In how many equal parts the positions are taken."""
    if at is None:
        return 1
    size = segment.inputs[at[0]].shape[at[1]]
    wanted = min(size, -(-root.size * 4 // _CHUNK))
    return next(n for n in range(max(1, wanted), size + 1) if size % n == 0)


def _last(
    piece: _Piece, operands: Any, floats: Any, rounded: Any, chunks: int, at: tuple[int, int] | None, positions: int,
    derivative: bool, plain: list[Any], inputs: list[Any], values: list[Any], matrices: Arrays,
) -> tuple[jax.Array, tuple[Arrays, Arrays]]:  # fmt: skip
    """The loss and, if they are wanted, the cotangents of the inputs and of the matrices."""
    want, structure = floats(values), dict[str, Any]()
    given = {id(v) for v in jax.tree.leaves(values)}

    def turned(matrices: Arrays) -> tuple[Arrays, list[Any]]:
        leaves, tree = jax.tree.flatten(operands(values, matrices))
        structure["tree"] = tree
        structure["moves"] = moves = [
            isinstance(a, jax.core.Tracer) and id(a) not in given and jnp.issubdtype(a.dtype, jnp.inexact)
            for a in leaves
        ]
        return [a for a, m in zip(leaves, moves) if m], [a for a, m in zip(leaves, moves) if not m]

    free, pull, fixed = jax.vjp(turned, matrices, has_aux=True)

    def some(values: list[Any], k: Any) -> list[Any]:
        """The inputs of one chunk."""
        if at is None or chunks == 1:
            return list(values)
        size = values[at[0]].shape[at[1]] // chunks
        return _put(values, [at[0]], [jax.lax.dynamic_slice_in_dim(values[at[0]], k * size, size, at[1])])

    def chunk(k: Any, moving: Arrays, free: Arrays) -> jax.Array:
        one, two = iter(free), iter(fixed)
        ready = jax.tree.unflatten(structure["tree"], [next(one) if m else next(two) for m in structure["moves"]])
        [target] = piece.segment.run(some(plain, k), want, ExecuteReader())
        [logits] = rounded(_put(some(inputs, k), piece.ins, moving), ready)
        return _divergence(jax.lax.stop_gradient(target), logits) / positions

    def step(total: Any, k: Any) -> Any:
        moving = [x for i, x in enumerate(some(inputs, k)) if i in piece.ins]
        if not derivative:
            return total + chunk(k, moving, free), None
        loss, (dx, dw) = jax.value_and_grad(chunk, (1, 2))(k, moving, free)
        return (total[0] + loss, jax.tree.map(jnp.add, total[1], dw)), dx

    zero = jnp.zeros((), jnp.promote_types(piece.segment.outputs[0].aval.dtype, jnp.float32))
    begun = (zero, [jnp.zeros_like(w) for w in free]) if derivative else zero
    if chunks == 1:
        total, dx = step(begun, jnp.int32(0))
    else:
        total, dx = jax.lax.scan(step, begun, jnp.arange(chunks, dtype=jnp.int32))
        if derivative and at is not None:
            dx = [_joined(x, at[1]) for x in dx]
    return (total[0], (dx, pull(total[1])[0])) if derivative else (total, ([], []))


def _joined(chunks: jax.Array, axis: int) -> jax.Array:
    """`[chunks, ...]` as one array, joined along an axis."""
    moved = jnp.moveaxis(chunks, 0, axis)
    shape = moved.shape
    return moved.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def _divergence(want: jax.Array, got: jax.Array) -> jax.Array:
    """KL of logits `[..., vocab]`, summed over positions."""
    wide = jnp.promote_types(want.dtype, jnp.float32)
    p, q = jax.nn.log_softmax(want.astype(wide)), jax.nn.log_softmax(got.astype(wide))
    return jnp.sum(jnp.exp(p) * (p - q))


# --- a run ---


class _Run:
    """One batch on its way through the pieces, with one set of matrices."""

    def __init__(self, ready: Ready, pieces: list[_Piece], fixed: dict[Sym, Any], matrices: Matrices):
        self.leaves, self.pieces, self.fixed, self.matrices = ready.program.leaves, pieces, fixed, matrices

    def compile(self, done: set[int]) -> None:
        """Compiles what pulls back, but for programs in `done`. It takes memory, and there are no activations yet."""
        shapes = partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype))
        for piece in self.pieces:
            if piece.outs and id(piece.programs) not in done:
                done.add(id(piece.programs))
                ins, outs = (shapes([s.aval for s in part]) for part in (piece.segment.inputs, piece.segment.outputs))
                values, matrices = jax.eval_shape(lambda p=piece: self._given(p))
                if piece is self.pieces[-1]:
                    piece.programs.gradient.lower(ins, ins, values, matrices).compile()
                else:
                    cotangents = [outs[i] for i in piece.outs]
                    piece.programs.backward.lower(ins, values, matrices, cotangents).compile()
                memory.give_back()

    def plain(self) -> Arrays:
        """What the float model puts into the last piece."""
        env = dict(self.fixed)
        for k, piece in enumerate(self.pieces[:-1]):
            outs = piece.programs.plain(self._inputs(piece, env), self._values(piece))
            env = self._advance(k, env, outs)
        return self._inputs(self.pieces[-1], env)

    def loss(self, plain: Arrays) -> jax.Array:
        env = dict(self.fixed)
        for k, piece in enumerate(self.pieces[:-1]):
            env = self._advance(k, env, self._forward(piece, env))
        last = self.pieces[-1]
        return jax.block_until_ready(last.programs.loss(plain, self._inputs(last, env), *self._given(last)))

    def gradient(self, plain: Arrays) -> tuple[jax.Array, Matrices]:
        """The loss, and its derivatives by the matrices."""
        env, crossed = dict(self.fixed), []
        for k, piece in enumerate(self.pieces[:-1]):
            crossed.append(self._inputs(piece, env))
            env = self._advance(k, env, self._forward(piece, env))
        last, found = self.pieces[-1], dict[int, jax.Array]()
        cotangents: dict[Sym, jax.Array] = {}
        loss, pulled = last.programs.gradient(plain, self._inputs(last, env), *self._given(last))
        self._collect(last, pulled, cotangents, found)
        del env, pulled
        for piece in reversed(self.pieces[:-1]):
            inputs = crossed.pop()
            if piece.outs:
                of_outputs = [cotangents.pop(piece.segment.outputs[i]) for i in piece.outs]
                self._collect(
                    piece, piece.programs.backward(inputs, *self._given(piece), of_outputs), cotangents, found
                )
        return loss, found

    def _collect(self, piece: _Piece, pulled: Any, cotangents: dict[Sym, jax.Array], found: Matrices) -> None:
        """Adds what a piece gives back to what later ones gave; one piece runs at a time."""
        of_inputs, of_matrices = jax.block_until_ready(pulled)
        _add(cotangents, [piece.segment.inputs[i] for i in piece.ins], of_inputs)
        _add(found, piece.blocks, of_matrices)
        memory.give_back()

    def _inputs(self, piece: _Piece, env: dict[Sym, Any]) -> Arrays:
        return [env[s] for s in piece.segment.inputs]

    def _values(self, piece: _Piece) -> list[Any]:
        return [
            kept.apply_cuts(held(self.leaves[u.path]), t.cuts) for u, t in zip(piece.units, piece.turnings, strict=True)
        ]

    def _given(self, piece: _Piece) -> tuple[list[Any], Arrays]:
        return self._values(piece), [self.matrices[i] for i in piece.blocks]

    def _forward(self, piece: _Piece, env: dict[Sym, Any]) -> Arrays:
        return piece.programs.forward(self._inputs(piece, env), *self._given(piece))

    def _advance(self, k: int, env: dict[Sym, Any], outs: Arrays) -> dict[Sym, Any]:
        """The values that later pieces read, when these are there."""
        outs = jax.block_until_ready(outs)
        memory.give_back()
        made = {**env, **dict(zip(self.pieces[k].segment.outputs, outs, strict=True))}
        later = {s for p in self.pieces[k + 1 :] for s in p.segment.inputs}
        return {s: v for s, v in made.items() if s in later}


def _add(table: dict[Any, jax.Array], keys: Sequence[Any], new: Arrays) -> None:
    for key, x in zip(keys, new, strict=True):
        table[key] = table[key] + x if key in table else x
