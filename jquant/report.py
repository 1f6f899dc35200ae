"""Tables: what was measured, what holds which bytes, what the trace found; for the terminal and for Markdown."""

import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TextIO

import jax.numpy as jnp

from jquant.core.paths import flatten_with_paths
from jquant.core.per_use import held, is_per_use
from jquant.core.qtensor import is_qtensor, tree_nbytes
from jquant.evaluate import Evaluation
from jquant.trace.sites import Site


class Table(NamedTuple):
    """Cells as text. Columns whose name starts with ">" are aligned to the right.

    Attributes:
      columns: their names.
      rows: one text for each column.
    """

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    @property
    def names(self) -> list[str]:
        return [c.removeprefix(">") for c in self.columns]

    def text(self) -> str:
        """Plain text, columns two spaces apart."""
        cells = [self.names, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        just = [str.rjust if c.startswith(">") else str.ljust for c in self.columns]
        lines = ["  ".join(j(c, w) for j, c, w in zip(just, row, widths)).rstrip() for row in cells]
        return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])

    def markdown(self) -> str:
        """A Markdown table."""
        rules = ["---:" if c.startswith(">") else "---" for c in self.columns]
        return "\n".join("| " + " | ".join(row) + " |" for row in [self.names, rules, *self.rows])

    def show(self, stream: TextIO | None = None) -> None:
        """Prints it: by rich where that is installed and the stream is a terminal, as plain text elsewhere."""
        stream = stream or sys.stdout
        if stream.isatty() and importlib.util.find_spec("rich"):
            _show_rich(self, stream)
        else:
            stream.write(self.text() + "\n")


def _show_rich(table: Table, stream: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    # Columns two spaces apart, as in the plain text: 80 columns are soon full.
    shown = RichTable(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column, name in zip(table.columns, table.names):
        shown.add_column(name, justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    Console(file=stream, highlight=False).print(shown)


# --- evaluations ---


class Row(NamedTuple):
    """One line of a comparison.

    Attributes:
      name: of the model or method.
      nbytes: of all parameters.
      bits: per weight of the quantized leaves, scales included (see `bits_per_weight`).
      perplexity: of the text.
      kl, kl_stderr, top1: against the reference; None for the reference itself.
      seconds: that quantizing took; None where it is not known.
    """

    name: str
    nbytes: int
    bits: float
    perplexity: float
    kl: float | None = None
    kl_stderr: float | None = None
    top1: float | None = None
    seconds: float | None = None


def row(name: str, found: Evaluation, qparams: Any, seconds: float | None = None) -> Row:
    """The line of a quantized tree."""
    bits = bits_per_weight(qparams)
    return Row(name, found.bytes, bits, found.perplexity, found.kl, found.kl_stderr, found.top1_agreement, seconds)


def reference_row(name: str, found: Evaluation, params: Any) -> Row:
    """The line of the reference that `found` was compared with."""
    return Row(name, found.bytes_reference, bits_per_weight(params), found.perplexity_reference)


def evaluation_table(rows: Sequence[Row]) -> Table:
    """Rows side by side; the seconds only where some row has them."""
    timed = any(r.seconds is not None for r in rows)
    columns = ("model", ">MB", ">bits/weight", ">perplexity", ">KL", ">top-1", *([">seconds"] if timed else []))
    return Table(columns, [_cells(r, timed) for r in rows])


def _cells(r: Row, timed: bool) -> tuple[str, ...]:
    kl = "" if r.kl is None else f"{r.kl:.4f}" + ("" if r.kl_stderr is None else f" ± {r.kl_stderr:.4f}")
    top1 = "" if r.top1 is None else f"{r.top1:.1%}"
    seconds = "" if r.seconds is None else f"{r.seconds:.1f}"
    cells = (r.name, megabytes(r.nbytes), f"{r.bits:.2f}", f"{r.perplexity:.2f}", kl, top1)
    return (*cells, seconds) if timed else cells


def megabytes(nbytes: float) -> str:
    """In units of 10^6 bytes, with a decimal where that says something."""
    return f"{nbytes / 1e6:,.1f}" if nbytes >= 1e5 else f"{nbytes / 1e6:.3f}"


# --- bytes ---


class FormatBytes(NamedTuple):
    """What the leaves of one format hold.

    Attributes:
      name: of the format, or the dtype of float leaves.
      leaves, weights, nbytes: how many leaves, the numbers they stand for, the bytes they take.
    """

    name: str
    leaves: int
    weights: int
    nbytes: int


def bytes_by_format(tree: Any) -> list[FormatBytes]:
    """What each format of a tree holds, the largest first. Leaves are arrays, ShapeDtypeStructs or QTensors of them."""
    found: dict[str, FormatBytes] = {}
    for _, leaf in flatten_with_paths(tree)[0]:
        name = _format_name(leaf)
        old = found.get(name, FormatBytes(name, 0, 0, 0))
        found[name] = FormatBytes(name, old.leaves + 1, old.weights + leaf.size, old.nbytes + tree_nbytes(leaf))
    return sorted(found.values(), key=lambda f: -f.nbytes)


def bits_per_weight(tree: Any) -> float:
    """Of the quantized leaves, scales and zero points included; of all leaves where none is quantized."""
    leaves = [leaf for _, leaf in flatten_with_paths(tree)[0]]
    counted = [leaf for leaf in leaves if is_qtensor(held(leaf))] or leaves
    return 8 * sum(map(tree_nbytes, counted)) / max(sum(leaf.size for leaf in counted), 1)


def bytes_table(tree: Any) -> Table:
    """Bytes by format, and the sum."""
    found = bytes_by_format(tree)
    total = FormatBytes("total", *(sum(int(f[i]) for f in found) for i in (1, 2, 3)))
    lines = [
        (f.name, str(f.leaves), f"{f.weights:,}", megabytes(f.nbytes), f"{8 * f.nbytes / max(f.weights, 1):.2f}")
        for f in [*found, total]
    ]
    return Table(("format", ">leaves", ">weights", ">MB", ">bits/weight"), lines)


# --- sites ---


def sites_table(sites: Iterable[Site], tree: Any) -> Table:
    """The sites of a model whose parameters (or their shapes) are `tree`; equal layers in one line, numbers as "*".

    "n" counts them. "use" is what reads the leaf, and the axes summed over. "x" numbers the arrays that the leaves are
    multiplied with: lines with the same number read the same array, in every layer.
    """
    leaves = dict(flatten_with_paths(tree)[0])
    groups: dict[tuple[str, ...], list[Site]] = {}
    for s in sites:
        use = f"read: {s.by}" if s.kind == "read" else f"{s.kind} {','.join(map(str, s.contracted))}"
        shape, stored = "x".join(map(str, s.shape)), _format_name(leaves[s.path])
        groups.setdefault((layerless(s.path), shape, use, stored), []).append(s)
    inputs: dict[tuple[int, ...], int] = {}
    lines = []
    for (path, shape, use, stored), same in groups.items():
        x = "" if same[0].input < 0 else str(inputs.setdefault(tuple(s.input for s in same), len(inputs)))
        size = megabytes(sum(tree_nbytes(leaves[p]) for p in {s.path for s in same}))
        lines.append((path, str(len(same)), shape, use, x, stored, size))
    return Table(("path", ">n", ">shape", "use", ">x", "format", ">MB"), lines)


def _format_name(leaf: Any) -> str:
    inner = held(leaf)
    name = inner.scheme if is_qtensor(inner) else jnp.dtype(inner.dtype).name
    if is_qtensor(inner) and inner.side is not None:
        name += f", {inner.side.words}"
    return f"{name}, one per use" if is_per_use(leaf) else name


def layerless(path: str) -> str:
    """`layers/3/mlp/up/kernel` -> `layers/*/mlp/up/kernel`."""
    return re.sub(r"(?<![^/])\d+(?![^/])", "*", path)
