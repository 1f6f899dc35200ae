"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (arXiv 2210.17323).

The paper's letters: W the weight (a row per output), H = sum of x x^T the Hessian, Q the quantized weight, B the block.
Here also E = W - Q, and H + damping = U D U^T with U unit upper triangular.

The paper inverts H, takes the Cholesky factor of the inverse, and after each column corrects the columns to its right.
What it rounds has a closed form, the LDLQ of QuIP (arXiv 2307.13304, theorem 6): the target of column k is

    W_k + sum_{j<k} E_j U_jk

so one factorization of H is enough, nothing is inverted, and a block needs one matmul with the errors before it. The
objective comes for free: E (H + damping) E^T = sum_k D_k (target_k - Q_k)^2. And where a group starts, the columns g
that the paper's algorithm would hold by then are W_g + (E_prev U_prev,g) inv(U_gg): scales chosen there need the
inverse of a small triangle only.

Where the authors' code (github.com/IST-DASLab/gptq) differs from this file:
- it sets the weights of a dead input channel (H_kk = 0) to zero. They are rounded like any other here: the Hessian is
  silent about them, and an input that only calibration never saw still finds its weights.
- its unit of the damping, the mean of the diagonal, counts a dead channel as 1, whatever the scale of H; as 0 here.
- when a factorization fails, it stops. Here the damping grows tenfold until it succeeds, and `notes` say so.
- the scales of a group that starts inside a block miss the corrections that the block has not yet handed on; not here.
- with `act_order` its groups are scattered over memory (g_idx). Groups are static here: contiguous, with scales from W.
- here a row that round to nearest serves better keeps round to nearest (measured in E H E^T, H without damping).
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jquant.core.formats import BlockParams, Format, compute_params, encode
from jquant.core.method import Method, Notes, Rounding
from jquant.core.scales import Outer, spread_outer, spread_rows
from jquant.core.stats import Stats, checked_gram
from jquant.core.text import call
from jquant.solvers import ldlq
from jquant.solvers.linalg import HIGHEST, damped_udu, row_major, transposed_rows
from jquant.solvers.rtn import search_params, shrink_factors


def gptq(act_order: bool = False, damp: float = 0.01, block_size: int = 128, search: bool = False) -> Method:
    """Rounds column after column, each time correcting the columns not yet rounded for the error made.

    Args:
      act_order: visit the columns by descending diag(H); groups are then static, with scales of the original weight.
        Otherwise columns go left to right, and a group's scales are those of its corrected weights when it starts.
      damp: added to the diagonal of H, in units of its mean.
      block_size: the paper's B, columns corrected at once. Changes speed, not results (up to the order of summation).
      search: clip every block where that lowers its squared error, as `rtn(search=True)` does.

    On correlated random inputs (benchmarks/solver.py, n = 512, int4 in groups of 128) the objective relative to round
    to nearest is 0.64; 0.46 with `act_order`; 0.54 with `search`; 0.41 with both.

    Works with every `Format`; the rows of a tile keep round to nearest together. Scales that an earlier method of a
    chain has chosen are used as they are. Computes in float32 (float64 if the Gram matrix is). Notes, each `[batch]`:
    "dead_channels", input channels that calibration saw only zeros at (int32); "no_tokens", whether those are all of
    them, which is round to nearest (bool); "damping_added", damping needed beyond `damp` for a singular H (float);
    "rtn_rows", rows that kept round to nearest.

    Raises:
      ValueError: `damp` or `block_size` is out of range; or, when solving, there is no Gram matrix of the right shape.
    """
    settings = Settings.checked("gptq", act_order, damp, block_size, search)

    def solve(state: Rounding, stats: Stats | None, fmt: Format) -> Rounding:
        return sweep_rows(state, checked_gram("gptq", state.rows, stats), fmt, settings)

    return Method(call("gptq", **settings.said()), solve, frozenset({"gram"}))


class Settings(NamedTuple):
    """What `gptq` and the methods that share its sweep are told; see there."""

    act_order: bool
    damp: float
    block_size: int
    search: bool

    @classmethod
    def checked(cls, name: str, act_order: bool, damp: float, block_size: int, search: bool) -> "Settings":
        """The settings, or a ValueError."""
        if not damp >= 0 or block_size < 1:
            raise ValueError(f"{name}: needs damp >= 0 and block_size >= 1, got damp={damp}, block_size={block_size}")
        return cls(act_order, damp, block_size, search)

    def said(self) -> dict[str, tuple[Any, Any]]:
        """What a method's name says of them, for `core.text.call`; the block size changes no result."""
        return {"act_order": (self.act_order, False), "damp": (self.damp, 0.01), "search": (self.search, False)}


def sweep_rows(
    state: Rounding, gram: jax.Array, fmt: Format, settings: Settings, first: jax.Array | None = None
) -> Rounding:
    """Rounds `state.rows` column after column.

    Args:
      state: of the chain so far.
      gram: H, `[batch, n, n]`.
      fmt: the format.
      settings: how.
      first: `[batch, m, n]`: what a column is rounded to if it is the first of all, instead of its weight.
    """
    one = partial(_solve_one, fmt=fmt, settings=settings)
    # One matrix after the other: a single one keeps the machine busy, and the temporaries of one are enough.
    codes, params, notes = lax.map(lambda xs: one(*xs), (state.rows, gram, state.params, first))
    return state._replace(params=params, codes=codes, notes=state.notes | notes)


def _solve_one(
    rows: jax.Array,
    gram: jax.Array,
    params: BlockParams | None,
    first: jax.Array | None,
    *,
    fmt: Format,
    settings: Settings,
) -> tuple[jax.Array, BlockParams, Notes]:
    """One matrix: rows `[m, n]`, gram `[n, n]`, params `[m, blocks]` -> codes `[m, n]`, params, notes (scalars)."""
    m, n = rows.shape
    act_order, damp, block_size, search = settings
    factors = shrink_factors() if search else (1.0,)
    plain = compute_params(rows, fmt) if params is None else params
    group = fmt.group_size if params is None and not act_order and _groups_are_dynamic(fmt, n) else None
    given = None
    if group is None:
        given = search_params(rows.astype(jnp.float32), fmt, factors) if params is None else params

    h, unit, dead = hessian(gram)
    order = jnp.argsort(-jnp.diagonal(h), stable=True) if act_order else jnp.arange(n)
    if act_order:
        h, dead = row_major(row_major(h[order])[:, order]), dead[order]
    ut, d, damping = damped_udu(h, damp, dead, unit)
    columns = ldlq.Columns(
        d=d,
        added=damping + dead,
        block=jnp.zeros_like(order) if fmt.group_size is None else order // fmt.group_size,
    )
    plan = ldlq.make_plan(n, block_size, group)
    columns, ut = ldlq.pad(columns, ut, plan)
    scales = None if given is None else ldlq.as_scales(given, fmt, m, h.dtype)
    more = None if first is None else (first[:, order[0]] - rows[:, order[0]]).astype(h.dtype)
    weight = _columns_of(rows, order if act_order else None, plan, h.dtype)
    swept = ldlq.sweep(weight, columns, ut, scales, _chooser(fmt, factors, plain, m, h.dtype), fmt, plan, m, more)
    codes = swept.codes[:, jnp.argsort(order)] if act_order else swept.codes[:, :n]
    chosen = given
    if chosen is None:
        scale, zero_point = jax.tree.map(lambda x: x[: fmt.blocks(n)].T, swept.params)
        chosen = BlockParams(scale, zero_point, plain.outer)

    # What was swept is known by its loss; round to nearest takes the place of its errors.
    rtn = ldlq.round_to_nearest(weight, columns, ldlq.as_scales(plain, fmt, m, h.dtype), fmt, plan, swept.error)
    rtn_loss = _rtn_loss(*rtn, columns, ut, swept.loss, plan)
    better = _better(rtn_loss, swept.loss, fmt, fmt.block == "tensor" and len(factors) > 1)
    pick = lambda a, b: jnp.where(better[:: fmt.tile_rows][: a.shape[0], None], a, b)
    codes = jnp.where(better[:, None], encode(rows, plain, fmt), codes)
    scale, zero_point = jax.tree.map(pick, (plain.scale, plain.zero_point), (chosen.scale, chosen.zero_point))
    return codes, BlockParams(scale, zero_point, chosen.outer), {
        "dead_channels": jnp.sum(dead > 0, dtype=jnp.int32),
        "no_tokens": jnp.all(dead > 0),
        "damping_added": jnp.where(damping > 1.01 * damp, damping - damp, 0).astype(jnp.float32),
        "rtn_rows": jnp.sum(better, dtype=jnp.int32),
    }  # fmt: skip


def unit_hessian(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """H with a mean diagonal of 1, `[n, n]`, and 1 where an input channel is dead, else 0, `[n]`."""
    h, unit, dead = hessian(gram)
    return h / unit, dead


def hessian(gram: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """H `[n, n]`, the mean of its diagonal (1 if that is 0), and 1 where an input channel is dead, else 0, `[n]`."""
    h = gram if gram.dtype == jnp.float64 else gram.astype(jnp.float32)
    diagonal = jnp.diagonal(h)
    mean = jnp.mean(diagonal)
    return h, jnp.where(mean > 0, mean, 1), (diagonal <= 0).astype(h.dtype)


def _groups_are_dynamic(fmt: Format, n: int) -> bool:
    """Whether scales can be chosen where a group starts: several groups, each of which sees one second-level scale.

    BitNet's scales are means, which the zeros that fill up a last, shorter group would change.
    """
    return fmt.blocks(n) > 1 and fmt.outer_blocks(fmt.blocks(n)) == 1 and fmt.element != "ternary"


def _chooser(fmt: Format, factors: tuple[float, ...], plain: BlockParams, m: int, dtype: jnp.dtype) -> ldlq.Choose:
    """Scales of a group's corrected weight `[g, m]`, under round to nearest's second level."""
    outer, single = plain.outer, fmt
    if isinstance(fmt.outer_block, int):
        outer, single = _outer_of_rows(plain, fmt), fmt.replace(outer_block="channel")

    def choose(group: jax.Array) -> tuple[ldlq.Scales, ldlq.Stored]:
        params = search_params(group.T.astype(jnp.float32), single, factors, outer=outer)
        return ldlq.as_scales(params, single, m, dtype), jax.tree.map(lambda x: x.T, (params.scale, params.zero_point))

    return choose


def _outer_of_rows(params: BlockParams, fmt: Format) -> Outer:
    """Second-level scales, one for each row of scales, `[M, 1]`."""
    return tuple(spread_outer(a, fmt, params.scale.shape)[:, :1] for a in params.outer)


def _better(rtn: jax.Array, swept: jax.Array, fmt: Format, together: bool) -> jax.Array:
    """Whether round to nearest is better, `[m]`; decided for all rows that share scales together."""
    if together:
        return jnp.full(rtn.shape, rtn.sum() < swept.sum())
    if fmt.tile_rows == 1:
        return rtn < swept
    m, tile = len(rtn), fmt.tile_rows
    sums = [jnp.pad(x, (0, -m % tile)).reshape(-1, tile).sum(1) for x in (rtn, swept)]
    return spread_rows((sums[0] < sums[1])[:, None], tile, m)[:, 0]


def _columns_of(rows: jax.Array, order: jax.Array | None, plan: ldlq.Plan, dtype: jnp.dtype) -> ldlq.Weight:
    """W, transposed piece by piece; the columns in that order."""
    size, more = plan.sizes[0], plan.padded - plan.n
    if order is None:
        padded = jnp.pad(rows, ((0, 0), (0, more))) if more else rows
        piece = lambda row, few, at: lax.dynamic_slice(padded, (row, at), (few, size))
    else:
        order = jnp.pad(order, (0, more), constant_values=plan.n)
        which = lambda at: lax.dynamic_slice_in_dim(order, at, size)
        piece = lambda row, few, at: (
            lax.dynamic_slice_in_dim(rows, row, few).at[:, which(at)].get(mode="fill", fill_value=0)
        )
    return lambda i: transposed_rows(len(rows), lambda row, few: piece(row, few, i * size).astype(dtype))


def _rtn_loss(
    error: jax.Array, added: jax.Array, columns: ldlq.Columns, ut: jax.Array, bar: jax.Array, plan: ldlq.Plan
) -> jax.Array:
    """E H E^T of each row rounded to nearest, `[m]`; or a number between `bar` and it, once all rows are above `bar`.

    The sum over k of D_k (E U)_k^2, less what was added to H. It only grows, so the largest terms come first: of each
    block the quarter of its columns with the largest D_k sum_j U_jk^2, then the next.
    """
    size = plan.sizes[0]
    blocks, parts = plan.padded // size, math.gcd(size, 4)
    value = columns.d * jnp.sum(ut * ut, axis=1)
    which = jnp.argsort(-value.reshape(blocks, size)).reshape(blocks, parts, -1)

    def undecided(state):
        i, total = state
        return (i < parts * blocks) & jnp.any(total < bar)

    def add(state):
        i, total = state
        block = i % blocks
        chosen = block * size + which[block, i // blocks]
        terms = ldlq.product(ut[chosen], error, block + 1, size) ** 2
        return i + 1, total + jnp.dot(columns.d[chosen], terms, precision=HIGHEST)

    return lax.while_loop(undecided, add, (0, -added))[1]
