"""The product with a QTensor on a CPU: rows are decoded and multiplied while the caches hold them, then the next ones.

Decoded whole, a weight of 4096 x 4096 is 64 MB of fresh memory for every product: XLA:CPU then spends 20 ms on page
faults, for a product of one token that takes 2 ms. Block by block the decoded numbers stay in the caches.

Codes that share a byte are not put side by side again (a shuffle that LLVM does not vectorize). With P codes to a byte,
element k = P j + p of a row stands in byte j, so the row is decoded as P rows of n / P, each by one shift and one mask,
and the input is taken apart the same way:

    sum_k x_k w_k  =  sum_p sum_j x_{P j + p} w_{P j + p}

Milliseconds beside float32 and bfloat16: benchmarks/products.py and its results. A weight of several blocks that is cut
over a mesh of CPU devices is put together first: blocks are cut from the whole of it.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jquant.core import packing
from jquant.core.elements import ELEMENTS, decode_codes
from jquant.core.format_type import Format
from jquant.core.formats import spread_groups
from jquant.core.qtensor import QTensor

# Decoded elements of a block, 8 MB of float32: what the caches of two cores hold.
_BLOCK = 2**21
# From this release on XLA:CPU multiplies bfloat16 (two tokens and more) faster than float32; before, two to ten times
# slower.
_BF16_SINCE = (0, 11)


class _Weight(NamedTuple):
    """Rows of one matrix: planes of codes uint8 `[rows, bytes]`, scale and zero point float32 `[rows, blocks]`."""

    planes: tuple[jax.Array, ...]
    scale: jax.Array
    zero: jax.Array | None

    @property
    def rows(self) -> int:
        return self.scale.shape[-2]

    def cut(self, start: jax.Array | int, rows: int) -> "_Weight":
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, rows), self)


def dot(x: jax.Array, q: QTensor, *, batch: Sequence[int] = (), precision: Any = None) -> jax.Array:
    """`ops.dot` for a CPU, the codes of `q` alone: float32 (or float64) `[*batch axes, tokens, *other kept axes]`."""
    x = x.astype(_operands(x.shape[-2], x.dtype))
    first = [q.kept.index(a) for a in batch]
    b, kept = len(first), q.codes[0].shape[:-1]
    others = tuple(k for i, k in enumerate(kept) if i not in first)

    def flat(a: jax.Array) -> jax.Array:  # [*kept or 1, m] -> [batch, rows, m]
        whole = jnp.moveaxis(jnp.broadcast_to(a, (*kept, a.shape[-1])), first, range(b))
        return whole.reshape(*whole.shape[:b], -1, a.shape[-1])

    weight = jax.tree.map(flat, _Weight(q.check().codes, *q.row_params()))
    run = lambda x, w: _matrix(x, w, q.format, precision)
    if b:
        lead = x.shape[:b]
        pairs = jax.tree.map(lambda a: a.reshape(-1, *a.shape[b:]), (x, weight))
        out = lax.map(lambda pair: run(*pair), pairs)
        return out.reshape(*lead, x.shape[-2], *others)
    return run(x, weight).reshape(x.shape[-2], *others)


def _operands(tokens: int, dtype: np.dtype) -> np.dtype:
    """What the product is calculated in."""
    if dtype == jnp.bfloat16 and tokens > 1 and jax.__version_info__ >= _BF16_SINCE:
        return dtype
    return _wide(dtype)


def _wide(dtype: np.dtype) -> np.dtype:
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _matrix(x: jax.Array, w: _Weight, fmt: Format, precision: Any) -> jax.Array:
    """`x` `[tokens, n]` with `w` `[rows, n]`: `[tokens, rows]`."""
    tokens, n = x.shape
    if tokens == 1 and ELEMENTS[fmt.element].kind == "float" and fmt.bits == 8:
        # With one token XLA:CPU (0.12) decodes fp8 within the sum, number by number: 54 ms in place of 4.
        return _matrix(jnp.pad(x, [(0, 1), (0, 0)]), w, fmt, precision)[:1]
    per = codes_apart(fmt, n)
    parts = [x[:, p::per] for p in range(per)]

    # Nothing of it is kept for a derivative: what is decoded is decoded again.
    @jax.checkpoint  # type: ignore[untyped-decorator]
    def block(parts: list[jax.Array], w: _Weight) -> jax.Array:
        rows = decoded(w.planes, w.scale, w.zero, fmt, n)
        return reduce(jnp.add, (_product(part, row, precision) for part, row in zip(parts, rows, strict=True)))

    size = max(8, 2 ** (_BLOCK // n).bit_length() // 2)
    whole = w.rows // size if w.rows >= 2 * size else 0
    if not whole:
        return block(parts, w)
    outs = lax.map(lambda i: block(parts, w.cut(i * size, size)), jnp.arange(whole))  # [whole, tokens, size]
    out = jnp.moveaxis(outs, 0, 1).reshape(tokens, whole * size)
    if w.rows == whole * size:
        return out
    return jnp.concatenate([out, block(parts, w.cut(whole * size, w.rows - whole * size))], axis=1)


def _product(x: jax.Array, rows: jax.Array, precision: Any) -> jax.Array:
    numbers = (((1,), (1,)), ((), ()))
    return lax.dot_general(
        x, rows.astype(x.dtype), numbers, precision=precision, preferred_element_type=_wide(x.dtype)
    )


def codes_apart(fmt: Format, n: int) -> int:
    """P: into how many rows a row of `n` codes is decoded. 1 where bytes or groups do not end together with it."""
    per = 8 // packing.plane_widths(fmt.bits)[-1]
    size = n if fmt.group_size is None else fmt.group_size
    return per if n % per == 0 and size % per == 0 else 1


def decoded(
    planes: tuple[jax.Array, ...], scale: jax.Array, zero: jax.Array | None, fmt: Format, n: int
) -> list[jax.Array]:
    """P float32 rows `[rows, n / P]` for each row: element j of the p-th is element P j + p."""
    per = codes_apart(fmt, n)
    size = None if fmt.group_size is None else fmt.group_size // per
    out = []
    for p in range(per):
        values = decode_codes(_every(planes, fmt.bits, n, per, p), fmt)
        if zero is not None:
            values = values - spread_groups(zero, size, n // per)
        out.append(values * spread_groups(scale, size, n // per))
    return out


def _every(planes: tuple[jax.Array, ...], bits: int, n: int, per: int, p: int) -> jax.Array:
    """Codes p, P + p, 2 P + p, ...: uint8 `[rows, n / P]`."""
    if per == 1:
        return packing.unpack(planes, bits, n)
    code, left = jnp.uint8(0), bits
    for width, plane in zip(packing.plane_widths(bits), planes, strict=True):
        left -= width
        here = 8 // width  # codes of this plane in a byte
        byte = plane[:, p // here :: per // here]
        part = (byte >> np.uint8(p % here * width)) & np.uint8(2**width - 1)
        code = code | (part << np.uint8(left))
    return code
