"""Tilings that were the fastest on a GPU: `tuned.json`, which `benchmarks/tune.py` writes."""

import functools
import json
import math
from importlib import resources
from typing import Any

# The same processor with other memory; and what is taken where the GPU is not known.
ALIKE = {"h200": "h100", "any": "h100"}


@functools.cache
def table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By device and kernel: rows with the sizes of a problem under their names, and "tiling", a list of numbers."""
    file = resources.files(__package__).joinpath("tuned.json")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def nearest(device: str, kernel: str, sizes: dict[str, int | str]) -> dict[str, Any] | None:
    """The row that is least far from the sizes, by the sum of the ratios' logarithms; None without rows of the device.

    Sizes of 0 only meet those of 0, and words only themselves; those that the rows do not have do not count.
    """
    rows = table().get(ALIKE.get(device, device), {}).get(kernel, [])

    def distance(row: dict[str, Any]) -> float:
        pairs = [(value, row[name]) for name, value in sizes.items() if name in row]
        if any(a != b if isinstance(a, str) else (a == 0) != (b == 0) for a, b in pairs):
            return math.inf
        return sum(abs(math.log2(a / b)) for a, b in pairs if a and not isinstance(a, str))

    best = min(rows, key=distance, default=None)
    return None if best is None or distance(best) == math.inf else best
