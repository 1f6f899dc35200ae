"""A tiny Hugging Face folder with a tokenizer of bytes, a text, and the folder that the command line made of them."""

import pytest

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from jquant.cli import main  # noqa: E402
from tests.models.test_hf import write  # noqa: E402

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen: naïve ☃ 雪. " * 30


def write_tokenizer(folder):
    """One token a byte, and <eos>."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, "<eos>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    backend.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with model/, text.txt and, made by the command line, saved/."""
    root = tmp_path_factory.mktemp("cli")
    (root / "model").mkdir()
    write(root / "model", config=dict(vocab_size=257, eos_token_id=256, max_position_embeddings=64))
    write_tokenizer(root / "model")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    command = ["quantize", str(root / "model"), "--recipe", "int4-g16", "--method", "rtn", "--out", str(root / "saved")]
    assert main(command) == 0
    return root
