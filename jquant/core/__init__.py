"""Formats, packed storage, quantized tensors, recipes and errors: what every other room stands on."""
