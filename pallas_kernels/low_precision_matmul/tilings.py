"""Blocks for products of 8-bit codes: large ones for many rows, parts of the contracted axis for few."""

import math

from pallas_kernels.gpus import Gpu
from pallas_kernels.quantized_matmul.tilings import Tiling


def choose(m: int, n: int, k: int, group_size: int | None, gpu: Gpu) -> Tiling:
    """A tiling whose stages fit the shared memory, split until the cores have work. A rule, not a measurement."""
    rows = max(16, min(128, 1 << max(m - 1, 0).bit_length()))
    block_n = 128 if rows >= 64 else 64
    block_k = min(128, group_size & -group_size) if group_size is not None and group_size < k else 128
    programs, split = math.ceil(m / rows) * math.ceil(n / block_n), 1
    while m <= 64 and programs * split < 2 * gpu.cores and math.ceil(k / block_k) >= 8 * split:
        split *= 2
    stages = 3 if gpu.arch < 90 and rows == 128 else 4
    stages = min(stages, gpu.shared_per_block // ((rows + block_n) * block_k))
    return Tiling(rows, block_n, block_k, split, 8 if rows == 128 else 4, stages)
