"""Lists, tables and calls in words, for what is printed and for messages."""

from collections.abc import Iterable, Sequence
from typing import Any


def some(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def columns(rows: Sequence[Sequence[str]]) -> str:
    """A table of text, the first row its heads."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def call(name: str, **settings: tuple[Any, Any]) -> str:
    """A call with the settings that are not the usual: `call("gptq", damp=(0.02, 0.01))` is "gptq(damp=0.02)"."""
    return f"{name}({', '.join(f'{k}={v}' for k, (v, usual) in settings.items() if v != usual)})"
