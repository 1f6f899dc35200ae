"""Accelerator kernels for quantized arrays: arrays in, arrays out. Knows nothing of jquant."""
