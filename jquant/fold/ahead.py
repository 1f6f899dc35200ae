"""What will be asked for, made ahead of time by other threads."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import jax

_MOST = 2**23  # entries that may wait to be asked for


@contextmanager
def ahead(
    make: Callable[..., Any], keys: Sequence[tuple[Any, ...]], size: Callable[[tuple[Any, ...]], int]
) -> Iterator[Callable[..., Any]]:
    """`make`, for arguments that are asked for in an order that is known, several times in a row at most.

    While one is used the next are made, as many as there are cores, in 64 bits. What was not foretold is made when it
    is asked for. The last result is kept, no other that was given.

    Args:
      make: pure; NumPy's work, which leaves the interpreter to others.
      keys: arguments of the calls to come.
      size: how many entries the result for such arguments has.
    """
    cores = os.cpu_count() or 1
    coming, waiting = deque(key for key, _ in groupby(keys)), deque[tuple[tuple[Any, ...], Future[Any]]]()
    last: dict[tuple[Any, ...], Any] = {}

    def made(key: tuple[Any, ...]) -> Any:
        with jax.enable_x64(True):  # a setting of each thread
            return make(*key)

    with ThreadPoolExecutor(cores) as pool:

        def send() -> None:
            while coming and len(waiting) < cores:
                if waiting and sum(size(k) for k, _ in waiting) + size(coming[0]) > _MOST:
                    return
                waiting.append((key := coming.popleft(), pool.submit(made, key)))

        def get(*key: Any) -> Any:
            if key not in last:
                last.clear()
                send()
                found = None
                while any(k == key for k, _ in waiting):  # in front of it is what was foretold and not asked for
                    found = waiting.popleft()[1]
                send()
                last[key] = made(key) if found is None else found.result()
            return last[key]

        try:
            yield get
        finally:
            pool.shutdown(cancel_futures=True)
            waiting.clear()
