"""The product through Pallas' Mosaic GPU backend, for Hopper: few rows of activations, the weight read once.

A block multiplies 64 rows of the weight (the height of a wgmma) with all rows of the activations. One warpgroup asks
the copy engine for codes and activations, a ring of stages ahead; the others take the stages in turn. A stage is cut
into units. The codes of a unit go from shared memory into registers, 8 or 16 bytes a thread, are upcast there and are
the left operand of the tensor core; the activations are the right one, from shared memory. The sums of a unit are
multiplied by the scales of its rows (a group holds whole units) and added in float32.

Which code of a unit comes into which register is the tensor core's choice of rows and columns, but any order of the
contracted axis is right if both operands have it. So codes are upcast where they happen to lie, without a shuffle, and
the activations are brought into the same order beforehand (`arranged`), by XLA, which can make it part of what computes
them.

What Pallas has no words for is in `mosaic_registers`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.gpus import gpu
from pallas_kernels.quantized_matmul import mosaic_registers as registers
from pallas_kernels.quantized_matmul import upcast
from pallas_kernels.quantized_matmul.rings import HEIGHT, Plan, Ring, group_of, planned, why_not


def padded(x: jax.Array, p: Plan, rows: int) -> jax.Array:
    """`[M, K]` -> `[rows, steps of whole stages]`, zeros behind."""
    return jnp.pad(x, [(0, rows - p.m), (0, p.steps * p.stage - x.shape[1])])


def arranged(x: jax.Array, p: Plan) -> jax.Array:
    """`padded` to `p.rows`, in the order in which codes come into registers.

    Of a unit every thread q of four holds a run of codes, and each register two of them, which are columns 2 q and
    2 q + 1 of the next eight: see `mosaic_registers.pairs`.
    """
    e, x = p.element, padded(x, p, p.rows)
    words = p.unit_bytes // 16
    if e.kind == "table":  # of a thread q: words, halves, pairs of lanes, two
        return x.reshape(p.rows, -1, 4, words, 2, 2, 2).transpose(0, 1, 3, 5, 4, 2, 6).reshape(x.shape)
    # Of a thread q: words, halves, lanes.
    return x.reshape(p.rows, -1, 4, words, 2, 16 // e.bits).transpose(0, 1, 3, 5, 2, 4).reshape(x.shape)


def quantized_matmul(
    x: jax.Array,
    planes: tuple[jax.Array, ...],
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    element: str,
    group_size: int | None = None,
    out_dtype: Any = None,
    device: str = "h100",
    ring: Ring | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`x` times the transposed weight, as `triton.quantized_matmul` has it, for `why_not` permitting.

    Args:
      ring: to choose it oneself.
      interpret: in Pallas' simulator of a GPU: copies, barriers, indices and products are those of the kernel, what
        `mosaic_registers` does is done by functions of arrays.

    Raises:
      ValueError: `why_not` has a reason.
    """
    m, k, n = x.shape[-2], x.shape[-1], planes[0].shape[-2]
    zero_dtype = None if zero_point is None else zero_point.dtype
    reason = why_not(element, group_size, m, n, k, x.dtype, scale.dtype, zero_dtype)
    if reason is not None:
        raise ValueError(f"quantized_matmul: no Mosaic kernel for {element} x {x.dtype}: {reason}")
    group = group_of(group_size, k)
    batch = x.shape[0] if x.ndim == 3 else 1
    p = planned(element, group, m, n, k, ring, batch, gpu(device), interpret)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    dtype = jnp.dtype("float32") if p.ring.split_k > 1 else out_dtype
    every = (*planes[0].shape[:-1], scale.shape[-1])
    params = [jnp.broadcast_to(a, every) for a in (scale, zero_point) if a is not None]

    def one(x: jax.Array, codes: jax.Array, params: list[jax.Array]) -> jax.Array:
        # The copies of less than eight rows fill up with zeros; the simulator's do not.
        rows = m if m < 8 and not interpret else p.rows
        return _call(padded(x, p, rows) if p.ring.inside else arranged(x, p), codes, params, p, dtype)

    with compat.lowering_for(gpu(device).kind), compat.simulated(interpret):
        out = (jax.vmap(one) if x.ndim == 3 else one)(x, planes[0], params)
    return jnp.sum(out, axis=-3).astype(out_dtype) if p.ring.split_k > 1 else jnp.squeeze(out, -3)


def _call(x: jax.Array, codes: jax.Array, params: list[jax.Array], p: Plan, dtype: Any) -> jax.Array:
    """Arranged activations -> `[split_k, M, N]`."""
    ring, shape = p.ring, (p.ring.split_k, p.m, p.n)
    if p.simulated:  # where nothing lies beyond an array
        shape = (ring.split_k, p.rows, p.n)
        codes = jnp.pad(codes, [(0, 0), (0, p.steps * ring.stage_bytes - codes.shape[1])])
    swizzle = min(128, 2 * p.unit)
    tiled = lambda *transforms: () if p.simulated else transforms
    scratch: dict[str, Any] = dict(
        codes_smem=plgpu.SMEM(
            (ring.slots, HEIGHT, ring.stage_bytes), jnp.uint8,
            transforms=tiled(plgpu.TilingTransform((HEIGHT, p.unit_bytes))),
        ),
        x_smem=plgpu.SMEM(
            (ring.slots, p.rows, p.stage), x.dtype,
            transforms=tiled(plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)),
        ),
        sums_smem=plgpu.SMEM((max(ring.workers - 1, 1), *registers.shape_of_sums(p.rows, p.simulated)), jnp.float32),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=ring.slots),
        empty=plgpu.Barrier(num_arrivals=1, num_barriers=ring.slots),
        done=plgpu.Barrier(num_arrivals=max(ring.workers - 1, 1)),
    )  # fmt: skip
    if p.simulated:
        scratch["left_smem"] = plgpu.SMEM((ring.workers, HEIGHT, p.unit), x.dtype)
        scratch["right_smem"] = plgpu.SMEM((ring.workers, p.unit, p.rows), x.dtype)
    run = plgpu.kernel(
        partial(_kernel, p=p),
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(p.n // HEIGHT, ring.split_k),
        grid_names=("tile", "part"),
        num_threads=ring.workers + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name=f"quantized_matmul_mosaic_{p.name}",
    )
    out = run(codes, x, *params)
    return out[:, : p.m]


# --- the kernel ---


class Refs(NamedTuple):
    """What the kernel reads and writes."""

    codes: Any
    x: Any
    scale: Any
    zero: Any
    out: Any
    codes_smem: Any
    x_smem: Any
    sums_smem: Any
    full: Any
    empty: Any
    done: Any
    left_smem: Any
    right_smem: Any


def _kernel(codes: Any, x: Any, scale: Any, *refs: Any, p: Plan, **scratch: Any) -> None:
    *zero, out = refs
    r = Refs(codes, x, scale, zero[0] if zero else None, out, **{"left_smem": None, "right_smem": None, **scratch})
    warpgroup, tile, part = (lax.axis_index(name) for name in ("warpgroup", "tile", "part"))
    most = -(-p.steps // p.ring.split_k)
    first = part * most
    count = jnp.minimum(most, p.steps - first)

    @pl.when(warpgroup == p.ring.workers)
    def _() -> None:
        _fetch(r, p, tile, first, count)

    @pl.when(warpgroup < p.ring.workers)
    def _() -> None:
        acc = _multiply(r, p, warpgroup, tile, first, count)
        _finish(r, p, warpgroup, tile, part, acc)


def _fetch(r: Refs, p: Plan, tile: Any, first: Any, count: Any) -> None:
    """Asks for `count` stages, each as soon as its slot is free."""
    if not p.simulated:
        plgpu.set_max_registers(24, action="decrease")

    def fetch(i: Any, carry: None) -> None:
        slot, at = lax.rem(i, p.ring.slots), first + i

        @pl.when(i >= p.ring.slots)
        def _() -> None:
            plgpu.barrier_wait(r.empty.at[slot])

        rows, bytes_ = pl.ds(tile * HEIGHT, HEIGHT), pl.ds(at * p.ring.stage_bytes, p.ring.stage_bytes)
        plgpu.copy_gmem_to_smem(r.codes.at[rows, bytes_], r.codes_smem.at[slot], r.full.at[slot])
        x = r.x.at[pl.ds(0 * at, p.rows), pl.ds(at * p.stage, p.stage)]
        plgpu.copy_gmem_to_smem(x, r.x_smem.at[slot], r.full.at[slot])
        return carry

    lax.fori_loop(0, count, fetch, None)
    if p.simulated:  # which wants every arrival to be seen

        def drain(i: Any, carry: None) -> None:
            plgpu.barrier_wait(r.empty.at[lax.rem(i, p.ring.slots)])
            return carry

        lax.fori_loop(jnp.maximum(0, count - p.ring.slots), count, drain, None)


def _multiply(r: Refs, p: Plan, worker: Any, tile: Any, first: Any, count: Any) -> Any:
    """The sums of every `workers`th stage, float32 `[64, rows]`."""
    workers = p.ring.workers
    if not p.simulated:
        # Of what the launch gives to each thread, the warpgroup that copies gives back all but 24.
        given = 65536 // (128 * (workers + 1)) // 8 * 8
        plgpu.set_max_registers(min(240, given + (given - 24) // workers // 8 * 8), action="increase")

    def params(step: Any, u: int) -> tuple[Any, ...]:
        """Scale, and zero point as an offset of codes, of every row, for a unit."""
        block = ((first + step) * p.units + u) * p.unit // p.group if p.group else jnp.int32(0)
        scale = registers.scales(r.scale, tile, block, p.simulated)
        return (scale,) if r.zero is None else (scale, registers.offsets(r.zero, tile, block, r.x.dtype, p.simulated))

    def left_of(slot: Any, u: int, zero: Any) -> Any:
        return registers.left(r.codes_smem.at[slot], u, p.element, p.unit, zero, r.x.dtype, p.simulated)

    def product(slot: Any, u: int, left: Any) -> Any:
        if p.simulated:
            r.left_smem[worker] = left
            r.right_smem[worker] = r.x_smem[slot, :, pl.ds(u * p.unit, p.unit)].T
            plgpu.commit_smem()
            left, right = r.left_smem.at[worker], r.right_smem.at[worker]
        else:
            right = compat.transposed(r.x_smem.at[slot, :, pl.ds(u * p.unit, p.unit)])

        def run(sums: Any) -> Any:
            plgpu.wgmma(sums, left, right)
            return sums[...]

        return pl.run_scoped(run, plgpu.ACC((HEIGHT, p.rows), jnp.float32))

    def turn(j: Any, carry: Any) -> Any:
        acc, now = carry
        i = j * workers + worker
        slot = lax.rem(i, p.ring.slots)
        plgpu.barrier_wait(r.full.at[slot])
        for u in range(p.units):
            # Those of the next unit are under way while this one is multiplied.
            later = now if not p.group else params(i, u + 1) if u + 1 < p.units else params(i + workers, 0)
            left = left_of(slot, u, now[1] if r.zero is not None else None)
            if u == 0 and p.ring.inside:
                registers.arrange(r.x_smem.at[slot], p.element, p.unit, p.simulated)
                plgpu.commit_smem()
            sums = product(slot, u, left)
            acc = acc + (sums * lax.broadcast_in_dim(now[0], sums.shape, (0,)) if p.group else sums)
            now = later
        plgpu.barrier_arrive(r.empty.at[slot])
        return acc, now

    zeros = jnp.zeros((HEIGHT, p.rows), jnp.float32)
    start = zeros if p.simulated else plgpu.layout_cast(zeros, registers.LAYOUT)
    turns = jnp.maximum(0, (count - worker + workers - 1) // workers)
    acc, last = lax.fori_loop(0, turns, turn, (start, params(worker, 0)))
    unit = 1.0 / upcast.small_float_unit(p.element) if p.element.kind == "float" else 1.0
    return acc * unit if p.group else acc * lax.broadcast_in_dim(last[0] * unit, acc.shape, (0,))


def _finish(r: Refs, p: Plan, worker: Any, tile: Any, part: Any, acc: Any) -> None:
    """The first worker adds what the others leave, and writes it."""

    @pl.when(worker > 0)
    def _() -> None:
        registers.leave(acc, r.sums_smem.at[worker - 1], p.simulated)
        plgpu.barrier_arrive(r.done)

    @pl.when(worker == 0)
    def _() -> None:
        total = acc
        if p.ring.workers > 1:
            plgpu.barrier_wait(r.done)
        for other in range(p.ring.workers - 1):
            total = registers.take(total, r.sums_smem.at[other], p.simulated)
        registers.store(total, r.out, tile, part, p.simulated)
