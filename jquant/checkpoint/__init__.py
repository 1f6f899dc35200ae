"""Checkpoints: a folder that holds a tree of arrays and QTensors, whole or not at all."""

from jquant.checkpoint.checkpoint import load, save
from jquant.checkpoint.folder import extra_file, is_checkpoint, read_manifest, read_metadata, verify
from jquant.checkpoint.sharding import qtensor_sharding

__all__ = [
    "extra_file",
    "is_checkpoint",
    "load",
    "qtensor_sharding",
    "read_manifest",
    "read_metadata",
    "save",
    "verify",
]
