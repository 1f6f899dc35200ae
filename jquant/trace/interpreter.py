"""Runs a jaxpr in which some inputs are `Ref`s to parameters, and hands every read of one to a reader.

The walk is the same for all readers. An equation without a Ref runs as it is. With one:

    a rearrangement (reshape, transpose, cast, slice, ...)   the Ref's view changes, nothing runs
    a matmul, convolution or lookup                          `reader.use`
    a sub-jaxpr (jit, scan, cond, while, remat, custom_*)    entered, rebuilt around the same body
    anything else                                            `reader.read`: an array is made, the equation runs on it

Readers may emit values at a use (calibration statistics). They leave sub-jaxprs as extra outputs: stacked by a scan
over the leaf, summed in the carry of other loops. So may a `Watch`, which is shown every equation that ran; for it
sub-jaxprs without a Ref are entered too.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jquant.core.errors import TraceError
from jquant.core.per_use import is_per_use, mapped
from jquant.trace import compat, view
from jquant.trace.rearrange import REARRANGE, SAME_DATA, is_ref, row_of
from jquant.trace.uses import Use, find_use, lookup_axis, product_axis
from jquant.trace.view import Ref

Emissions = dict[Any, Any]


class Reader(Protocol):
    """What is done at each read of a parameter."""

    inline: bool  # derivatives do not matter: remat and custom_jvp/vjp run in place
    unroll: bool  # scans over parameters run as a Python loop

    def use(self, use: Use, frame: "Frame") -> list[Any]:
        """The outputs of a matmul, convolution or lookup."""
        ...

    def read(self, ref: Ref, eqn: compat.JaxprEqn, frame: "Frame") -> Any:
        """The array of a Ref that something unknown reads."""
        ...


class Watch(Protocol):
    """Sees what runs."""

    def ran(self, eqn: compat.JaxprEqn, args: list[Any], outs: list[Any], frame: "Frame") -> None:
        """An equation; its operands and outputs are arrays, Refs or numbers."""
        ...

    def entered(self, outside: Sequence[Any], inside: Sequence[Any]) -> None:
        """A loop or branch: what the values inside are outside, of which a scan takes slices."""
        ...


class Frame:
    """One level of control flow: a loop's body, a branch, or the top.

    Attributes:
      scope: the identities of the equations around it; with an equation's own, a name that retracing does not change.
      watch: what sees every equation, or None.
      stacked: the scans over stacked parameters around it (identities of their equations, outermost first).
      emitted: what readers emitted here, by key.
      known: results of rearrangements by their operands, so that equal arrays are one object.
    """

    def __init__(self, scope: tuple[Any, ...] = (), watch: Watch | None = None, stacked: tuple[int, ...] = ()):
        self.scope, self.watch, self.stacked = scope, watch, stacked
        self.emitted: Emissions = {}
        self.known: dict[Any, tuple[Any, Any]] = {}
        self.keep_alive: list[Any] = []

    def inner(self, eqn: Any, *more: Any) -> "Frame":
        return Frame((*self.scope, id(eqn), *more), self.watch, self.stacked)

    def entered(self, outside: Sequence[Any], inside: Sequence[Any]) -> None:
        if self.watch is not None:
            self.watch.entered(outside, inside)


class Key(NamedTuple):
    """Name of an emission.

    Attributes:
      name: the reader's own.
      stacked_by: the scans (identities of their equations, outermost first) around this place that slice the leaf:
        their iterations see different weights and are stacked. Every other loop sums.
    """

    name: Any
    stacked_by: tuple[int, ...] = ()


def run(jaxpr: compat.Closed, args: Sequence[Any], reader: Reader, frame: Frame) -> list[Any]:
    """Evaluates `jaxpr` on `args` (arrays and Refs); the outputs may be Refs."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def value(v: Any) -> Any:
        return v.val if compat.is_literal(v) else env[v]

    for eqn in jaxpr.eqns:
        operands = [value(v) for v in eqn.invars]
        outs = step(eqn, operands, reader, frame)
        if frame.watch is not None:
            frame.watch.ran(eqn, operands, outs, frame)
        env.update((v, o) for v, o in zip(eqn.outvars, outs, strict=True) if not compat.is_dropped(v))
    return [value(v) for v in jaxpr.outvars]


def step(eqn: compat.JaxprEqn, args: list[Any], reader: Reader, frame: Frame) -> list[Any]:
    """One equation."""
    name = eqn.primitive.name
    if not any(map(is_ref, args)) and (frame.watch is None or name not in ENTER):
        return _plain(eqn, args, reader, frame)
    if name in REARRANGE and is_ref(args[0]) and not any(map(is_ref, args[1:])):
        refs = REARRANGE[name](args[0], eqn, args[1:])
        if refs is not None:
            return refs
    elif name in ENTER:
        return ENTER[name](eqn, args, reader, frame)
    use = find_use(eqn, args)
    if use is not None:
        args = [a if i == use.which else _array(a, eqn, reader, frame) for i, a in enumerate(args)]
        return use_held(use._replace(args=tuple(args)), reader, frame)
    return compat.bind(eqn, *[_array(a, eqn, reader, frame) for a in args])


def use_held(use: Use, reader: Reader, frame: Frame) -> list[Any]:
    """A use of a leaf; of a PerUse, its map acts on what goes in or comes out, and the reader sees what it holds."""
    ref, leaf = use.ref, use.ref.value
    if not is_per_use(leaf):
        return reader.use(use, frame)
    args = [a.replace(value=leaf.value) if i == use.which else a for i, a in enumerate(use.args)]
    if use.kind == "lookup":
        [rows] = reader.use(use._replace(args=tuple(args)), frame)
        return [mapped(rows, lookup_axis(use), leaf.lookup, False)]
    if (axis := product_axis(use)) is None:
        raise TraceError(
            f"{ref.path}: was folded for products along one axis; {use.eqn.primitive.name} contracts others"
        )
    args[1 - use.which] = mapped(args[1 - use.which], axis, leaf.product, True)
    return reader.use(use._replace(args=tuple(args)), frame)


def _array(a: Any, eqn: compat.JaxprEqn, reader: Reader, frame: Frame) -> Any:
    return reader.read(a, eqn, frame) if is_ref(a) else a


def _plain(eqn: compat.JaxprEqn, args: list[Any], reader: Reader, frame: Frame) -> list[Any]:
    """An equation that reads no parameter. A rearrangement of an array is made once, so that sites share inputs."""
    if eqn.primitive.name not in SAME_DATA:
        return compat.bind(eqn, *args)
    key = compat.eqn_key(eqn)
    key = (*key, *map(id, args))
    if key not in frame.known:
        frame.known[key] = (args, compat.bind(eqn, *args))  # the operands too: an id is theirs while they live
    return frame.known[key][1]


# --- sub-jaxprs ---


def _enter_call(eqn: Any, args: list[Any], reader: Reader, frame: Frame) -> list[Any]:
    """jit and other plain calls: the body runs in place."""
    body = next(b for b in compat.sub_jaxprs(eqn))
    scope, frame.scope = frame.scope, (*frame.scope, id(eqn))
    try:
        return run(body, args, reader, frame)
    finally:
        frame.scope = scope


def _enter_remat(eqn: Any, args: list[Any], reader: Reader, frame: Frame) -> list[Any]:
    if reader.inline:
        return _enter_call(eqn, args, reader, frame)
    body = compat.closed(eqn.params["jaxpr"])

    def fn(args: list[Any]) -> list[Any]:
        inner = frame.inner(eqn)
        return _arrays(run(body, args, reader, inner), eqn, reader, inner)

    policy, cse = eqn.params["policy"], eqn.params["prevent_cse"]
    return jax.checkpoint(fn, policy=policy, prevent_cse=cse)(args)


def _enter_custom(eqn: Any, args: list[Any], reader: Reader, frame: Frame) -> list[Any]:
    """custom_jvp and custom_vjp: the value comes from the entered body, the derivative from the user's own rule."""
    if reader.inline:
        return _enter_call(eqn, args, reader, frame)
    body = compat.closed(eqn.params["call_jaxpr"])
    # What the function closed over is constant to its derivative rule.
    fixed = [i < eqn.params["num_consts"] for i, _ in enumerate(args)]

    def fn(*args: Any) -> list[Any]:
        inner = frame.inner(eqn)
        return _arrays(run(body, args, reader, inner), eqn, reader, inner)

    def original(args: Sequence[Any]) -> tuple[Callable[..., list[Any]], list[Any]]:
        def call(*free: Any) -> list[Any]:
            it = iter(free)
            values = [a if f else next(it) for a, f in zip(args, fixed, strict=True)]
            return compat.bind(eqn, *[v.array() if is_ref(v) else v for v in values])

        return call, [a for a, f in zip(args, fixed, strict=True) if not f]

    return _CUSTOM[eqn.primitive.name](fn, original, args, fixed)


def _with_custom_vjp(fn: Any, original: Any, args: list[Any], fixed: list[bool]) -> list[Any]:
    def forward(*args: Any) -> Any:
        call, free = original(args)
        return jax.vjp(call, *free)

    def backward(pull: Any, cotangents: Any) -> tuple[Any, ...]:
        it = iter(pull(cotangents))
        return tuple(None if f else next(it) for f in fixed)

    wrapped = jax.custom_vjp(fn)
    wrapped.defvjp(forward, backward)
    return wrapped(*args)


def _with_custom_jvp(fn: Any, original: Any, args: list[Any], fixed: list[bool]) -> list[Any]:
    def rule(primals: Any, tangents: Any) -> Any:
        call, free = original(primals)
        return jax.jvp(call, free, [t for t, f in zip(tangents, fixed, strict=True) if not f])

    wrapped = jax.custom_jvp(fn)
    wrapped.defjvp(rule)
    return wrapped(*args)


_CUSTOM = {"custom_vjp_call": _with_custom_vjp, "custom_jvp_call": _with_custom_jvp}


def _arrays(values: Sequence[Any], eqn: Any, reader: Reader, frame: Frame) -> list[Any]:
    """Refs that leave a rebuilt sub-jaxpr become arrays; its equation is what reads them."""
    return [_array(v, eqn, reader, frame) for v in values]


class _Name(NamedTuple):
    name: str


class _Return(NamedTuple):
    """Stands for an equation where a function returns a parameter."""

    primitive: _Name = _Name("return")


RETURN = _Return()


def run_all(jaxpr: compat.Closed, args: Sequence[Any], reader: Reader, frame: Frame) -> list[Any]:
    """`run` for a whole function: a parameter that it returns is read there, and arrays come out."""
    return _arrays(run(jaxpr, args, reader, frame), RETURN, reader, frame)


def _enter_scan(eqn: Any, args: list[Any], reader: Reader, frame: Frame) -> list[Any]:
    parts = compat.scan_parts(eqn)
    c, k = parts.num_consts, parts.num_carry
    consts, carry, xs = args[:c], _arrays(args[c : c + k], eqn, reader, frame), args[c + k :]
    xs = [x if not is_ref(x) or view.stackable(x) else reader.read(x, eqn, frame) for x in xs]
    if reader.unroll and any(map(is_ref, xs)):
        return _unrolled_scan(parts, consts, carry, xs, reader, frame, eqn)
    outer = [x if is_ref(x) else None for x in xs]
    outside = [*carry, *xs]

    def body(carry: list[Any], sliced: list[Any]) -> tuple[list[Any], list[Any], Emissions, Emissions]:
        inner = frame.inner(eqn)
        if any(o is not None for o in outer):
            inner.stacked = (*frame.stacked, id(eqn))
        # A stacked Ref comes out of the scan with the dims of the stack; from_stack gives it those of one slice.
        rows = [view.from_stack(s, o, id(eqn)) if o is not None else s for s, o in zip(sliced, outer, strict=True)]
        inner.entered(outside, [*carry, *rows])
        outs = _arrays(run(parts.body, [*consts, *carry, *rows], reader, inner), eqn, reader, inner)
        stacked = {key for key in inner.emitted if key.stacked_by[-1:] == (id(eqn),)}
        sums = {key: v for key, v in inner.emitted.items() if key not in stacked}
        return outs[:k], outs[k:], sums, {Key(q.name, q.stacked_by[:-1]): inner.emitted[q] for q in stacked}

    def call(state: tuple[list[Any], Emissions], sliced: list[Any]):
        carry, ys, sums, stacked = body(state[0], sliced)
        return (carry, {key: state[1][key].merge(v) for key, v in sums.items()}), (ys, stacked)

    stacks = [view.to_stack(x) if is_ref(x) else x for x in xs]
    carry = _match(carry, parts.body.outvars[:k])
    sums = _zeros(jax.eval_shape(lambda c, s: body(c, s)[2], carry, jax.tree.map(_slice_shape, stacks)))
    (carry, sums), (ys, stacked) = jax.lax.scan(
        call, (carry, sums), stacks, parts.length, parts.reverse, parts.unroll
    )  # fmt: skip
    _emit_all(frame, {**sums, **stacked})
    return [*carry, *ys]


def _match(carry: list[Any], outvars: Sequence[Any]) -> list[Any]:
    """The initial carry in the dtype that the body's jaxpr gives back, strongly typed."""

    def match(c: Any, v: Any) -> Any:
        return c if jnp.issubdtype(v.aval.dtype, jax.dtypes.extended) else jnp.asarray(c).astype(v.aval.dtype)

    return [match(c, v) for c, v in zip(carry, outvars, strict=True)]


def _slice_shape(x: Any) -> jax.ShapeDtypeStruct:
    aval = compat.abstract(x)
    return jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _emit_all(frame: Frame, emitted: Emissions) -> None:
    for key, value in emitted.items():
        emit(frame, key, value)


def emit(frame: Frame, key: Key, value: Any) -> None:
    """Adds an emission (a pytree with a method `merge`) to a frame; a second one of that key is merged."""
    frame.emitted[key] = frame.emitted[key].merge(value) if key in frame.emitted else value


def _unrolled_scan(
    parts: compat.ScanParts, consts: list[Any], carry: list[Any], xs: list[Any], reader: Reader, frame: Frame, eqn: Any
) -> list[Any]:
    steps: list[list[Any]] = []
    order = range(parts.length)
    scope = frame.scope
    for i in reversed(order) if parts.reverse else order:
        rows = [row_of(x, i) if is_ref(x) else jax.lax.index_in_dim(x, i, keepdims=False) for x in xs]
        frame.scope = (*scope, id(eqn), i)
        outs = run(parts.body, [*consts, *carry, *rows], reader, frame)
        outs = _arrays(outs, eqn, reader, frame)
        carry, ys = outs[: parts.num_carry], outs[parts.num_carry :]
        steps.append(ys)
    frame.scope = scope
    if parts.reverse:
        steps.reverse()
    return [*carry, *[jnp.stack(column) for column in zip(*steps, strict=True)]]


def _enter_while(eqn: Any, args: list[Any], reader: Reader, frame: Frame) -> list[Any]:
    p = eqn.params
    nc, nb = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = args[:nc], args[nc : nc + nb]
    carry = _arrays(args[nc + nb :], eqn, reader, frame)
    cond, body = compat.closed(p["cond_jaxpr"]), compat.closed(p["body_jaxpr"])
    outside = carry

    def call_body(carry: list[Any]) -> tuple[list[Any], Emissions]:
        inner = frame.inner(eqn)
        inner.entered(outside, carry)
        return _arrays(run(body, [*body_consts, *carry], reader, inner), eqn, reader, inner), inner.emitted

    def test(state: tuple[list[Any], Emissions]) -> Any:
        inner = frame.inner(eqn, "cond")
        return _arrays(run(cond, [*cond_consts, *state[0]], reader, inner), eqn, reader, inner)[0]

    def step(state: tuple[list[Any], Emissions]) -> tuple[list[Any], Emissions]:
        carry, emitted = call_body(state[0])
        return carry, {key: state[1][key].merge(v) for key, v in emitted.items()}

    carry = _match(carry, body.outvars)
    sums = _zeros(jax.eval_shape(lambda c: call_body(c)[1], carry))
    carry, sums = jax.lax.while_loop(test, step, (carry, sums))
    _emit_all(frame, sums)
    return carry


def _enter_cond(eqn: Any, args: list[Any], reader: Reader, frame: Frame) -> list[Any]:
    branches = [compat.closed(b) for b in eqn.params["branches"]]
    index = _array(args[0], eqn, reader, frame)

    def call(i: int, operands: list[Any]) -> tuple[list[Any], Emissions]:
        inner = frame.inner(eqn, i)
        inner.entered(args[1:], operands)
        return _arrays(run(branches[i], operands, reader, inner), eqn, reader, inner), inner.emitted

    shapes: Emissions = {}
    for i in range(len(branches)):
        shapes.update(jax.eval_shape(lambda ops, i=i: call(i, ops)[1], args[1:]))

    def branch(i: int, operands: list[Any]) -> tuple[list[Any], Emissions]:
        outs, emitted = call(i, operands)
        return outs, {**emitted, **_zeros({k: v for k, v in shapes.items() if k not in emitted})}

    outs, emitted = _chosen(eqn, index, [partial(branch, i) for i in range(len(branches))], args[1:])
    _emit_all(frame, emitted)
    return outs


def _chosen(eqn: Any, index: Any, branches: list[Callable[[Any], Any]], operands: list[Any]) -> Any:
    """One of the branches; that of a platform is lowered for no other, as in `jax.lax.platform_dependent`."""
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        return jax.lax.switch(jnp.asarray(index, jnp.int32), branches, operands)
    own = {name: branch for names, branch in zip(platforms, branches, strict=True) for name in names or ()}
    default = next((branch for names, branch in zip(platforms, branches, strict=True) if names is None), None)
    return jax.lax.platform_dependent(operands, default=default, **own)


ENTER: dict[str, Callable[[Any, list[Any], Reader, Frame], list[Any]]] = {
    "jit": _enter_call,
    "pjit": _enter_call,
    "closed_call": _enter_call,
    "core_call": _enter_call,
    "remat2": _enter_remat,
    "checkpoint": _enter_remat,
    "custom_jvp_call": _enter_custom,
    "custom_vjp_call": _enter_custom,
    "scan": _enter_scan,
    "while": _enter_while,
    "cond": _enter_cond,
}
