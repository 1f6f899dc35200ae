"""Operations on QTensors: each picks an implementation, and names it."""

from jquant.ops import low_precision, ragged
from jquant.ops.dot import dot

__all__ = ["dot", "low_precision", "ragged"]
