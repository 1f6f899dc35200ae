# ruff: noqa: F401
"""jquant: quantization for JAX, as pure functions over parameter pytrees.

A name is imported when it is first used, so that `import jquant` and `jquant --help` do not wait for JAX.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jquant import kv_cache, models
    from jquant.calibrate import calibrate
    from jquant.checkpoint import load, save
    from jquant.core.activation import (
        FP8,
        FP8_STATIC,
        W4A8,
        W4A16,
        W8A8,
        W8A8_STATIC,
        Activation,
        Policy,
        parse_policy,
    )
    from jquant.core.errors import JQuantError, JQuantWarning
    from jquant.core.format_type import (
        FP8_E4M3,
        FP8_E4M3_BLOCK128,
        FP8_E4M3_TENSOR,
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
        MXFP4,
        MXFP6,
        MXFP6_E3M2,
        MXFP8,
        MXFP8_E5M2,
        NF4,
        NF4_DQ,
        NVFP4,
        NVFP4_FOUR_OVER_SIX,
        TERNARY,
        Format,
        parse_format,
    )
    from jquant.core.method import Method, chain
    from jquant.core.per_use import PerUse
    from jquant.core.qtensor import QTensor, dequantize, is_qtensor
    from jquant.core.recipe import Recipe, parse_recipe
    from jquant.core.stats import Stats, merge
    from jquant.evaluate import Evaluation, evaluate, evaluate_all, windows
    from jquant.fold.awq import awq
    from jquant.fold.found import FoldFound, Folds, find_folds
    from jquant.fold.learned import learned_rotation
    from jquant.fold.rotate import rotate
    from jquant.fold.smoothquant import smoothquant
    from jquant.methods import parse_method
    from jquant.quantize import quantize
    from jquant.solvers.gptaq import gptaq
    from jquant.solvers.gptq import gptq
    from jquant.solvers.hqq import hqq
    from jquant.solvers.lowrank import lowrank
    from jquant.solvers.lowrank_inputs import lowrank_inputs
    from jquant.solvers.qronos import qronos
    from jquant.solvers.rtn import rtn
    from jquant.trace.execute import explain, quantized
    from jquant.trace.fake_quant import fake_quantized
    from jquant.trace.sites import Site, Sites, find_sites

# The same names once more, for the import at run time (tests/cli/test_program.py holds the two together).
_NAMES = {
    "calibrate": "calibrate",
    "checkpoint": "load save",
    "core.activation": "FP8 FP8_STATIC W4A8 W4A16 W8A8 W8A8_STATIC Activation Policy parse_policy",
    "core.errors": "JQuantError JQuantWarning",
    "core.format_type": "FP8_E4M3 FP8_E4M3_BLOCK128 FP8_E4M3_TENSOR FP8_E5M2 INT2_G32_ASYM INT3_G64 INT3_G64_ASYM INT4 "
    "INT4_G32 INT4_G64 INT4_G64_ASYM INT4_G128 INT4_G128_ASYM INT5_G64 INT6_G64 INT8 INT8_G128 INT8_TENSOR MXFP4 MXFP6 "
    "MXFP6_E3M2 MXFP8 MXFP8_E5M2 NF4 NF4_DQ NVFP4 NVFP4_FOUR_OVER_SIX TERNARY Format parse_format",
    "core.method": "Method chain",
    "core.per_use": "PerUse",
    "core.qtensor": "QTensor dequantize is_qtensor",
    "core.recipe": "Recipe parse_recipe",
    "core.stats": "Stats merge",
    "evaluate": "Evaluation evaluate evaluate_all windows",
    "fold.awq": "awq",
    "fold.found": "FoldFound Folds find_folds",
    "fold.learned": "learned_rotation",
    "fold.rotate": "rotate",
    "fold.smoothquant": "smoothquant",
    "methods": "parse_method",
    "quantize": "quantize",
    "solvers.gptaq": "gptaq",
    "solvers.gptq": "gptq",
    "solvers.hqq": "hqq",
    "solvers.lowrank": "lowrank",
    "solvers.lowrank_inputs": "lowrank_inputs",
    "solvers.qronos": "qronos",
    "solvers.rtn": "rtn",
    "trace.execute": "explain quantized",
    "trace.fake_quant": "fake_quantized",
    "trace.sites": "Site Sites find_sites",
}
_ROOMS = ("core", "solvers", "ops", "trace", "fold", "kv_cache", "models", "checkpoint", "report")
_WHERE = {name: f"jquant.{module}" for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted([*_WHERE, "kv_cache", "models"])


class _Surface(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name in _ROOMS:
            return importlib.import_module(f"jquant.{name}")
        if name not in _WHERE:
            raise AttributeError(f"module 'jquant' has no attribute {name!r}")
        value = getattr(importlib.import_module(_WHERE[name]), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing jquant/quantize.py binds the module to the name of the function in it; the function keeps the name.
        if not (name in _WHERE and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Surface
