"""Products of activations with a QTensor."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jquant.core import side as _side
from jquant.core.qtensor import QTensor
from jquant.ops import cpu, gpu
from jquant.ops.choice import PROVEN, How, pick, words

DECODED = "XLA: codes decoded into the product"
BLOCKS = "on a CPU block by block, codes decoded within the caches"


def dot(
    x: jax.Array,
    q: QTensor,
    *,
    batch: Sequence[int] = (),
    cast: Callable[[jax.Array], jax.Array] = lambda w: w,
    precision: Any = None,
    preferred: Any = None,
    kernels: str = "auto",
) -> tuple[jax.Array, How]:
    """Contracts the last axis of `x` with the contracted axes of `q`.

    Args:
      x: `[*batch axes, tokens, n]`.
      q: the weight, n elements along its contracted axes.
      batch: axes of `q` that `x` has too, in front (experts).
      cast: the casts that the weight goes through before the product.
      precision, preferred: as for `jax.lax.dot_general`.
      kernels: as for `choice.pick`.

    Returns:
      `[*batch axes, tokens, *other kept axes]`, and how it runs.
    """
    @jax.checkpoint  # a derivative decodes again: the decoded weight is not kept for it
    def decoded(x: jax.Array, q: QTensor) -> jax.Array:
        rows = cast(q.rows().astype(q.dtype))
        first = [q.kept.index(a) for a in batch]
        b = len(first)
        numbers = (((x.ndim - 1,), (rows.ndim - 1,)), (tuple(range(b)), tuple(first)))
        return jax.lax.dot_general(x, rows, numbers, precision=precision, preferred_element_type=preferred)

    if q.side is not None and fits(q, batch):
        rest, t = apart(x, q, batch, precision)
        run = lambda q, wide: dot(
            rest, q, batch=batch, cast=cast, precision=precision, preferred=preferred or wide, kernels=kernels
        )
        return beside(run, t, q, batch, precision)
    if q.side is not None or 0 in (x.size, q.size):
        return decoded(x, q), How(DECODED)
    dtype = jax.eval_shape(decoded, x, q).dtype

    def in_blocks(x: jax.Array, q: QTensor) -> jax.Array:
        return cpu.dot(x, q, batch=batch, precision=precision).astype(dtype)

    # Chosen when the program is lowered, for the platform it is lowered for.
    choose = partial(jax.lax.platform_dependent, x, q, cpu=in_blocks, default=decoded)
    multiplied = jax.eval_shape(lambda: cast(jnp.zeros((), q.dtype))).dtype
    why_not = lambda name: gpu.why_not(x, q, batch, multiplied, dtype)
    chosen, reason = pick("float input", x.shape[-2], kernels, why_not)
    text = words(chosen, reason, gpu.writes_out(x), chosen == "weights" and gpu.hopper(x, q, batch))
    how = How(f"{BLOCKS}; {text}; elsewhere {DECODED}", PROVEN.get(chosen, ""), reason)
    if chosen == "xla":
        return choose(), how

    @jax.custom_jvp
    def kernel(x: jax.Array, q: QTensor) -> jax.Array:
        return gpu.dot(x, q, batch=batch, out_dtype=dtype)

    kernel.defjvp(lambda primals, tangents: (kernel(*primals), jax.jvp(decoded, primals, tangents)[1]))
    return choose(cuda=kernel), how


def _first(q: QTensor, batch: Sequence[int]) -> list[int]:
    return [q.kept.index(a) for a in batch]


def takes(q: QTensor) -> bool:
    """Whether the side of `q` takes what it carries out of the input."""
    return q.side is not None and q.side.taken is not None


def fits(q: QTensor, batch: Sequence[int]) -> bool:
    """Whether a product that shares the axes `batch` can run on the codes of `q` and its side, one beside the other.

    It can't where the side takes something else out of the input for each entry of an axis that the input lacks.
    """
    return not takes(q) or _side.can_take(q.side, _first(q, batch))  # type: ignore[arg-type]


def apart(x: jax.Array, q: QTensor, batch: Sequence[int], precision: Any) -> tuple[jax.Array, jax.Array]:
    """What the codes of `q` are multiplied with, of the shape and dtype of `x` `[*batch axes, tokens, n]`; and t, what
    goes to its side."""
    assert q.side is not None
    first = _first(q, batch)
    t = _side.thin(x, q.side, first, precision)
    return _side.taken_out(x, t, q.side, first, precision) if takes(q) else x, t


def beside(
    run: Callable[[QTensor, Any], tuple[jax.Array, How]], t: jax.Array, q: QTensor, batch: Sequence[int], precision: Any
) -> tuple[jax.Array, How]:
    """A product with codes and with the side of `q`, which is never made an array.

    Args:
      run: `(q without its side, dtype to sum in) ->` the product with the codes, and how it runs.
      t: what goes to the side (see `apart`).
    """
    assert q.side is not None
    more = _side.spread(t, q.side, _first(q, batch), precision)
    out, how = run(q.replace(side=None), more.dtype)
    text = f"{how.text}; beside it a {q.side.words}, as {'two' if q.side.taken is None else 'three'} thin products"
    return out + more.astype(out.dtype), how._replace(text=text)
