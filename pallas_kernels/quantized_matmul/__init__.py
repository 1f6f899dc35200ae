"""Products of float activations with a quantized weight: `quantized_matmul`."""

from pallas_kernels.quantized_matmul.product import IMPLEMENTATIONS, quantized_matmul
from pallas_kernels.quantized_matmul.rings import Ring
from pallas_kernels.quantized_matmul.tilings import Tiling

__all__ = ["IMPLEMENTATIONS", "Ring", "Tiling", "quantized_matmul"]
