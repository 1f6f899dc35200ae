"""What the functions of the cache refuse: an error in front of the work, with what to write instead.

Numbers inside jit are not known; there only shapes are checked.
"""

from typing import Any

import jax
import numpy as np

from jquant.core.errors import CacheError


def known(a: Any) -> np.ndarray | None:
    """The numbers, or None inside jit."""
    return None if isinstance(a, jax.core.Tracer) else np.asarray(a)


def fitting(where: str, name: str, given: Any, shape: tuple[int, ...], words: str, *, positive: bool = False) -> None:
    """Refuses what does not broadcast to `shape` (`words` says what its axes are), or is not finite and positive."""
    own = np.shape(given)
    if len(own) > len(shape) or any(a not in (1, b) for a, b in zip(own[::-1], shape[::-1])):
        raise CacheError(f"{where}: {name} of shape {own} must be {words}, here {list(shape)}")
    numbers = known(given)
    if numbers is None:
        return
    if not np.isfinite(numbers).all() or (positive and not (numbers > 0).all()):
        raise CacheError(f"{where}: {name} must be finite{' and positive' * positive}, got {numbers.min()}")


def static_scale(name: str, given: Any, coding: Any, heads: int) -> None:
    """Refuses a scale that does not fit, or that the coding has no use for."""
    if given is None:
        return
    if not coding.static:
        raise CacheError(
            f"init: {name} is given, but {coding} has no static scale; leave it out, or choose a format with one, such "
            "as fp8_e4m3-tensor or nvfp4"
        )
    fitting("init", name, given, (heads,), "one number, or [kv_heads]", positive=True)


def row(where: str, given: Any, batch: int) -> None:
    """Refuses a row that is not there."""
    found = known(given)
    if np.shape(given) != () or (found is not None and not 0 <= found < batch):
        raise CacheError(f"{where}: row {given} must be one number from 0 to {batch - 1}")


def counts(given: Any, batch: int, tokens: int) -> None:
    """Refuses counts that do not fit, or that are beyond the tokens."""
    if np.shape(given) != (batch,):
        raise CacheError(f"append: counts of shape {np.shape(given)} must be [batch], here [{batch}]")
    numbers = known(given)
    if numbers is not None and ((numbers < 0) | (numbers > tokens)).any():
        raise CacheError(f"append: counts {numbers.tolist()} must be from 0 to the {tokens} tokens that are given")
