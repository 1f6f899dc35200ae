"""The tilings that the model chooses, for every shape of the list: valid, and with work for all cores in decoding."""

import itertools
import math

import pytest

from pallas_kernels import tuned
from pallas_kernels.decode_attention import tilings as decode_attention
from pallas_kernels.gpus import GPUS
from pallas_kernels.low_precision_matmul import tilings as low_precision
from pallas_kernels.quantized_matmul import tilings, upcast
from pallas_kernels.quantized_matmul.tilings import MIN_LANE_K, Problem
from pallas_kernels.shapes import ROWS, SHAPES


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize(
    "bits, group, word_bytes", [(4, 128, 2), (4, 32, 2), (4, None, 2), (8, None, 1), (3, 64, 1), (4, 16, 1)]
)
def test_blocks_fit_the_kernel_and_the_gpu(device, bits, group, word_bytes):
    g, lanes = GPUS[device], upcast.lanes(bits, word_bytes)
    for s in {(s.n, s.k, s.experts) for s in SHAPES}:
        for m in ROWS:
            p = Problem(s[2], m, s[0], s[1], bits, lanes, group or s[1])
            t = tilings.choose(p, device, g)
            assert t.block_k % (MIN_LANE_K * lanes) == 0 and t.block_k % lanes == 0
            assert p.group % t.block_k == 0 or t.block_k % p.group == 0 or p.group == p.k
            assert tilings.shared_bytes(p, t) * t.stages <= g.shared_per_block
            assert t.block_m >= 16 and (t.block_m >= m or m > 64)
            assert t.block_m * t.block_n <= 64 * 32 * t.warps, "two accumulators would not fit in registers"


def test_decoding_gives_all_cores_work():
    """Of the layers whose weight is worth it (2 MB of codes and more)."""
    g = GPUS["h100"]
    for s in SHAPES:
        p = Problem(1, 1, s.n, s.k, 4, 4, 128)
        if tilings.weight_bytes(p) >= 2 << 20:
            assert tilings.programs(p, tilings.choose(p, "h100", g)) >= g.cores / 2, s


def test_a_tuned_tiling_is_taken_and_adapted(monkeypatch):
    """The nearest row; for other sizes as many programs. Other devices have rows of their own, or the model."""
    t = tilings.Tiling(16, 64, 256, 4, 4, 3)
    rows = [
        {"bits": 4, "group": 128, "rows": 16, "n": 8192, "k": 8192, "tiling": list(t)},
        {"bits": 4, "group": 0, "rows": 16, "n": 8192, "k": 8192, "tiling": [16, 32, 256, 1, 2, 3]},
        {"bits": 4, "group": 128, "rows": 64, "n": 8192, "k": 8192, "tiling": [64, 128, 128, 2, 8, 3]},
    ]
    monkeypatch.setattr(tuned, "table", lambda: {"h100": {"quantized_matmul": rows}})
    choose = lambda device, *sizes: tilings.choose(Problem(*sizes), device, GPUS[device])
    assert choose("h100", 1, 16, 8192, 8192, 4, 4, 128) == t
    assert choose("h200", 1, 12, 8192, 8192, 4, 4, 128) == t
    assert choose("h100", 1, 16, 4096, 14336, 4, 4, 128) == t._replace(split_k=8)
    assert choose("h100", 1, 16, 8192, 8192, 4, 4, 8192).block_n == 32
    assert choose("h100", 1, 50, 8192, 8192, 4, 4, 128).block_n == 128
    assert choose("h100", 1, 16, 8192, 8192, 4, 2, 32).block_k == 256
    assert choose("a100", 1, 16, 8192, 8192, 4, 4, 128) != t


def test_a_tuned_tiling_of_attention_is_taken_and_adapted(monkeypatch):
    row = {"bytes": 272, "dim": 128, "doubled": 0, "sequences": 128, "length": 32768, "tiling": [64, 3, 4, 4]}
    monkeypatch.setattr(tuned, "table", lambda: {"h100": {"decode_attention": [row]}})
    problem = decode_attention.Problem(16, 8, 4, 32768, 128, 260, 1 << 20)
    choose = lambda p: decode_attention.choose(p, "h100", GPUS["h100"])
    assert choose(problem) == (64, 3, 4, 4)
    assert choose(problem._replace(batch=1)) == (64, 48, 4, 4)
    assert choose(problem._replace(largest=16)) == (16, 3, 1, 4)
    assert choose(problem._replace(length=20)).block == 32


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("group", [None, 128, 32])
def test_blocks_of_8_bit_codes_fit(device, group):
    g = GPUS[device]
    for s in SHAPES:
        for m in ROWS:
            t = low_precision.choose(m, s.n, s.k, group, g)
            assert (t.block_m + t.block_n) * t.block_k * t.stages <= g.shared_per_block
            assert group is None or group % t.block_k == 0
            assert math.ceil(s.k / t.block_k) >= t.split_k


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("token_bytes", [37, 72, 260, 512])
def test_attention_over_a_cache_fits_and_gives_cores_work(device, token_bytes):
    """Any batch, kv heads and length; where there is enough to read, a program for every other core at least."""
    g = GPUS[device]
    for dim, sequences, length in itertools.product((64, 128, 256), (1, 8, 128), (100, 4096, 131072)):
        doubled = token_bytes == 512
        for largest in (16, 64, 1 << 20):
            p = decode_attention.Problem(sequences, 1, 4, length, dim, token_bytes * dim / 128, largest, doubled)
            t = decode_attention.choose(p, device, g)
            assert 16 <= t.block <= largest and t.block & (t.block - 1) == 0
            assert decode_attention.shared_bytes(p, t) <= g.shared_per_block
            assert t.splits <= max(1, math.ceil(length / t.block))
            if length > 100 and sequences * length >= 131072:
                assert decode_attention.programs(p, t) >= g.cores / 2
                # Programs run in whole waves, or in so many that the last one counts little.
                waves = decode_attention.programs(p, t) / (g.cores * decode_attention.resident(p, t, g))
                assert waves < 1.01 or waves / math.ceil(waves) > 0.7
