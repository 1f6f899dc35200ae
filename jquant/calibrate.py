"""`calibrate`: what a model's weights meet, summed over batches."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jquant.core.errors import JQuantError, JQuantWarning, NonFiniteError, RecipeError
from jquant.core.per_use import held
from jquant.core.stats import Stats, merge
from jquant.progress import Progress
from jquant.trace import interpreter, view
from jquant.trace.function import Traced, call_args, call_key, trace_call
from jquant.trace.observe import Observed, ObserveReader, gather_stats, merge_all, nothing

__all__ = ["Stats", "calibrate", "merge"]


def calibrate(
    apply: Callable[..., Any], params: Any, batches: Iterable[Any], *,
    paths: Iterable[str] | None = None, gram: bool = True, histogram: bool = False,
) -> dict[str, Stats]:  # fmt: skip
    """Statistics of the inputs of every matmul that reads a parameter.

    One forward pass of the float (or quantized) model over `batches`, jit-compiled once for each shape of batch. Leaves
    that read the same array share one Gram matrix: their `Stats` hold the same arrays.

    Args:
      apply: `apply(params, *args)`, pure.
      params: its parameters.
      batches: what `apply` takes after the parameters: arrays, or tuples or dicts of arguments. Any sizes; an iterator
        is enough.
      paths: the leaves to observe; all by default.
      gram: whether to accumulate Gram matrices (n x n float32 for every distinct input).
      histogram: whether to accumulate histograms of the inputs, for static ranges (`core.histogram`).

    Returns:
      path -> `Stats`, additive: `jax.tree.map`-free merging with `jquant.merge`. Leaves read only by lookups have none.

    Raises:
      NonFiniteError: an input holds NaN or infinity; names the leaf and the count.
      JQuantError: there are no batches.
      RecipeError: one of `paths` is not read by a matmul.
    """
    wanted = None if paths is None else set(paths)
    needs = {"absmax", "mean_abs"} | ({"gram"} if gram else set()) | ({"histogram"} if histogram else set())
    programs: dict[Any, Any] = {}
    totals: dict[int, Observed] | None = None
    members: dict[str, Any] | None = None
    shapes = None
    batches = list(batches)
    if not batches:
        raise JQuantError("calibrate: there are no batches; give at least one, as in [tokens]")
    with Progress(len(batches), "calibrating", "batches") as progress:
        for batch in batches:
            args, kwargs = call_args(batch)
            before = members
            add, reader, shapes = _program(programs, apply, params, args, kwargs, wanted, frozenset(needs))
            members = reader.members
            if before is not None and members != before:
                raise JQuantError("calibrate: batches of different shapes meet different matmuls; give one shape")
            totals = add(totals)
            _check_finite(members, totals)
            progress.step()
    assert totals is not None and members is not None and shapes is not None
    _check_observed(wanted, reader)
    return _share({p: (m, totals, shapes[p]) for p, m in members.items()})


def _check_observed(wanted: set[str] | None, reader: ObserveReader) -> None:
    for path in sorted((wanted or set()) - set(reader.members)):
        why = f"can't be observed: {reader.skipped[path]}" if path in reader.skipped else "is read by no matmul"
        raise RecipeError(f"calibrate: {path} {why}; see find_sites")
    for path, reason in reader.skipped.items():
        what = "are without what one of its uses reads" if path in reader.members else "are left out"
        warnings.warn(f"calibrate: the statistics of {path} {what}: {reason}", JQuantWarning, stacklevel=3)


def _program(programs: Any, apply: Any, params: Any, args: Any, kwargs: Any, *what: Any) -> Any:
    """The compiled observer for the shapes of a batch."""
    arrays, key = call_key(args, kwargs)
    if key not in programs:
        traced = trace_call(apply, params, args, kwargs)
        reader = ObserveReader(*what)
        observe = _observer(traced, reader)
        seen = jax.eval_shape(observe, traced.leaves, arrays)
        # Sums in place: with a Gram matrix for every input of a model, a second set of them would not fit.
        add = jax.jit(lambda leaves, arrays, totals: merge_all(totals, observe(leaves, arrays)), donate_argnums=2)
        programs[key] = (add, seen, reader, traced)
    add, seen, reader, traced = programs[key]
    shapes = {p: tuple(jnp.shape(held(v))) for p, v in zip(traced.paths, traced.leaves, strict=True)}
    return lambda totals: add(traced.leaves, arrays, nothing(seen) if totals is None else totals), reader, shapes


def _observer(traced: Traced, reader: ObserveReader) -> Callable[..., dict[int, Observed]]:
    def observe(leaves: list[Any], arrays: list[Any]) -> dict[int, Observed]:
        frame = interpreter.Frame()
        refs = [view.new_ref(p, v) for p, v in zip(traced.paths, leaves, strict=True)]
        interpreter.run(traced.jaxpr, [*refs, *arrays], reader, frame)
        return reader.collect(frame)

    return observe


def _check_finite(members: dict[str, Any], seen: dict[int, Observed]) -> None:
    counts = jax.device_get({k: jnp.sum(v.nonfinite) for k, v in seen.items()})
    for path, groups in members.items():
        bad = sum(int(counts[m.group]) for m in groups)
        if bad:
            raise NonFiniteError(
                f"{path}: {bad} channels of its input hold NaN or infinity; look at the batch and at what comes "
                "before this leaf (in 16 bits, an overflow)"
            )


def _share(wanted: dict[str, Any]) -> dict[str, Stats]:
    """Stats by path; leaves whose statistics come from the same arrays in the same way get the same object."""
    made: dict[Any, Stats] = {}
    out = {}
    for path, (members, totals, shape) in wanted.items():
        key = tuple((m.group, m.axes, m.at) for m in members)
        sized = key if not any(m.at for m in members) else (*key, shape)
        if sized not in made:
            made[sized] = gather_stats(members, totals, shape).stats
        out[path] = made[sized]
    return out
