"""jquant: quantization for JAX, as pure functions over parameter pytrees."""

from jquant.calibrate import calibrate
from jquant.core.errors import JQuantError, JQuantWarning
from jquant.core.formats import (
    FP8_E4M3,
    FP8_E5M2,
    INT2_G32_ASYM,
    INT3_G64,
    INT3_G64_ASYM,
    INT4,
    INT4_G32,
    INT4_G64,
    INT4_G64_ASYM,
    INT4_G128,
    INT4_G128_ASYM,
    INT5_G64,
    INT6_G64,
    INT8,
    INT8_G128,
    INT8_TENSOR,
    NF4,
    Format,
    parse_format,
)
from jquant.core.method import Method, chain
from jquant.core.qtensor import QTensor, dequantize, is_qtensor
from jquant.core.recipe import Recipe, parse_recipe
from jquant.core.stats import Stats, merge
from jquant.evaluate import Evaluation, evaluate
from jquant.quantize import quantize
from jquant.solvers.gptq import gptq
from jquant.solvers.rtn import rtn
from jquant.trace.execute import explain, quantized
from jquant.trace.sites import Site, Sites, find_sites
