"""What the benchmarks of single functions share."""

import time
from typing import Any

import jax


def best(fn: Any, *args: Any, repeats: int = 10) -> float:
    """Seconds of the fastest of several calls, compiled."""
    fn = jax.jit(fn)
    jax.block_until_ready(fn(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def kernel_times(program: Any, *args: Any) -> list[tuple[str, float]]:
    """The kernels that one call of a compiled program runs on the GPU, in order, and the seconds of each, by CUPTI."""
    from jax.experimental.mosaic.gpu import profiler

    _, found = profiler.Cupti(finalize=False).measure(program, aggregate=False)(*args)
    return [(name, ms / 1e3) for name, ms in found or []]
