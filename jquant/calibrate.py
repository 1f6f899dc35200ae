"""`calibrate`: what a model's weights meet, summed over batches."""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from jquant.core.errors import JQuantError, JQuantWarning, NonFiniteError, RecipeError
from jquant.core.per_use import held
from jquant.core.stats import Stats, merge
from jquant.kv_cache.format import CacheFormat, parse
from jquant.kv_cache.scales import observed
from jquant.progress import Progress
from jquant.trace import interpreter, view
from jquant.trace.attention import Found, watching
from jquant.trace.function import Traced, call_args, call_key, trace_call
from jquant.trace.observe import Observed, ObserveReader, gather_stats, merge_all, nothing

__all__ = ["Stats", "calibrate", "merge"]


@overload
def calibrate(
    apply: Callable[..., Any], params: Any, batches: Iterable[Any], *,
    paths: Iterable[str] | None = ..., gram: bool = ..., histogram: bool = ..., attention: Literal[False] = ...,
) -> dict[str, Stats]: ...  # fmt: skip


@overload
def calibrate(
    apply: Callable[..., Any], params: Any, batches: Iterable[Any], *,
    paths: Iterable[str] | None = ..., gram: bool = ..., histogram: bool = ..., attention: bool | str | CacheFormat,
) -> dict[str, Any]: ...  # fmt: skip


def calibrate(
    apply: Callable[..., Any], params: Any, batches: Iterable[Any], *,
    paths: Iterable[str] | None = None, gram: bool = True, histogram: bool = False,
    attention: bool | str | CacheFormat = False,
) -> dict[str, Any]:  # fmt: skip
    """Statistics of the inputs of every matmul that reads a parameter, and, when asked for, of keys and values.

    One forward pass of the float (or quantized) model over `batches`, jit-compiled once for each shape of batch. Leaves
    that read the same array share one Gram matrix: their `Stats` hold the same arrays.

        stats = jq.calibrate(apply, params, batches, paths=[], attention=True)          # keys and values only
        cache = kv_cache.init(..., fmt, **kv_cache.static_scales(stats["attention[0]"], fmt))

    An attention is found in the jaxpr (`trace.attention`): a product of two arrays, neither a parameter; its exp,
    summed along dimensions that one operand alone has, the keys; the product of that with the values along the same.

    - Keys are taken as they enter that product, so behind RoPE and norms. All positions of these arrays count, those
      too that a mask hides from every query: leave padding, and caches with room left, out of the batches.
    - Of keys that are copied for several query heads, or read in parts along the tokens, the array that was copied or
      cut is taken, once.
    - Heads are the axes that the weights of a projection made and that both products only walk along.
    - Inside a scan over stacked parameters the layers are stacked in the statistics. Other loops add up. One in each
      branch of a `cond` are two; so are two heads that the function takes one after the other.
    - Not found are: attention in a `shard_map` or a kernel of its own (Pallas, cuDNN); product, softmax and second
      product in different levels of control flow; weights made of several products (a sum inside the softmax, a
      difference of two softmaxes); queries or keys that are parameters themselves.

    Args:
      apply: `apply(params, *args)`, pure.
      params: its parameters.
      batches: what `apply` takes after the parameters: arrays, or tuples or dicts of arguments. Any sizes; an iterator
        is enough.
      paths: the leaves to observe; all by default.
      gram: whether to accumulate Gram matrices (n x n float32 for every distinct input).
      histogram: whether to accumulate histograms of the inputs, for static ranges (`core.histogram`).
      attention: whether to observe keys and values too, for the static scales of a cache (`kv_cache.static_scales`). Of
        a cache whose format has sinks or turns what it encodes ("nvfp4-rot,sinks=4"), give that format: noted is then
        what it encodes, as the largest number of a turned vector can't be told from those of its channels.

    Returns:
      path -> `Stats`, additive: `jax.tree.map`-free merging with `jquant.merge`. Leaves read only by lookups have none.
      With `attention` also "attention[0]", "attention[1]", ... -> `kv_cache.KVStats`, in the order in which the model
      runs them, additive likewise. A warning says for which of them the heads could not be told apart: they are one.

    Raises:
      NonFiniteError: an input, a key or a value is NaN or infinity; names the leaf or the attention, and the count.
      JQuantError: there are no batches; attention was asked for and none was found.
      RecipeError: one of `paths` is not read by a matmul.
      CacheError: no more tokens than the format for `attention` has sinks.
    """
    wanted = None if paths is None else set(paths)
    needs = {"absmax", "mean_abs"} | ({"gram"} if gram else set()) | ({"histogram"} if histogram else set())
    see = partial(_seen, fmt=None if isinstance(attention, bool) else parse(attention)) if attention else None
    programs: dict[Any, Any] = {}
    totals: dict[int, Observed] | None = None
    met: Any = None
    batches = list(batches)
    if not batches:
        raise JQuantError("calibrate: there are no batches; give at least one, as in [tokens]")
    with Progress(len(batches), "calibrating", "batches") as progress:
        for batch in batches:
            args, kwargs = call_args(batch)
            add, reader, shapes, found = _program(programs, apply, params, args, kwargs, see, wanted, frozenset(needs))
            attentions = _attentions(found, reader) if see else {}
            before, met = met, (reader.members, list(attentions.values()))
            if before not in (None, met):
                raise JQuantError("calibrate: batches of different shapes meet different matmuls; give one shape")
            totals = add(totals)
            _check_finite(reader.members, totals)
            _check_finite_attention(attentions, totals)
            progress.step()
    assert totals is not None
    _check_observed(wanted, reader)
    _warn_of_heads(attentions, found)
    stats: dict[str, Any] = dict(_share({p: (m, totals, shapes[p]) for p, m in reader.members.items()}))
    return stats | {name: totals[group].stats for name, group in attentions.items()}


def _seen(k: jax.Array, v: jax.Array, fmt: CacheFormat | None) -> Observed:
    return Observed(*observed(k, v, fmt))


def _attentions(found: dict[Any, Found], reader: ObserveReader) -> dict[str, int]:
    """The attentions, in the order of the model, and the numbers of what was observed of them."""
    groups = [reader.groups[name] for name, one in found.items() if one.is_softmax and name in reader.groups]
    if not groups:
        raise JQuantError(
            "calibrate: attention=... finds no attention in this function: no product of two arrays, neither a "
            "parameter, goes through exp and a sum along an axis of one of them, a softmax, into a second product "
            "along that axis, all in one level of control flow; kv_cache.static_scales also reads a float cache"
        )
    return {f"attention[{i}]": group for i, group in enumerate(groups)}


def _check_finite_attention(attentions: dict[str, int], totals: dict[int, Observed]) -> None:
    counts = jax.device_get({name: totals[group].nonfinite for name, group in attentions.items()})
    for name, count in counts.items():
        for what, bad in zip(("keys", "values"), count.reshape(-1, 2).sum(0), strict=True):
            if bad:
                raise NonFiniteError(
                    f"{name}: {bad} channels of its {what} hold NaN or infinity; look at the batch and at what comes "
                    "before (in 16 bits, an overflow)"
                )


def _warn_of_heads(attentions: dict[str, int], found: dict[Any, Found]) -> None:
    softmaxes = [one for one in found.values() if one.is_softmax]
    for name, one in zip(attentions, softmaxes, strict=False):
        if one.one_head:
            warnings.warn(
                f"calibrate: {name}: which axes are the heads of its {' and '.join(one.one_head)} can't be told, as no "
                "weight is seen to make them; all heads are taken as one",
                JQuantWarning,
                stacklevel=3,
            )


def _check_observed(wanted: set[str] | None, reader: ObserveReader) -> None:
    for path in sorted((wanted or set()) - set(reader.members)):
        why = f"can't be observed: {reader.skipped[path]}" if path in reader.skipped else "is read by no matmul"
        raise RecipeError(f"calibrate: {path} {why}; see find_sites")
    for path, reason in reader.skipped.items():
        what = "are without what one of its uses reads" if path in reader.members else "are left out"
        warnings.warn(f"calibrate: the statistics of {path} {what}: {reason}", JQuantWarning, stacklevel=3)


def _program(programs: Any, apply: Any, params: Any, args: Any, kwargs: Any, see: Any, *what: Any) -> Any:
    """The compiled observer for the shapes of a batch."""
    arrays, key = call_key(args, kwargs)
    if key not in programs:
        traced = trace_call(apply, params, args, kwargs)
        reader = ObserveReader(*what)
        found: dict[Any, Found] = {}
        observe = _observer(traced, reader, see, found)
        seen = jax.eval_shape(observe, traced.leaves, arrays)
        # Sums in place: with a Gram matrix for every input of a model, a second set of them would not fit.
        add = jax.jit(lambda leaves, arrays, totals: merge_all(totals, observe(leaves, arrays)), donate_argnums=2)
        programs[key] = (add, seen, reader, traced, found)
    add, seen, reader, traced, found = programs[key]
    shapes = {p: tuple(jnp.shape(held(v))) for p, v in zip(traced.paths, traced.leaves, strict=True)}
    step = lambda totals: add(traced.leaves, arrays, nothing(seen) if totals is None else totals)
    return step, reader, shapes, found


def _observer(
    traced: Traced, reader: ObserveReader, see: Any, found: dict[Any, Found]
) -> Callable[..., dict[int, Observed]]:
    def observe(leaves: list[Any], arrays: list[Any]) -> dict[int, Observed]:
        frame = interpreter.Frame() if see is None else watching(see, found)
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
