"""The matmuls of real models: one list for the tests and the benchmarks.

From the models' published configurations. `n` is the output, `k` the contracted axis; a fused gate and up are two.
"""

from typing import NamedTuple


class Linear(NamedTuple):
    """One linear layer: `[m, k] x [n, k]`, in `experts` copies where a router chooses among them."""

    model: str
    layer: str
    n: int
    k: int
    experts: int = 1


def _attention(model: str, width: int, heads: int, kv_heads: int, head: int) -> list[Linear]:
    return [
        Linear(model, "q", heads * head, width),
        Linear(model, "k, v", kv_heads * head, width),
        Linear(model, "o", width, heads * head),
    ]


def _mlp(model: str, width: int, hidden: int, experts: int = 1) -> list[Linear]:
    return [Linear(model, "gate, up", hidden, width, experts), Linear(model, "down", width, hidden, experts)]


def _decoder(
    model: str, width: int, heads: int, kv_heads: int, head: int, hidden: int, vocab: int, experts: int = 1
) -> list[Linear]:
    attention = _attention(model, width, heads, kv_heads, head)
    return [*attention, *_mlp(model, width, hidden, experts), Linear(model, "head", vocab, width)]


SHAPES: tuple[Linear, ...] = (
    *_decoder("SmolLM2-135M", 576, 9, 3, 64, 1536, 49152),
    *_decoder("SmolLM2-1.7B", 2048, 32, 32, 64, 8192, 49152),
    *_decoder("Llama-3.2-1B", 2048, 32, 8, 64, 8192, 128256),
    *_decoder("Llama-3.1-8B", 4096, 32, 8, 128, 14336, 128256),
    *_decoder("Llama-3.1-70B", 8192, 64, 8, 128, 28672, 128256),
    *_decoder("Qwen3-8B", 4096, 32, 8, 128, 12288, 151936),
    *_decoder("Qwen3-32B", 5120, 64, 8, 128, 25600, 151936),
    *_decoder("Qwen3-30B-A3B", 2048, 32, 4, 128, 768, 151936, 128),
    *_decoder("Mixtral-8x7B", 4096, 32, 8, 128, 14336, 32000, 8),
)

ROWS = (1, 4, 16, 64, 512, 4096)  # of activations: decoding one and several sequences, and prefill


def of_model(model: str) -> tuple[Linear, ...]:
    """The layers of one model.

    Raises:
      ValueError: it is not in the list.
    """
    found = tuple(s for s in SHAPES if s.model == model)
    if not found:
        raise ValueError(f"{model!r} is not among {', '.join(dict.fromkeys(s.model for s in SHAPES))}")
    return found
