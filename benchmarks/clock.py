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
