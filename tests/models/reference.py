"""The decoder once more, in numpy and float64, slowly and in other words: loops over tokens and heads, complex rope.

Written from the papers (RMSNorm, RoPE, GQA, SwiGLU, YaRN) and the Llama 3.1 release, not from `jquant.models`.
"""

import math

import numpy as np


def forward(config, params, tokens):
    """int [batch, length] -> float64 logits [batch, length, vocab]."""
    return np.stack([_sequence(config, _float64(params), row) for row in np.asarray(tokens)])


def _float64(tree):
    return {k: _float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}


def _sequence(c, p, tokens):
    x = p["embed"]["embedding"][tokens]
    for i in range(c.num_layers):
        layer = p["layers"][str(i)]
        window = c.sliding_window if i in c.sliding_layers else len(tokens)
        x = x + _attention(c, layer["attention"], _rms(x, layer["attention_norm"], c), window)
        h = _rms(x, layer["mlp_norm"], c)
        gate = _linear(h, layer["mlp"]["gate"])
        x = x + _linear(gate / (1 + np.exp(-gate)) * _linear(h, layer["mlp"]["up"]), layer["mlp"]["down"])
    head = p["embed"]["embedding"].T if c.tied else p["lm_head"]["kernel"]
    return _rms(x, p["norm"], c) @ head


def _rms(x, p, c):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * p["scale"]


def _linear(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def _attention(c, p, x, window):
    length, d = len(x), c.head_dim
    q, k, v = (_linear(x, p[n]).reshape(length, -1, d) for n in "qkv")
    if c.qk_norm:
        q, k = _rms(q, p["q_norm"], c), _rms(k, p["k_norm"], c)
    turn, scale = rotations(c, length)
    rotated = [_rotate(a, turn, scale) for a in (q, k)]
    out = np.zeros((length, c.num_heads, d))
    for head in range(c.num_heads):
        shared = head * c.num_kv_heads // c.num_heads
        for t in range(length):
            seen = slice(max(0, t - window + 1), t + 1)
            scores = rotated[1][seen, shared] @ rotated[0][t, head] / math.sqrt(d)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights / weights.sum() @ v[seen, shared]
    return _linear(out.reshape(length, -1), p["o"])


def _rotate(x, turn, scale):
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * turn[:, None] * scale
    return np.concatenate([z.real, z.imag], -1)


def rotations(c, length):
    """exp(i * position * frequency), complex [length, head_dim / 2], and what YaRN scales it with."""
    rope, d = c.rope, c.head_dim
    theta = rope.theta
    if rope.type == "dynamic" and length > c.max_position_embeddings:
        theta *= (rope.factor * length / c.max_position_embeddings - rope.factor + 1) ** (d / (d - 2))
    frequencies = [_frequency(rope, theta ** (-2 * j / d), j, d) for j in range(d // 2)]
    return np.exp(1j * np.outer(np.arange(length), frequencies)), _yarn_scale(rope)


def _frequency(rope, f, j, d):
    if rope.type == "linear":
        return f / rope.factor
    if rope.type == "freq_factors":
        return f / rope.freq_factors[j]
    if rope.type == "llama3":
        wavelength, old = 2 * math.pi / f, rope.original_max_position_embeddings
        if wavelength < old / rope.high_freq_factor:
            return f
        if wavelength > old / rope.low_freq_factor:
            return f / rope.factor
        s = (old / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return (1 - s) * f / rope.factor + s * f
    if rope.type == "yarn":
        old = rope.original_max_position_embeddings
        low, high = (
            d * math.log(old / (2 * math.pi * beta)) / (2 * math.log(rope.theta))
            for beta in (rope.beta_fast, rope.beta_slow)
        )
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d - 1)
        ramp = min(max((j - low) / max(high - low, 0.001), 0), 1)
        return f * (1 - ramp) + f / rope.factor * ramp
    return f


def _yarn_scale(rope):
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale is not None:
        return (0.1 * rope.mscale * math.log(rope.factor) + 1) / (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1)
    return 0.1 * math.log(rope.factor) + 1
