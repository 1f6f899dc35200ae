"""What the benchmarks of single functions share."""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp


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


def on_gpu(program: Any, fixed: Any, moving: list[Any], repeats: int = 12) -> float:
    """Seconds that the kernels of a compiled program take on the GPU, the median of several runs: launches and the
    gaps between kernels are not in it. `moving` arguments take turns, so that they are not in the cache.
    """
    return statistics.median(sum(t for _, t in run) for run in in_turns(program, fixed, moving, repeats))


def in_turns(program: Any, fixed: Any, moving: list[Any], repeats: int) -> list[list[tuple[str, float]]]:
    """`kernel_times` of so many calls or more, one for each of `moving` at least."""
    count = max(repeats, len(moving))
    return [kernel_times(program, fixed, moving[i % len(moving)]) for i in range(count)]


def error_of(got: jax.Array, want: jax.Array) -> float:
    """The root of the mean square of the difference over that of `want`; where one is NaN (a code of fp8) it does not
    count."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.sqrt(jnp.nanmean((got - want) ** 2) / jnp.nanmean(want**2)))


def compiled(functions: Iterable[tuple[Callable[..., Any], tuple]]) -> Iterator[Any]:
    """The program of each function and its arguments, or the error, in order; compiled by all processors at a time."""

    def finished(lowered: Any) -> Any:
        try:
            return lowered.compile()
        except Exception as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: list[Callable[[], Any]] = []
        for fn, args in functions:
            try:
                waiting.append(pool.submit(finished, jax.jit(fn).lower(*args)).result)
            except Exception as error:
                waiting.append(lambda error=error: error)
        for result in waiting:
            yield result()


def ceilings() -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), and operations a second of a large bfloat16 product."""
    x = jnp.arange(1 << 29, dtype=jnp.uint32)
    copy = on_gpu(jax.jit(lambda x, _: x + 1).lower(x, x[:1]).compile(), x, [x[:1]])
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = on_gpu(jax.jit(lambda a, b: a @ b.T).lower(a, a).compile(), a, [a])
    return 8 * (1 << 29) / copy, 2 * 8192**3 / product
