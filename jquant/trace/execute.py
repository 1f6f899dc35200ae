"""`quantized`: the user's function on quantized parameters."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant import ops
from jquant.core import kept
from jquant.core.errors import KernelError
from jquant.core.per_use import is_node
from jquant.core.qtensor import QTensor, is_qtensor
from jquant.ops.choice import KERNELS, How
from jquant.ops.dot import takes
from jquant.trace import compat, interpreter, rounding, view
from jquant.trace.function import Traced, split_arrays, trace_call
from jquant.trace.sites import full_axes
from jquant.trace.uses import Use
from jquant.trace.view import Ref


class Ran(NamedTuple):
    """How one read of a quantized parameter runs.

    Attributes:
      path: the leaf's path.
      kind: "dot", "lookup", "conv", "ragged_dot" or "read".
      fused: the codes themselves are read by the operation; otherwise an array of floats is made in front of it.
      how: the implementation, or the reason for the floats.
      activation: how the other operand is rounded, or "" where it stays as it is.
      kernel: the kernel that it is in a program lowered for an NVIDIA GPU, with how its numbers have been proven; ""
        for none.
      reason: why a product or a read is no kernel there, or "".
    """

    path: str
    kind: str
    fused: bool
    how: str
    activation: str = ""
    kernel: str = ""
    reason: str = ""


class ExecuteReader:
    """Runs each use on the codes.

    Args:
      train: the weights have a derivative (see `fake_quant`).
      clip: an input has no derivative where it is beyond its range.
      kernels: see `quantized`.
    """

    inline, unroll = False, False

    def __init__(self, train: bool = False, clip: bool = True, kernels: str = "auto") -> None:
        if kernels not in KERNELS:
            raise KernelError(f"kernels={kernels!r} must be one of {', '.join(map(repr, KERNELS))}")
        self.train, self.clip, self.kernels = train, clip, kernels
        self.log: dict[Any, Ran] = {}

    def use(self, use: Use, frame: interpreter.Frame) -> list[Any]:
        q = use.ref.value
        if not is_qtensor(q):
            return compat.bind(use.eqn, *[a.array() if isinstance(a, Ref) else a for a in use.args])
        runner, reason = self._runner(use.kind), _mismatch(use, q)
        if runner is None or reason:
            rounds = not reason and rounding.rounds_in_float(use)
            text = reason or f"{use.kind} runs on dequantized weights"
            self._note(use, frame, False, How(text, reason=text), rounds)
            args = rounding.round_args(use, self.clip) if rounds else use.args
            return compat.bind(use.eqn, *[a.array() if isinstance(a, Ref) else a for a in args])
        rounds = use.kind != "lookup" and q.activation is not None
        if use.kind == "dot" and (rounds or self.train):
            out, how = rounding.straight_dot(use, runner, self.clip)
        else:
            out, how = runner(use)
        self._note(use, frame, True, how, rounds)
        return [out.astype(use.eqn.outvars[0].aval.dtype)]

    def _runner(self, kind: str) -> rounding.Runner | None:
        run_dot: rounding.Runner = functools.partial(_run_dot, kernels=self.kernels)
        run_ragged: rounding.Runner = functools.partial(_run_ragged, kernels=self.kernels, clip=self.clip)
        return {"dot": run_dot, "lookup": _run_lookup, "ragged_dot": run_ragged}.get(kind)

    def read(self, ref: Ref, eqn: Any, frame: interpreter.Frame) -> Any:
        text = f"read by {eqn.primitive.name}: dequantized there"
        self._log(eqn, frame, Ran(ref.path, "read", False, text, reason=text))
        return ref.array()

    def _note(self, use: Use, frame: Any, fused: bool, how: How, rounds: bool) -> None:
        activation = str(use.ref.value.activation) if rounds else ""
        ran = Ran(use.ref.path, use.kind, fused, how.text, activation, how.kernel, how.reason)
        self._log(use.eqn, frame, ran)

    def _log(self, eqn: Any, frame: Any, ran: Ran) -> None:
        self.log[(*frame.scope, id(eqn), ran.path, ran.kind)] = ran


def _long_axes(axes: Any, shape: tuple[int, ...]) -> set[int]:
    return {a for a in axes if shape[a] != 1}


def _mismatch(use: Use, q: QTensor) -> str:
    """Why a use can't read these codes, or ""."""
    if use.kind == "lookup":
        return f"looks up along the packed axis {use.how.axis}" if use.how.axis in q.contracted else ""
    if _long_axes(use.contracted, q.shape) != _long_axes(q.contracted, q.shape):
        quantized_along = full_axes(use.ref, q.contracted)
        return f"contracts {full_axes(use.ref, use.contracted)}, quantized along {quantized_along}: dequantized there"
    return ""


def _run_dot(use: Use, kernels: str) -> tuple[jax.Array, How]:
    how, q, params = use.how, use.ref.value, use.eqn.params
    x = how.operand(use.x)
    if q.activation is not None:
        dtype = use.eqn.outvars[0].aval.dtype
        out, ran = ops.low_precision.dot(x, q, batch=how.batch, out_dtype=dtype, kernels=kernels)
    else:
        out, ran = ops.dot(
            x, q, batch=how.batch, cast=use.ref.cast, precision=params["precision"],
            preferred=params["preferred_element_type"], kernels=kernels,
        )  # fmt: skip
    return rounding.dot_result(use, out), ran


def _run_ragged(use: Use, kernels: str, clip: bool) -> tuple[jax.Array, How]:
    """The input is rounded in floats, each row with the range of its expert; the products are those of its values."""
    q, params, (x, _, sizes) = use.ref.value, use.eqn.params, use.args
    t = None
    if rounding.rounds_in_float(use):
        if takes(q):
            x, t = ops.ragged.apart(x, q, sizes, params["precision"])
        x = rounding.round_args(use._replace(args=(x, *use.args[1:])), clip)[0]
    array = lambda q: use.ref.replace(value=q).array()
    plain = lambda x, q, sizes: compat.bind(use.eqn, x, array(q), sizes)[0]
    run = lambda q, _: ops.ragged.dot(
        x, q, sizes, plain, cast=use.ref.cast, precision=params["precision"],
        preferred=params["preferred_element_type"], kernels=kernels,
    )  # fmt: skip
    return run(q, None) if t is None else ops.ragged.beside(run, t, q, sizes, params["precision"])


def _run_lookup(use: Use) -> tuple[jax.Array, How]:
    eqn, numbers = use.eqn, use.eqn.params["dimension_numbers"]
    indices = use.x[..., 0]
    indices = indices.astype(jnp.int32) if indices.dtype.itemsize < 4 else indices  # int8 can't hold every bound
    size = use.ref.value.shape[use.how.axis]
    mode = str(eqn.params["mode"])
    view_of = _row_view(use)
    at = jnp.clip(indices, 0, size - 1).ravel()
    rows = kept.map_taken(lambda q: view_of.replace(value=q).array(), use.ref.value, use.how.axis, at)
    rows = rows.reshape(*indices.shape, *rows.shape[1:])
    if "FILL" in mode:
        fill = eqn.params["fill_value"]
        ok = ((indices >= 0) & (indices < size)).reshape(*indices.shape, *[1] * (rows.ndim - indices.ndim))
        rows = jnp.where(ok, rows, jnp.asarray(jnp.nan if fill is None else fill, rows.dtype))
    batch = iter(range(indices.ndim))
    offset = iter(range(indices.ndim, rows.ndim))
    order = [next(offset) if i in numbers.offset_dims else next(batch) for i in range(rows.ndim)]
    return rows.transpose(order), How("lookup of codes")


def _row_view(use: Use) -> Ref:
    """The view of one looked-up slice: the leaf's, without the axis that is looked up."""
    ref, axis, dim = use.ref, use.how.axis, use.how.dim
    dims = [d for i, d in enumerate(ref.dims) if i != dim]
    renamed = tuple(tuple(view.Atom(kept.renamed(a.axis, axis), *a[1:]) for a in d) for d in dims)
    return ref.replace(position=None, dims=renamed)


def _execute(apply: Callable[..., Any], qparams: Any, args: Any, kwargs: Any, reader: ExecuteReader) -> Any:
    return run_traced(trace_call(apply, qparams, args, kwargs), reader)


def run_traced(traced: Traced, reader: ExecuteReader) -> Any:
    """The outputs of a traced call."""
    refs = [view.new_ref(p, v) if is_node(v) else v for p, v in zip(traced.paths, traced.leaves, strict=True)]
    outs = interpreter.run_all(traced.jaxpr, [*refs, *traced.arrays], reader, interpreter.Frame())
    return jax.tree.unflatten(traced.out_tree, outs)


def quantized(apply: Callable[..., Any], *, kernels: str = "auto") -> Callable[..., Any]:
    """The same function, taking parameters some of whose leaves are QTensors.

    Every matmul and lookup that reads a QTensor runs on its codes; whatever else reads one gets it dequantized there
    (`explain` lists both). The result equals `apply` on `dequantize(qparams)` up to the order of accumulation. It
    composes with jit, grad (inputs and float leaves), vmap, scan, remat and shardings. `apply` itself is not changed.

    A leaf with an `Activation` has the inputs of its matmuls rounded too, and the products run in the low precision:
    int8 x int8 -> int32, fp8 x fp8 -> float32, the scales applied to the sums. The derivative goes straight through the
    rounding, but not where an input is beyond its static range. Products of two activations (attention) stay in float.

    A program with kernels is exported by `jax.export`, for several platforms too, with
    `disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]`; one for several devices only
    with kernels="never".

    Args:
      apply: `apply(params, *args, **kwargs)`, pure.
      kernels: what a program lowered for an NVIDIA GPU is made of. "auto": the kernels of `pallas_kernels` where they
        can do a product and are expected to be faster than XLA; `explain` says where. "never": XLA alone. "require":
        kernels wherever they can do a product, and an error, whatever the platform, where a quantized parameter is read
        in any other way (looked-up rows apart).

    Returns:
      A function of the same signature.

    Raises (when called):
      KernelError: with kernels="require", a read of a quantized parameter is no kernel; it lists them all.
      DamagedQTensorError: the codes of a leaf were cast or cut.
      TraceError: a leaf is neither an array nor a QTensor.
    """

    ExecuteReader(kernels=kernels)  # a wrong word is an error here, not later

    @functools.wraps(apply)
    def run(qparams: Any, *args: Any, **kwargs: Any) -> Any:
        reader = ExecuteReader(kernels=kernels)
        out = _execute(apply, qparams, args, kwargs, reader)
        if kernels == "require":
            _check_kernels(reader.log.values())
        return out

    return run


def _check_kernels(reads: Iterable[Ran]) -> None:
    missing = [f"\n  {r.path} ({r.kind}): {r.reason}" for r in reads if r.reason]
    if missing:
        raise KernelError(
            f"kernels='require', but an NVIDIA GPU has no kernel for {len(missing)} reads of quantized parameters; "
            "keep them in floats (None in the recipe), choose another format, or let XLA run them (kernels='auto'):"
            + "".join(missing)
        )


def explain(apply: Callable[..., Any], qparams: Any, *args: Any, kernels: str = "auto", **kwargs: Any) -> list[Ran]:
    """How each read of a quantized parameter in `apply(qparams, *args, **kwargs)` would run, in order; runs nothing.

    Attention over a quantized cache reads no parameter: `kv_cache.explain` says how that runs.

    Args:
      apply, qparams: as for `quantized`.
      kernels: what would be given to `quantized`. Here "require" raises nothing.
      args, kwargs: arrays, or their shapes (`jax.ShapeDtypeStruct`).
    """
    reader = ExecuteReader(kernels=kernels)
    arrays, rebuild = split_arrays((qparams, args, kwargs))

    def run(arrays: list[Any]) -> Any:
        q, a, k = rebuild(arrays)
        return _execute(apply, q, a, k, reader)

    jax.eval_shape(run, arrays)
    return list(reader.log.values())
