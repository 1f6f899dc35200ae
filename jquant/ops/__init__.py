"""Operations on QTensors: each picks an implementation, and names it."""

from jquant.ops.dot import dot

__all__ = ["dot"]
