"""jquant: quantization for JAX, as pure functions over parameter pytrees."""

from jquant.core.formats import Format
from jquant.core.qtensor import QTensor, dequantize, is_qtensor
from jquant.trace.execute import explain, quantized
from jquant.trace.sites import Site, Sites, find_sites
