"""Freed memory goes back to the system: what glibc keeps for later counts as resident."""

import ctypes
import functools
import sys
from typing import Any

_M_MMAP_THRESHOLD = -3


@functools.cache
def _libc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
    except OSError:
        return None


def give_back() -> None:
    """Returns what glibc's heaps hold free to the system; elsewhere nothing happens."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


def give_back_at_once(above: int = 1 << 20) -> None:
    """From now on blocks of more than `above` bytes go back to the system when they are freed (with glibc).

    For a process of our own, such as the command line: the setting is the whole process's. Without it glibc raises the
    limit to 32 MiB by itself and keeps hundreds of MB of freed activations.
    """
    if (libc := _libc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, above)
