"""Products of two quantized operands: int8 x int8 -> int32 and fp8 x fp8 -> float32, with scales."""

from pallas_kernels.low_precision_matmul.triton import low_precision_matmul

__all__ = ["low_precision_matmul"]
