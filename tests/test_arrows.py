"""The arrows between the rooms: who may import whom. Read from the source, so nothing is imported here.

    core, progress <- solvers, ops <- trace, fold <- calibrate, quantize (with walk, resume), sensitivity, kv_cache
         <- models, checkpoint, evaluate, report <- cli

A room may import rooms of earlier groups and of its own group, as long as the rooms form no cycle.
"""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

GROUPS = (
    {"core", "progress"},
    {"solvers", "ops"},
    {"trace", "fold"},
    {"calibrate", "methods", "ranges", "quantize", "walk", "resume", "sensitivity", "kv_cache"},
    {"models", "checkpoint", "evaluate", "report"},
    {"cli"},
)
RANK = {room: rank for rank, group in enumerate(GROUPS) for room in group}
# Packages that only some rooms may import, whatever their rank.
RESERVED = {
    "flax": {"models", "checkpoint"},
    "orbax": {"models", "checkpoint"},
    "pallas_kernels": {"ops"},
    "jax._src": {"trace.compat"},
}
FORBIDDEN = {("solvers", "ops"), ("ops", "solvers")}
SURFACE = "jquant"  # jquant/__init__.py: imports every room, and only the command line imports it


class Import(NamedTuple):
    importer: str  # dotted name of the importing module
    target: str  # dotted name of what is imported, as far as the source tells
    line: int


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every import in `source`, wherever it stands; a lazy import is an arrow too, one for types only is not."""
    package = module.split(".") if is_package else module.split(".")[:-1]

    def visit(node: ast.AST) -> Iterator[Import]:
        match node:
            case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                for child in node.orelse:
                    yield from visit(child)
                return
            case ast.Import():
                for alias in node.names:
                    yield Import(module, alias.name, node.lineno)
            case ast.ImportFrom():
                base = package[: len(package) - node.level + 1] if node.level else []
                base = [*base, *(node.module.split(".") if node.module else [])]
                for alias in node.names:
                    yield Import(module, ".".join([*base, alias.name]), node.lineno)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name("import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(module, name, node.lineno)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(source))


def room(module: str) -> str:
    """The room of a dotted name in jquant: `jquant.core.packing` -> `core`, `jquant.Format` -> `jquant`."""
    parts = module.split(".")
    if len(parts) == 1:
        return SURFACE
    return "cli" if parts[1] == "__main__" else parts[1]


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def violations(found: list[Import]) -> list[str]:
    """One line for each import that points the wrong way, and one for a cycle of rooms."""
    wrong = []
    graph: dict[str, set[str]] = {}
    for one in found:
        importer, target, line = one

        def say(rule: str, importer: str = importer, target: str = target, line: int = line) -> None:
            wrong.append(f"{importer}:{line} imports {target}: {rule}")

        if within(importer, "pallas_kernels"):
            if within(target, "jquant"):
                say("pallas_kernels knows nothing of jquant")
            continue
        here = room(importer)
        for package, allowed in RESERVED.items():
            inside = importer.removeprefix("jquant.")
            if within(target, package) and not any(within(inside, place) for place in allowed):
                say(f"only {', '.join(sorted(allowed))} may import {package}")
        if not within(target, "jquant") or here == SURFACE:
            continue
        there = room(target)
        if there == here:
            continue
        if there not in RANK:
            if here != "cli":
                say("import it from its room, not from the surface")
        elif here not in RANK:
            say(f"{here} is no room: add it to GROUPS and to CONTRIBUTING.md")
        elif RANK[there] > RANK[here] or (here, there) in FORBIDDEN:
            say(f"{here} may not import {there}")
        else:
            graph.setdefault(here, set()).add(there)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        wrong.append("a cycle of rooms: " + " <- ".join(error.args[1]))
    return wrong


def module_name(file: Path, root: Path) -> tuple[str, bool]:
    parts = file.relative_to(root).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    return ".".join(parts[:-1] if is_package else parts), is_package


def sources(root: Path) -> list[Path]:
    return sorted(file for package in ("jquant", "pallas_kernels") for file in (root / package).rglob("*.py"))


def test_the_source_keeps_the_arrows():
    found = []
    for file in sources(ROOT):
        name, is_package = module_name(file, ROOT)
        found += imports(file.read_text(encoding="utf-8"), name, is_package)
    assert violations(found) == []


def test_every_file_is_in_a_room():
    rooms = {room(module_name(file, ROOT)[0]) for file in sources(ROOT) if file.is_relative_to(ROOT / "jquant")}
    assert rooms - {SURFACE} <= RANK.keys(), "add it to GROUPS and to CONTRIBUTING.md"


@pytest.mark.parametrize(
    "module, source, rule",
    [
        ("jquant.core.formats", "from jquant.solvers import rtn", "core may not import solvers"),
        ("jquant.core.formats", "import jquant.trace.sites", "core may not import trace"),
        ("jquant.core.formats", "from .. import trace", "core may not import trace"),
        ("jquant.core.formats", "from ..quantize import chain", "core may not import quantize"),
        ("jquant.core.formats", "from jquant import Site", "not from the surface"),
        ("jquant.core.formats", "import jquant as jq", "not from the surface"),
        ("jquant.solvers.gptq", "from jquant.trace import find_sites", "solvers may not import trace"),
        ("jquant.solvers.gptq", "from jquant.ops import dot", "solvers may not import ops"),
        ("jquant.solvers.gptq", "import flax.linen as nn", "may import flax"),
        ("jquant.quantize", "from flax import nnx", "may import flax"),
        ("jquant.quantize", "import orbax.checkpoint as ocp", "may import orbax"),
        ("jquant.quantize", "import importlib\nimportlib.import_module('orbax.checkpoint')", "may import orbax"),
        ("jquant.quantize", "from pallas_kernels.dot import reference", "may import pallas_kernels"),
        ("jquant.quantize", "def late():\n    from jquant.cli import main", "quantize may not import cli"),
        ("jquant.trace.sites", "from jax._src import core", "may import jax._src"),
        ("jquant.trace.sites", "if TYPE_CHECKING:\n  pass\nelse:\n  import jquant.cli", "may not import cli"),
        ("jquant.misc", "from jquant.core import formats", "misc is no room"),
        ("pallas_kernels.dot.reference", "from jquant.core import qtensor", "knows nothing of jquant"),
    ],
)
def test_a_wrong_import_is_seen(module, source, rule):
    [wrong] = violations(list(imports(source, module)))
    assert rule in wrong and wrong.startswith(module)


@pytest.mark.parametrize(
    "module, source",
    [
        ("jquant.core.formats", "import jax.numpy as jnp\nfrom .packing import pack"),
        ("jquant.solvers.gptq", "from jquant.core.formats import Format\nfrom jquant.solvers import rtn"),
        ("jquant.ops.dot", "from pallas_kernels.dot import reference"),
        ("jquant.trace.compat", "from jax._src import core"),
        ("jquant.trace.sites", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jquant.cli import main"),
        ("jquant.fold.scales", "from jquant.trace import sites"),
        ("jquant.quantize", "from jquant.calibrate import calibrate\nfrom jquant import solvers, fold"),
        ("jquant.checkpoint.orbax", "import orbax.checkpoint as ocp\nimport flax"),
        ("jquant.cli", "import jquant as jq\nfrom jquant.models import load"),
        ("jquant.__main__", "from jquant.cli import main"),
        ("pallas_kernels.dot.triton", "from .reference import dot\nfrom jax._src import config"),
    ],
)
def test_a_right_import_passes(module, source):
    assert violations(list(imports(source, module))) == []


def test_the_surface_may_import_every_room():
    source = "\n".join(f"from jquant.{name} import *" for name in RANK)
    assert violations(list(imports(source, "jquant", is_package=True))) == []


def test_a_cycle_of_rooms_is_seen():
    there = imports("from jquant.fold import scales", "jquant.trace.execute")
    back = imports("from jquant.trace import sites", "jquant.fold.scales")
    [wrong] = violations([*there, *back])
    assert "cycle" in wrong and "fold" in wrong and "trace" in wrong


def test_relative_imports_resolve_like_pythons():
    def targets(source, module, is_package):
        return [one.target for one in imports(source, module, is_package)]

    assert targets("from . import a", "jquant.core", True) == ["jquant.core.a"]
    assert targets("from .a import b", "jquant.core.c", False) == ["jquant.core.a.b"]
    assert targets("from ..ops.a import b", "jquant.core.c", False) == ["jquant.ops.a.b"]
