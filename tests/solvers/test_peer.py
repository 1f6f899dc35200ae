"""Against llm-compressor's `quantize_weight` on the same weight, Gram matrix and kind of scales."""

import numpy as np
import pytest

from jquant.core.formats import Format, decode
from tests.problems import correlated, objective
from tests.solvers.reference import run

pytestmark = pytest.mark.peers


GROUP = 64


def peers_objective(w, h, symmetric: bool) -> float:
    """Of its `quantize_weight`, with the scales that its observer would choose."""
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("llmcompressor.modifiers.gptq.gptq_quantize")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    args = quantization.QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=symmetric, actorder="static"
    )
    weight, hessian = torch.tensor(w, dtype=torch.float32), torch.tensor(h, dtype=torch.float32)
    groups = weight.reshape(len(w), -1, GROUP)
    scale, zero = utils.calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    q = peer.quantize_weight(weight[None].clone(), hessian[None].clone(), scale[None], zero[None], None, args)[0]
    return objective(w, q[0].numpy(), h).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_objective_is_no_worse(symmetric):
    """Like for like: static groups, columns by descending diag(H), float32 scales."""
    w, h = correlated(0, 64, 256)
    fmt = Format("int4", GROUP, symmetric)
    out = run(w, h, fmt, act_order=True)
    ours = objective(w, np.asarray(decode(out.codes, out.params, fmt)), h).sum()
    # The same algorithm: what differs is float32 noise at ties, a column here and there, either way.
    assert ours <= 1.005 * peers_objective(w, h, symmetric)
