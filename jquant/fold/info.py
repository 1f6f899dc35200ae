"""What is known of the values of a program while labels flow through it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jquant.fold.flow import Flow


class Info(NamedTuple):
    """What is known of a value.

    Attributes:
      labels: int64, of the value's rank; each dimension in full, or of length 1 where the labels don't depend on it.
      vary: for each dimension whether the value may vary along it.
      const: its value, where all entries are one number that is known.
      param: `(path, a, b)` where it is a w + b of the leaf at `path`, rearranged, and nothing else.
      square: it is the entrywise square of what has these labels.
    """

    labels: np.ndarray
    vary: tuple[bool, ...]
    const: float | None = None
    param: tuple[str, float, float] | None = None
    square: bool = False

    @property
    def zero(self) -> bool:
        return self.const == 0


class Role(NamedTuple):
    """How a leaf is read. A table that is looked up and also multiplied has two."""

    path: str
    kind: str  # "dot", "ragged_dot", "lookup" or "read"


class Fold(NamedTuple):
    """A change of parameters.

    Attributes:
      flow: the labels of the parameters' channels.
      diagonal: it scales channels, and mixes none.
      change: `(array, classes that its entries produce, classes that they contract) -> array`, float64; classes have
        the array's rank, and are None where there are none.
    """

    flow: "Flow"
    diagonal: bool
    change: Callable[[np.ndarray, np.ndarray | None, np.ndarray | None], np.ndarray]


Rule = Callable[["Flow", Any, list[Info], tuple[tuple[int, ...], ...]], list[Info] | None]


def plain(shape: tuple[int, ...]) -> Info:
    """A value of which nothing is known."""
    return Info(np.zeros((1,) * len(shape), np.int64), tuple(s > 1 for s in shape))


def aligned(infos: list[Info], ndim: int) -> list[Info]:
    """Operands of an entrywise operation, scalars as values of its rank."""
    out = []
    for i in infos:
        if i.labels.ndim == ndim:
            out.append(i)
        else:
            out.append(i._replace(labels=i.labels.reshape((1,) * ndim), vary=(False,) * ndim))
    return out


def varies(infos: list[Info]) -> tuple[bool, ...]:
    """The dimensions along which an entrywise operation's result varies."""
    return tuple(any(v) for v in zip(*(i.vary for i in infos), strict=True))


def together(infos: list[Info]) -> np.ndarray:
    """The labels of an entrywise result of operands of which one has labels, or whose labels are one by now."""
    shape = np.broadcast_shapes(*(i.labels.shape for i in infos))
    out = np.zeros(shape, np.int64)
    for i in infos:
        out = np.where(out == 0, i.labels, out)
    return out
