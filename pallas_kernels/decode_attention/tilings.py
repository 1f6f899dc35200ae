"""How attention over a cache is cut: what was the fastest on a GPU, else a model of occupancy, bytes and waves."""

import math
from typing import Any, NamedTuple

from pallas_kernels import tuned
from pallas_kernels.gpus import Gpu


class Tiling(NamedTuple):
    """The static choices of one kernel.

    Attributes:
      block: slots that are read at a time; a power of two, at least 16.
      splits: parts of a sequence's slots, each a program.
      warps, stages: warps of a program; loads under way at once.
    """

    block: int
    splits: int
    warps: int = 4
    stages: int = 3


class Problem(NamedTuple):
    """What a tiling is chosen for.

    Attributes:
      batch, kv_heads, rows: sequences, kv heads, queries of a kv head.
      length: slots of a sequence.
      dim: head_dim.
      token_bytes: of keys and values of a token and head, scales included.
      largest: slots of a block at most.
      doubled: whether an element is the sum of two numbers, in registers.
      style: where scales of keys and values are multiplied (`triton.View.scales`, how many groups), "/" between.
    """

    batch: int
    kv_heads: int
    rows: int
    length: int
    dim: int
    token_bytes: float
    largest: int
    doubled: bool = False
    style: str = ""


# Of a warp, for each channel of a token: about what the kernels have been compiled to (50 for 128 channels).
INSTRUCTIONS = 0.4


def choose(p: Problem, device: str, gpu: Gpu) -> Tiling:
    """The tiling of a problem: that of the nearest one that was tuned on the device, else the model's below."""
    found = tuned.nearest(device, "decode_attention", sizes(p))
    # Wider vectors than it was measured with may not fit in its warps' registers.
    adapted = None if found is None or p.dim > found["dim"] else adapt(p, found, gpu)
    if adapted is not None:
        return adapted
    options = [t for t in _candidates(p) if shared_bytes(p, t) <= gpu.shared_per_block]
    return min(options, key=lambda t: (seconds(p, t, gpu), t.splits, -t.block))


def sizes(p: Problem) -> dict[str, int | str]:
    """What a row of `tuned.table` is found by."""
    return {"bytes": round(p.token_bytes * 128 / p.dim), "dim": p.dim, "doubled": int(p.doubled), "style": p.style}


def adapt(p: Problem, row: dict[str, Any], gpu: Gpu) -> Tiling | None:
    """The tiling of a row of `tuned.table` for a problem near it: as many programs; None if its blocks do not fit."""
    t = Tiling(*row["tiling"])
    per_warp = t.block // t.warps
    block = min(t.block, p.largest, max(16, _power(p.length)))
    sequences, blocks = p.batch * p.kv_heads, math.ceil(p.length / block)
    splits = [s for n in range(11) for s in (1 << n, 3 << n) if s == 1 or blocks >= 4 * s]
    wanted = row["sequences"] * t.splits
    split = min(splits, key=lambda s: abs(math.log2(sequences * s / wanted)))
    t = t._replace(block=block, splits=split, warps=max(1, block // per_warp))
    return t if shared_bytes(p, t) <= gpu.shared_per_block else None


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _candidates(p: Problem) -> list[Tiling]:
    # A warp for 32 slots: with fewer slots than threads, scales would be loaded several times. Two or four (two
    # for codes of two bits) for vectors whose sums and elements would not fit in the registers of one.
    numbers = _power(p.dim) * (3 if p.doubled else 1)  # doubled: the number, and the two
    per_warp = 32 if numbers <= 128 else 16 if p.token_bytes < p.dim else 8
    blocks = {min(p.largest, b, max(16, _power(p.length))) for b in (32, 64, 128)}
    splits = [s for n in range(11) for s in (1 << n, 3 << n)]
    # More than eight warps have fewer registers each.
    sizes = [(b, s) for b in blocks for s in splits if (s == 1 or p.length >= s * b) and b <= 8 * per_warp]
    return [Tiling(b, s, max(1, b // per_warp), stages) for b, s in sizes for stages in (2, 3, 4)]


def shared_bytes(p: Problem, t: Tiling) -> int:
    """Bytes of shared memory: codes of the blocks under way, and one block as bfloat16 between two layouts."""
    return round(t.block * p.token_bytes * t.stages) + t.block * p.dim * 2


def programs(p: Problem, t: Tiling) -> int:
    """How many programs the kernel has."""
    return p.batch * p.kv_heads * t.splits


def resident(p: Problem, t: Tiling, gpu: Gpu) -> int:
    """Programs that a core holds at a time: limited by shared memory, and by registers, up to 250 a thread."""
    by_shared = gpu.shared_per_core // (shared_bytes(p, t) + 1024)
    by_registers = gpu.registers // (32 * t.warps * 250)
    return max(1, min(by_shared, by_registers))


def seconds(p: Problem, t: Tiling, gpu: Gpu) -> float:
    """What the model takes the kernel for, full to the last slot: bytes by whole waves, blocks filled up, and the sums.

    A model to choose by, not a measurement.
    """
    at_once = gpu.cores * resident(p, t, gpu)
    n = programs(p, t)
    waves = math.ceil(n / at_once)
    read = p.batch * p.kv_heads * p.length * p.token_bytes
    state = 4 * n * p.rows * (p.dim + 2)  # written, and read again
    # Bytes under way hide the latency of memory (about 0.7 us): a core needs its share of them.
    under_way = min(n, at_once) * (t.stages - 1) * t.block * p.token_bytes
    # And it draws no more than half as much again as its share of the bandwidth.
    hidden = min(1.0, under_way / (0.7e-6 * gpu.bandwidth), 1.5 * n / gpu.cores)
    per_split = math.ceil(p.length / t.splits / t.block) * t.block * t.splits / p.length
    # Of the last wave, only as much as it holds runs, a little faster each.
    even = n / (waves * at_once) if waves > 1 else 1.0
    memory = read * per_split / (gpu.bandwidth * hidden * even)
    # A scheduler issues an instruction every third cycle for one warp, and nearly always for three.
    per_scheduler = min(resident(p, t, gpu), math.ceil(n / gpu.cores)) * t.warps / 4
    issued = 4 * min(gpu.cores, n) * gpu.clock_ghz * 1e9 * min(0.9, 0.35 * per_scheduler)
    work = p.batch * p.kv_heads * p.length * per_split * INSTRUCTIONS * p.dim / (issued * even)
    return max(memory, work) + 2 * state / gpu.bandwidth + (3e-6 if t.splits > 1 else 0.0)
