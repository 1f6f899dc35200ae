"""What a kernel's PTX says: instruction counts, and the bytes that its loads ask for."""

import re
from collections import Counter
from typing import NamedTuple

# What is counted, by the start of the instruction.
COUNTED = (
    "wgmma.mma_async", "mma.sync", "cp.async.cg", "cp.async.ca", "cp.async.bulk", "ld.global", "st.global", "ld.shared",
    "st.shared", "ldmatrix", "stmatrix", "cvt", "prmt", "lop3", "and", "or", "xor", "shr", "shl", "bfe", "sub", "add",
    "mul", "mad", "fma", "selp", "setp", "bar.sync",
)  # fmt: skip


class Load(NamedTuple):
    """One instruction that reads global memory.

    Attributes:
      kind: "ld.global", "cp.async" or "cp.async.bulk".
      bytes: that one thread reads by it.
      parameter: the number of the kernel's argument it reads, or None where the PTX does not tell.
      loop: the number of the loop it lies in; None outside of loops.
    """

    kind: str
    bytes: int
    parameter: int | None
    loop: int | None

    @property
    def in_loop(self) -> bool:
        return self.loop is not None


class Ptx(NamedTuple):
    """One kernel of a PTX file.

    Attributes:
      name: of the kernel.
      counts: instructions by `COUNTED`, and under "all" all of them.
      loads: the reads of global memory.
      threads: of a block, where the PTX says (`.reqntid` or `.maxntid`).
      text: the PTX itself.
    """

    name: str
    counts: dict[str, int]
    loads: tuple[Load, ...]
    threads: int | None
    text: str


def kernels(text: str) -> list[Ptx]:
    """Every kernel (`.entry`) of a PTX file."""
    starts = [m.start() for m in re.finditer(r"^\s*(?:\.visible\s+)?(?:\.weak\s+)?\.entry\s", text, re.M)]
    return [_kernel(text[a:b]) for a, b in zip(starts, [*starts[1:], len(text)])]


def _kernel(text: str) -> Ptx:
    name = re.search(r"\.entry\s+([\w$.]+)", text)
    body = text[text.index("{") + 1 :]
    lines = [line.strip() for line in re.split(r"[;\n]", body)]
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", text)
    assert name is not None
    return Ptx(name[1], _counts(lines), _loads(lines), int(threads[1]) if threads else None, text)


def _opcode(line: str) -> str:
    """The instruction of a line without its predicate; empty for labels, directives and comments."""
    line = re.sub(r"^[{}\s]*(@!?%?\w+\s+)?", "", line)
    m = re.match(r"([a-z][a-z0-9]*(?:[.:]+\w+)*)\b", line)
    return m[1] if m else ""


def _counts(lines: list[str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for op in filter(None, map(_opcode, lines)):
        counts["all"] += 1
        for start in COUNTED:
            if op == start or op.startswith(start + "."):
                counts[start] += 1
    return dict(counts)


def _loops(lines: list[str]) -> list[tuple[int, int]]:
    """Spans of lines that a branch back closes."""
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\$?[\w$]+):", line))}
    spans = []
    for i, line in enumerate(lines):
        if m := re.search(r"\bbra(?:\.uni)?\s+(\$?[\w$]+)", line):
            if m[1] in labels and labels[m[1]] < i:
                spans.append((labels[m[1]], i))
    return spans


def _loads(lines: list[str]) -> tuple[Load, ...]:
    loops, sources, out = _loops(lines), _sources(lines), []
    for i, line in enumerate(lines):
        size = _load_size(line)
        if size is None:
            continue
        address = re.findall(r"\[\s*(%\w+)", line)
        # The copy's destination comes first.
        register = address[-1] if address else ""
        loop = next((n for n, (a, b) in enumerate(loops) if a <= i <= b), None)
        out.append(Load(size[0], size[1], sources.get(register), loop))
    return tuple(out)


def _load_size(line: str) -> tuple[str, int] | None:
    op = _opcode(line)
    if op.startswith("cp.async.bulk"):
        return "cp.async.bulk", 0
    if op.startswith(("cp.async.ca", "cp.async.cg")):
        sizes = re.findall(r"\]\s*,\s*(0x[0-9a-f]+|\d+)", line)
        return "cp.async", int(sizes[-1], 0) if sizes else 0
    if op.startswith("ld.global"):
        width = re.search(r"\.[bsuf](\d+)", op)
        vector = re.search(r"\.v(\d)", op)
        return "ld.global", int(width[1]) // 8 * (int(vector[1]) if vector else 1) if width else 0
    return None


def _sources(lines: list[str]) -> dict[str, int]:
    """Which argument each 64-bit register's address comes from, followed through moves, casts and sums."""
    from_: dict[str, int] = {}
    for line in lines:
        if m := re.match(r"ld\.param(?:::entry)?\.[bu]64\s+(%\w+),\s*\[\w+?_param_(\d+)\]", line):
            from_[m[1]] = int(m[2])
        elif m := re.match(r"ld\.param(?:::entry)?\.v2\.[bu]64\s+\{(%\w+),\s*(%\w+)\},\s*\[\w+?_param_(\d+)\]", line):
            from_[m[1]], from_[m[2]] = int(m[3]), int(m[3]) + 1
        elif m := re.match(r"(?:cvta\.to\.global\.u64|cvta\.global\.u64|mov\.[bu]64)\s+(%\w+),\s*(%\w+)", line):
            if m[2] in from_:
                from_[m[1]] = from_[m[2]]
        elif m := re.match(r"(?:add|sub|mad|selp|min|max)[\w.]*\s+(%\w+),\s*(.+)", line):
            found = {from_[r] for r in re.findall(r"%\w+", m[2]) if r in from_}
            if len(found) == 1:
                from_[m[1]] = found.pop()
    return from_
