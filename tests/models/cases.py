"""Tiny configs, one for each thing the decoder can do, and parameters in which nothing is trivially one or zero."""

import dataclasses

import numpy as np

from jquant.models import Config, Rope, param_shapes
from jquant.models.decoder import nest

BASE = Config(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,  # 4 * 8 is not hidden_size
    rms_norm_eps=1e-5,
    max_position_embeddings=32,
)


def _rope(**fields):
    return dataclasses.replace(BASE, rope=Rope(**fields))


CONFIGS = {
    "llama": BASE,
    "llama-tied-all-biases": dataclasses.replace(BASE, tied=True, qkv_bias=True, o_bias=True, mlp_bias=True),
    "llama-one-kv-head": dataclasses.replace(BASE, num_kv_heads=1),
    "llama-multi-head": dataclasses.replace(BASE, num_kv_heads=4),
    "mistral": dataclasses.replace(BASE, family="mistral", sliding_window=5, sliding_layers=(0, 1)),
    "qwen2": dataclasses.replace(BASE, family="qwen2", qkv_bias=True, tied=True, sliding_window=4, sliding_layers=(1,)),
    "qwen3": dataclasses.replace(BASE, family="qwen3", qk_norm=True, rope=Rope(theta=1e6)),
    "linear": _rope(type="linear", factor=4.0),
    "dynamic": _rope(type="dynamic", factor=4.0),
    "llama3": _rope(type="llama3", theta=100.0, factor=8.0, original_max_position_embeddings=16),
    "yarn": _rope(type="yarn", theta=100.0, factor=4.0, original_max_position_embeddings=64),
    "yarn-mscale": _rope(
        type="yarn",
        theta=100.0,
        factor=4.0,
        original_max_position_embeddings=64,
        mscale=1.5,
        mscale_all_dim=0.7,
        beta_fast=16.0,
        beta_slow=2.0,
        truncate=False,
    ),
    "yarn-attention": _rope(type="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=0.8),
    "freq-factors": _rope(type="freq_factors", freq_factors=(1.0, 1.5, 4.0, 8.0)),
}


def make_params(config: Config, seed: int = 0):
    """Random parameters; norm scales and biases too, so that leaving one out changes the result."""
    rng = np.random.default_rng(seed)
    return nest({path: _leaf(rng, path, shape) for path, shape in param_shapes(config).items()})


def _leaf(rng, path, shape):
    around = 1.0 if path.endswith("scale") else 0.0
    return (around + rng.normal(size=shape) * (0.3 if len(shape) == 1 else shape[0] ** -0.5)).astype(np.float32)


def make_tokens(config: Config, length: int, batch: int = 2, seed: int = 1):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length)).astype(np.int32)
