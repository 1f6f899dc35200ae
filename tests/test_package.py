"""What is installed: the wheel, the lazy extras, the typing marker."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("jquant", "pallas_kernels")

needs_surface = pytest.mark.skipif(not (ROOT / "jquant/__init__.py").exists(), reason="no jquant/__init__.py yet")


def run(*command, **kwargs) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_surface
def test_importing_jquant_loads_no_optional_dependency():
    # Flax itself loads rich, so what the core dependencies load does not count.
    program = """
import sys, jax, optax, flax, flax.linen, flax.nnx, orbax.checkpoint
optional = {"gguf", "safetensors", "tokenizers", "rich", "matplotlib",
            "torch", "transformers", "compressed_tensors", "qwix", "hypothesis", "pytest"}
loaded = lambda: {name.partition(".")[0] for name in sys.modules} & optional
before = loaded()
from jquant import *  # every name: they are imported when they are used
print(*sorted(loaded() - before))
"""
    assert run(sys.executable, "-c", program, cwd=ROOT).split() == []


@needs_surface
def test_importing_jquant_does_not_touch_a_device():
    # A backend started by an import could no longer be configured by the user.
    program = "from jquant import *; from jax._src import xla_bridge as b; print(b.backends_are_initialized())"
    assert run(sys.executable, "-c", program, cwd=ROOT).strip() == "False"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, ROOT)
    [file] = folder.glob("*.whl")
    return file


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_nothing_else(wheel):
    kinds = {".py", ".typed"}
    files = [file for name in PACKAGES for file in (ROOT / name).rglob("*")]
    expected = {file.relative_to(ROOT).as_posix() for file in files if file.suffix in kinds}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {f"{name}/py.typed" for name in PACKAGES} <= expected
    assert {name for name in held if Path(name).suffix in kinds} == expected
    assert {name.partition("/")[0] for name in held} == set(PACKAGES)


@pytest.mark.slow
@needs_surface
def test_the_wheel_imports_from_outside_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    program = f"""
import importlib, pkgutil, jquant, pallas_kernels
modules = [m.name for p in (jquant, pallas_kernels) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
for name in modules:
    if not name.endswith("__main__"):
        module = importlib.import_module(name)
        assert module.__file__.startswith({str(target)!r}), module.__file__
print(len(modules))
"""
    environment = {**os.environ, "PYTHONPATH": str(target), "JAX_PLATFORMS": "cpu"}
    assert int(run(sys.executable, "-c", program, cwd=tmp_path, env=environment)) > 0


