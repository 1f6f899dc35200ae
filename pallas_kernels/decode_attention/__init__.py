"""Attention of a few queries over a quantized KV cache: `decode_attention`."""

from pallas_kernels.decode_attention.attention import decode_attention, normalized, why_not
from pallas_kernels.decode_attention.layout import Coded, Layout, Rules, State
from pallas_kernels.decode_attention.tilings import Tiling

__all__ = ["Coded", "Layout", "Rules", "State", "Tiling", "decode_attention", "normalized", "why_not"]
