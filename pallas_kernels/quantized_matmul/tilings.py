"""How a product is cut into blocks: what was the fastest on a GPU, else a model of occupancy, bytes and waves.

The program of a kernel is one block of `block_n` rows of the weight by `block_m` rows of the activations, and one of
`split_k` parts of the contracted axis. `block_k` codes of a row are read at a time.
"""

import math
from typing import Any, NamedTuple

from pallas_kernels import tuned
from pallas_kernels.gpus import Gpu


class Tiling(NamedTuple):
    """The static choices of one kernel.

    Attributes:
      block_m: rows of activations of a program, at least 16 (the tensor core's).
      block_n: rows of the weight of a program.
      block_k: codes of a row that are read at a time.
      split_k: parts of the contracted axis that are summed apart, and added afterwards.
      warps, stages: warps of a program; loads under way at once.
      inside: scales of groups multiply the elements, which rounds these to the dtype of the activations, also where
        they could multiply the sums of a group: less work where rows are many.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    warps: int = 4
    stages: int = 4
    inside: bool = False


class Problem(NamedTuple):
    """What a tiling is chosen for: sizes, and the weight's bits, lanes and group.

    Attributes:
      batch: products of the same sizes in one call (experts).
      m, n, k: rows of activations, rows of the weight, contracted elements.
      bits: of a code.
      lanes: codes of one word.
      group: elements that share a scale; k where the row does.
    """

    batch: int
    m: int
    n: int
    k: int
    bits: int
    lanes: int
    group: int


MIN_LANE_K = 16  # elements that a tensor core contracts at once


FEW = 128  # rows of activations; for more, the weight is written out once and multiplied by a library


def choose(p: Problem, device: str, gpu: Gpu) -> Tiling:
    """The tiling of a problem: that of the nearest one that was tuned on the device, else the model's below."""
    found = tuned.nearest(device, "quantized_matmul", sizes(p)) if p.m <= FEW else None
    adapted = None if found is None else adapt(p, found, gpu)
    if adapted is not None:
        return adapted
    options = [t for c in _candidates(p, gpu) if (t := _fitted(p, c, gpu)) is not None]
    return min(options, key=lambda t: (seconds(p, t, gpu), t.split_k, t.block_m * t.block_n))


def sizes(p: Problem) -> dict[str, int | str]:
    """What a row of `tuned.table` is found by."""
    return {"bits": p.bits, "group": 0 if p.group >= p.k else p.group, "rows": p.m, "n": p.n, "k": p.k}


def adapt(p: Problem, row: dict[str, Any], gpu: Gpu) -> Tiling | None:
    """The tiling of a row of `tuned.table` for a problem near it: as many programs, blocks that fit; or None."""
    t = Tiling(*row["tiling"])
    block_m, block_k = max(16, _power(p.m)), block_k_of(p, t.block_k)
    if (
        p.group < p.k
        and t.block_k % p.group == 0
        and p.group & -p.group == p.group
        and t.block_k >= MIN_LANE_K * p.lanes
    ):
        block_k = t.block_k  # several groups of a step
    wanted = math.ceil(row["n"] / t.block_n) * t.split_k
    blocks, steps = p.batch * math.ceil(p.n / t.block_n), math.ceil(p.k / block_k)
    splits = [s for s in (1, 2, 4, 8, 16) if s == 1 or steps >= 4 * s]
    split = min(splits, key=lambda s: abs(math.log2(blocks * s / wanted)))
    # Products of codes with codes count on exact elements: what rounds them is for who asks for it.
    t = t._replace(block_m=block_m, block_k=block_k, split_k=split, inside=False)
    fitted = _fitted(p, t, gpu)
    return fitted if t.block_m * t.block_n <= 64 * 32 * t.warps else None


def _fitted(p: Problem, t: Tiling, gpu: Gpu) -> Tiling | None:
    """With no more stages than shared memory holds; None where it does not hold two."""
    stages = min(t.stages, gpu.shared_per_block // shared_bytes(p, t))
    return t._replace(stages=stages) if stages >= min(2, t.stages) else None


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def block_k_of(p: Problem, most: int) -> int:
    """Codes read at a time: whole blocks of scales, or a part of one, at least 16 to a lane and at most `most`."""
    least = MIN_LANE_K * p.lanes
    if p.group >= p.k:
        return max(least, min(most, _power(p.k)))
    if p.group >= least:  # a power of two that divides the group
        return max(least, min(most, p.group & -p.group))
    return max(least, most)


def _candidates(p: Problem, gpu: Gpu) -> list[Tiling]:
    rows = max(16, min(128, _power(p.m)))
    steps = lambda block_k: max(1, math.ceil(p.k / block_k))
    out = []
    # Few rows are one block, so that the weight is read once.
    for block_m in {rows, rows // 2} if p.m > 64 else {rows}:
        for block_n in (64, 128):
            for most in (128, 256):
                block_k = block_k_of(p, most)
                for split in (1, 2, 4, 8, 16):
                    if split == 1 or (p.m <= 64 and steps(block_k) >= 4 * split):
                        # Two accumulators of a program, the sums and those of a step, must fit in registers.
                        warps = 8 if block_m * block_n > 64 * 128 else 4
                        out.append(Tiling(block_m, block_n, block_k, split, warps, 3 if block_m > 64 else 5))
    return out


def shared_bytes(p: Problem, t: Tiling) -> int:
    """Bytes of shared memory of one stage: the codes and the activations of one step."""
    return t.block_n * t.block_k * p.bits // 8 + t.block_m * t.block_k * 2


def programs(p: Problem, t: Tiling) -> int:
    """How many programs the kernel has."""
    return p.batch * math.ceil(p.m / t.block_m) * math.ceil(p.n / t.block_n) * t.split_k


def resident(p: Problem, t: Tiling, gpu: Gpu) -> int:
    """Programs that a core holds at a time: limited by shared memory and by 255 registers a thread at the worst."""
    by_shared = gpu.shared_per_core // max(1, shared_bytes(p, t) * t.stages + 1024)
    accumulators = t.block_m * t.block_n // (32 * t.warps)
    by_registers = gpu.registers // (32 * t.warps * min(255, accumulators * 2 + 96))
    return max(1, min(by_shared, by_registers, 32, 64 // t.warps))


def weight_bytes(p: Problem) -> int:
    """Bytes of codes and 16-bit scales."""
    return p.n * (p.k * p.bits // 8 + 2 * math.ceil(p.k / p.group))


def seconds(p: Problem, t: Tiling, gpu: Gpu) -> float:
    """What the model takes the kernel for: the slower of memory and tensor cores, by whole waves, and the split's sums.

    A model to choose by, not a measurement.
    """
    waves = programs(p, t) / (gpu.cores * resident(p, t, gpu))
    # Part of a wave runs alone: memory needs about half the cores' worth of programs under way.
    filled = programs(p, t) / (math.ceil(waves) * gpu.cores * resident(p, t, gpu))
    memory = p.batch * (weight_bytes(p) + 2 * p.m * (p.k + p.n)) / gpu.bandwidth
    again = p.batch * (math.ceil(p.m / t.block_m) - 1) * weight_bytes(p) / (4 * gpu.bandwidth)  # from the L2
    padded = math.ceil(p.m / t.block_m) * t.block_m
    products = 2 * p.batch * padded * p.n * p.k / (0.6 * gpu.bf16_flops)
    sums = 0.0 if t.split_k == 1 else 2e-6 + 8 * t.split_k * p.batch * p.m * p.n / gpu.bandwidth
    return max(memory, products) / min(1.0, max(filled, 1e-3) * 1.25) + again + sums
