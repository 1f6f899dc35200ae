"""The product through Pallas' Mosaic GPU backend, for Hopper: few rows of activations, each byte of the weight read once.

A block multiplies 64 rows of the weight (the height of a wgmma) with all rows of the activations. One warpgroup asks the
copy engine for codes and activations, a ring of stages ahead; the others take the stages in turn. A stage is cut into
units. The codes of a unit go from shared memory into registers, 4 to 16 bytes a thread, are upcast there and are the left
operand of the tensor core; the activations are the right one, from shared memory. The sums of a unit are multiplied by
the scales of its rows (a group holds whole units) and added in float32.

Which code of a unit comes into which register is the tensor core's choice of rows and columns, but any order of the
contracted axis is right if both operands have it. So codes are upcast where they happen to lie, without a shuffle, and
the activations are brought into the same order beforehand (`arranged`), by XLA, which can make it part of what computes
them.

What Pallas has no words for is in `mosaic_registers`.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.gpus import Gpu, gpu
from pallas_kernels.quantized_matmul import mosaic_registers as registers
from pallas_kernels.quantized_matmul import upcast
from pallas_kernels.quantized_matmul.elements import Element, element, plane_widths

HEIGHT = 64  # rows of the weight of a block: of a wgmma
MOST = 64  # rows of activations
FLOATS = ("float32", "bfloat16", "float16")


class Ring(NamedTuple):
    """The static choices of one kernel.

    Attributes:
      stage_bytes: of a row of codes, read at a time.
      slots: stages in shared memory.
      workers: warpgroups that multiply; they divide the slots.
      split_k: parts of the contracted axis that are summed by blocks of their own, and added afterwards.
    """

    stage_bytes: int
    slots: int
    workers: int
    split_k: int = 1


class Plan(NamedTuple):
    """What is known of a product before the program runs.

    Attributes:
      name: of the element.
      group: elements that share a scale; 0 where a row does.
      unit: codes of a row that are multiplied at a time.
      rows: of activations, up to the next multiple of 8.
      m, n: rows of activations, rows of the weight.
      steps: stages of a row.
      ring: how it runs.
      simulated: in Pallas' simulator, which has no registers: the upcast unit goes through shared memory.
    """

    name: str
    group: int
    unit: int
    rows: int
    m: int
    n: int
    steps: int
    ring: Ring
    simulated: bool

    @property
    def element(self) -> Element:
        return element(self.name)

    @property
    def unit_bytes(self) -> int:
        return self.unit * self.element.bits // 8

    @property
    def units(self) -> int:
        """Of a stage."""
        return self.ring.stage_bytes // self.unit_bytes

    @property
    def stage(self) -> int:
        """Codes of a row in a stage."""
        return self.units * self.unit


def unit_of(name: str, group: int) -> int:
    """Codes of a row that are multiplied at a time: whole words for each of four threads, within a group; 0 for none."""
    bits = element(name).bits
    fits = lambda unit: not group or group % unit == 0
    return next((u for u in (64 * 8 // bits, 32 * 8 // bits) if u >= 32 and fits(u)), 0)


def why_not(name: str, group_size: int | None, m: int, n: int, k: int, dtype: Any, scale_dtype: Any, zero: Any) -> str | None:
    """Why this kernel can't do a product; None where it can.

    Args:
      zero: dtype of the zero points, or None.
    """
    e = element(name)
    group = group_of(group_size, k)
    if jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        return f"activations are {jnp.dtype(dtype).name}, not bfloat16 or float16"
    if not 0 < m <= MOST:
        return f"{m} rows of activations, not 1 to {MOST}"
    if len(plane_widths(e.bits)) > 1 or e.bits not in (2, 4, 8):
        return f"codes of {e.bits} bits"
    if e.kind == "float" and e.mantissa == 2:
        return "the infinities of e5m2"
    if n < HEIGHT or k * e.bits % 128:
        return f"a weight of {n} x {k}: fewer rows than {HEIGHT}, or rows that are no multiples of 16 bytes"
    if not unit_of(name, group):
        return f"groups of {group}, which end within what is multiplied at a time"
    if jnp.dtype(scale_dtype).name not in FLOATS:
        return f"scales are {jnp.dtype(scale_dtype).name}"
    if zero is not None and (jnp.dtype(zero) != jnp.uint8 or 2**e.bits > upcast.MAGIC[jnp.dtype(dtype).name][1]):
        return f"zero points are {jnp.dtype(zero).name}, codes have {e.bits} bits"
    return None


def group_of(group_size: int | None, k: int) -> int:
    """Elements that share a scale; 0 where a row does."""
    return 0 if group_size is None or group_size >= k else group_size


def choose(p: Plan, batch: int, g: Gpu) -> Ring:
    """As much under way as shared memory holds, and a block for every core."""
    for stage_bytes in (128, 64):
        bytes_of_slot = stage_bytes * HEIGHT + 2 * p.rows * stage_bytes * 8 // p.element.bits
        if 8 * bytes_of_slot <= 0.8 * g.shared_per_block:
            break
    workers = 4
    slots = 8 if 8 * bytes_of_slot <= 0.8 * g.shared_per_block else 4
    steps = p.steps * p.ring.stage_bytes // stage_bytes
    blocks = batch * math.ceil(p.n / HEIGHT)
    split = max(1, min(g.cores // blocks, steps // workers, 8))
    return Ring(stage_bytes, slots, workers, split)


def arranged(x: jax.Array, p: Plan) -> jax.Array:
    """`[M, K]` -> `[rows, steps of whole stages]`, zeros behind, in the order in which codes come into registers.

    Of a unit every thread q of four holds a run of codes, and each register two of them, which are columns 2 q and
    2 q + 1 of the next eight: see `mosaic_registers.pairs`.
    """
    e = p.element
    x = jnp.pad(x, [(0, p.rows - x.shape[0]), (0, p.steps * p.stage - x.shape[1])])
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
        return _call(arranged(x, p), codes, params, p, dtype)

    with compat.lowering_for(gpu(device).kind), compat.simulated(interpret):
        out = (jax.vmap(one) if x.ndim == 3 else one)(x, planes[0], params)
    return jnp.sum(out, axis=-3).astype(out_dtype) if p.ring.split_k > 1 else jnp.squeeze(out, -3)


def planned(
    name: str, group: int, m: int, n: int, k: int, ring: Ring | None, batch: int, g: Gpu, simulated: bool = False
) -> Plan:
    """The plan of a product."""
    first = ring or Ring(64, 4, 4)
    steps = lambda ring: math.ceil(k * element(name).bits / 8 / ring.stage_bytes)
    p = Plan(name, group, unit_of(name, group), -(-m // 8) * 8, m, n, steps(first), first, simulated)
    ring = ring or choose(p, batch, g)
    return p._replace(ring=ring, steps=steps(ring))


def _call(x: jax.Array, codes: jax.Array, params: list[jax.Array], p: Plan, dtype: Any) -> jax.Array:
    """Arranged activations -> `[split_k, M, N]`."""
    ring, shape = p.ring, (p.ring.split_k, p.m, p.n)
    tiles, padded = math.ceil(p.n / HEIGHT), p.simulated
    if padded:  # indices beyond an array are for real memory
        shape = (ring.split_k, p.rows, tiles * HEIGHT)
        params = [jnp.pad(a, [(0, tiles * HEIGHT - p.n), (0, 0)]) for a in params]
        codes = jnp.pad(codes, [(0, tiles * HEIGHT - p.n), (0, p.steps * ring.stage_bytes - codes.shape[1])])
    swizzle = min(128, 2 * p.unit)
    tiled = lambda *transforms: () if p.simulated else transforms
    # The order of these is that of the kernel's arguments.
    scratch = dict(
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
        grid=(tiles, ring.split_k),
        grid_names=("tile", "part"),
        num_threads=ring.workers + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name=f"quantized_matmul_mosaic_{p.name}",
    )
    out = run(codes, x, *params)
    return out[:, : p.m, : p.n] if padded else out


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
        plgpu.copy_gmem_to_smem(r.x.at[:, pl.ds(at * p.stage, p.stage)], r.x_smem.at[slot], r.full.at[slot])
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

    def product(i: Any, slot: Any, u: int, zero: Any) -> Any:
        left = registers.left(r.codes_smem.at[slot], u, p.element, p.unit, zero, r.x.dtype, p.simulated)
        if p.simulated:
            r.left_smem[worker] = left
            r.right_smem[worker] = r.x_smem[slot, :, pl.ds(u * p.unit, p.unit)].T
            plgpu.commit_smem()
            left, right = r.left_smem.at[worker], r.right_smem.at[worker]
        else:
            right = plgpu.transpose_ref(r.x_smem.at[slot, :, pl.ds(u * p.unit, p.unit)], (1, 0))

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
            sums = product(i, slot, u, now[1] if r.zero is not None else None)
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
