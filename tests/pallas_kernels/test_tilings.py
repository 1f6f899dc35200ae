"""The tilings that the model chooses, for every shape of the list: valid, and with work for all cores in decoding."""

import itertools
import math

import pytest

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


def test_a_tuned_tiling_is_taken(monkeypatch):
    p, t = Problem(1, 5, 4096, 4096, 4, 4, 128), tilings.Tiling(16, 128, 256, 2)
    monkeypatch.setitem(tilings.TUNED, ("h100", 4, 128, 8, 4096, 4096), t)
    assert tilings.choose(p, "h100", GPUS["h100"]) == t
    assert tilings.choose(p, "a100", GPUS["a100"]) != t


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
