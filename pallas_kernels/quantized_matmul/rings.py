"""How the kernel through Mosaic cuts a product, which ones it can do, and which it is taken for. No kernel in here.

The words are those of `mosaic`: a block has 64 rows of the weight and all of the activations; stages of codes come into
a ring in shared memory; a unit of a stage is multiplied at a time.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import tuned
from pallas_kernels.gpus import Gpu, gpu, named
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
      split_k: parts of the contracted axis that are summed by blocks of their own, and added afterwards. (Within a
        cluster of blocks it took as long on an H100, and much longer in eight parts.)
      inside: who multiplies brings the activations into the order of the codes first.
    """

    stage_bytes: int
    slots: int
    workers: int
    split_k: int = 1
    inside: bool = False


class Plan(NamedTuple):
    """What is known of a product before the program runs.

    Attributes:
      name: of the element.
      group: elements that share a scale; 0 where a row does.
      unit: codes of a row that are multiplied at a time.
      rows: of activations, up to the next multiple of 8.
      m, n, k: rows of activations, rows of the weight, contracted elements.
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
    k: int
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


def planned(
    name: str, group: int, m: int, n: int, k: int, ring: Ring | None, batch: int, g: Gpu, simulated: bool = False
) -> Plan:
    """The plan of a product."""
    first = ring or Ring(64, 4, 4)
    steps = lambda ring: math.ceil(k * element(name).bits / 8 / ring.stage_bytes)
    p = Plan(name, group, unit_of(name, group), -(-m // 8) * 8, m, n, k, steps(first), first, simulated)
    ring = ring or choose(p, batch, g)
    p = p._replace(ring=ring, steps=steps(ring))
    if ring.slots % ring.workers:
        raise ValueError(f"quantized_matmul: {ring} must have a multiple of {ring.workers} slots, a set for each")
    if ring.inside and not can_arrange(p):
        raise ValueError(f"quantized_matmul: {ring} is for units of 64 codes of 4 bits or more, not {p.unit} {name}")
    if ring.stage_bytes % p.unit_bytes:
        raise ValueError(f"quantized_matmul: a stage of {ring} must be a multiple of {p.unit_bytes} bytes of a row")
    return p


def unit_of(name: str, group: int) -> int:
    """Codes of a row that are multiplied at a time: of 64 or 32 bytes, within a group; 0 where none fits."""
    bits = element(name).bits
    fits = lambda unit: not group or group % unit == 0
    return next((u for u in (64 * 8 // bits, 32 * 8 // bits) if u >= 32 and fits(u)), 0)


def choose(p: Plan, batch: int, g: Gpu) -> Ring:
    """The ring of the nearest product that was tuned on the GPU, if it fits; else the largest stages, and the most,
    that shared memory holds. As many parts as give every core a block.
    """
    found = tuned.nearest(named(g.kind) or "", "quantized_matmul through mosaic", sizes(p))
    inside = p.element.bits == 8 and p.m <= 16 and can_arrange(p)  # where it was faster
    measured = [Ring(*found["tiling"])._replace(inside=inside)] if found else []
    most = [Ring(size, slots, 4, 1, inside) for size, slots in ((128, 8), (64, 8), (64, 4), (32, 4))]

    def fits(ring: Ring) -> bool:
        whole = ring.stage_bytes % p.unit_bytes == 0
        return whole and shared_bytes(p._replace(ring=ring)) <= g.shared_per_block

    ring = next(filter(fits, [*measured, *most]))
    steps = math.ceil(p.steps * p.ring.stage_bytes / ring.stage_bytes)
    blocks = batch * math.ceil(p.n / HEIGHT)
    # No part may be empty.
    wanted = max(1, min(g.cores // blocks, steps // ring.workers, 8))
    return ring._replace(split_k=math.ceil(steps / math.ceil(steps / wanted)))


def can_arrange(p: Plan) -> bool:
    """Whether the kernel can bring the activations into order: eight of a row lie in one thread's run of codes."""
    return p.unit >= 64 and p.element.bits >= 4


def sizes(p: Plan) -> dict[str, int | str]:
    """What a row of `tuned.table` is found by."""
    return {"bits": p.element.bits, "group": p.group, "rows": p.m, "n": p.n, "k": p.k}


def shared_bytes(p: Plan) -> int:
    """Bytes of shared memory of a block."""
    slot = HEIGHT * p.ring.stage_bytes + 2 * p.rows * p.stage
    return p.ring.slots * (slot + 16) + 4 * HEIGHT * p.rows * max(p.ring.workers - 1, 1) + 1024


def group_of(group_size: int | None, k: int) -> int:
    """Elements that share a scale; 0 where a row does."""
    return 0 if group_size is None or group_size >= k else group_size


def why_not(
    name: str, group_size: int | None, m: int, n: int, k: int, dtype: Any, scale_dtype: Any, zero: Any
) -> str | None:
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
    unit = unit_of(name, group)
    if not unit:
        return f"groups of {group}, which end within what is multiplied at a time"
    if 0 in (n, k) or n % HEIGHT or k % unit:
        return f"a weight of {n} x {k}, not a multiple of {HEIGHT} x {unit}"
    if jnp.dtype(scale_dtype).name not in FLOATS:
        return f"scales are {jnp.dtype(scale_dtype).name}"
    if zero is not None and (jnp.dtype(zero) != jnp.uint8 or 2**e.bits > upcast.MAGIC[jnp.dtype(dtype).name][1]):
        return f"zero points are {jnp.dtype(zero).name}, codes have {e.bits} bits"
    return None


def preferred(device: str, name: str, group_size: int | None, x: Any, planes: Any, scale: Any, zero: Any) -> bool:
    """Whether this kernel is the one to take on a device, rather than Triton's.

    On an H100 it was the faster one with codes of 4 bits, and with up to 16 rows of those of 8; codes of 2 bits were
    not timed (benchmarks/results/kernels-h100.md).
    """
    if gpu(device).arch != 90:
        return False
    m, k, n, bits = x.shape[-2], x.shape[-1], planes[0].shape[-2], element(name).bits
    if why_not(name, group_size, m, n, k, x.dtype, scale.dtype, None if zero is None else zero.dtype):
        return False
    return bits == 4 or (bits == 8 and m <= 16)
