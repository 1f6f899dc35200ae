"""Freed memory goes back to the system: what glibc keeps for later counts as resident."""

import ctypes
import functools
import math
import mmap
import sys
from typing import Any

import jax
import numpy as np


@functools.cache
def _libc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "malloc_trim") else None
    except OSError:
        return None


def give_back(slack: int = 0) -> None:
    """Returns what glibc's heaps hold free to the system; elsewhere nothing happens.

    All heaps are searched, and what is allocated next has to be mapped anew. So with a `slack`, only if so many bytes
    more are resident than after the last time.
    """
    global _kept
    if (libc := _libc()) is None or (slack and _resident() < _kept + slack):
        return
    libc.malloc_trim(0)
    _kept = _resident()


_kept = 0.0  # bytes resident after the last time


def _resident() -> float:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:  # not said: then every time
        return math.inf


def in_host_memory(a: Any) -> bool:
    """Whether NumPy reads an array where it lies."""
    if isinstance(a, np.ndarray):
        return True
    return isinstance(a, jax.Array) and [d.platform for d in a.devices()] == ["cpu"]
