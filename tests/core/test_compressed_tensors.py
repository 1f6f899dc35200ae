"""Against compressed-tensors, which vLLM reads: the same scales, zero points and codes where the definitions coincide.

They differ in four places. Scales: they divide by the number of steps, jquant multiplies by its reciprocal (one ulp).
Codes: they divide by the scale, jquant multiplies by its reciprocal, so a quotient within two ulps of a tie may go to
the other of two values equally near. Zero points: they round x / scale + zero_point, jquant rounds x / scale and adds
the zero point, as GPTQ does, so exact ties go to another even number where the zero point is odd. Zero blocks: they get
the scale eps instead of 0.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.formats import BlockParams, Format, compute_params, decode_codes, encode
from tests.core.cases import INTS, normal

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def theirs():
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    def args(fmt: Format):
        kind = "float" if fmt.element.startswith("fp8") else "int"
        return QuantizationArgs(num_bits=fmt.bits, type=kind, symmetric=fmt.symmetric, strategy="channel")

    def params(rows: np.ndarray, fmt: Format):
        x = torch.from_numpy(np.array(rows))
        scale, zero = calculate_qparams(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), args(fmt))
        return scale.numpy(), zero.float().numpy()

    def codes(rows: np.ndarray, scale: np.ndarray, zero: np.ndarray, fmt: Format):
        return quantize(*[torch.from_numpy(np.array(a)) for a in (rows, scale, zero)], args(fmt)).float().numpy()

    return params, codes


FORMATS = [Format(e, symmetric=s) for e in INTS for s in (True, False)] + [Format("fp8_e4m3")]


def offset(fmt: Format) -> int:
    """Their asymmetric codes start at -2**(bits - 1), ours at 0."""
    return 0 if fmt.symmetric else 2 ** (fmt.bits - 1)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_scales_are_theirs_up_to_one_ulp_and_zero_points_are_theirs(theirs, fmt):
    rows = np.asarray(normal((64, 32), seed=7))
    scale, zero = theirs[0](rows, fmt)
    ours = compute_params(jnp.asarray(rows), fmt)
    assert (np.abs(np.asarray(ours.scale) - scale) <= np.spacing(scale)).all()
    if ours.zero_point is not None:
        np.testing.assert_array_equal(np.asarray(ours.zero_point, np.float32), zero + offset(fmt))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_are_theirs_bit_for_bit_where_the_quotient_is_exact(theirs, fmt):
    """Scales that are powers of two; ties included for symmetric formats, without them for asymmetric ones."""
    rows = np.asarray(normal((64, 32), seed=8))
    if fmt.symmetric:
        rows = np.round(rows * 16) / 16  # with ties
    scale = np.exp2(np.round(np.log2(np.abs(rows).max(-1, keepdims=True) / 2 ** (fmt.bits - 1)))).astype(np.float32)
    zero = (
        np.float32(0) * scale if fmt.symmetric else np.broadcast_to(np.arange(64)[:, None] % 2**fmt.bits, scale.shape)
    )
    params = BlockParams(jnp.asarray(scale), None if fmt.symmetric else jnp.asarray(zero, jnp.uint8))
    ours = np.asarray(decode_codes(encode(jnp.asarray(rows), params, fmt), fmt))
    np.testing.assert_array_equal(ours, theirs[1](rows, scale, np.float32(zero) - offset(fmt), fmt) + offset(fmt))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_are_theirs_but_for_quotients_at_a_tie(theirs, fmt):
    rows = np.asarray(normal((64, 32), seed=9))
    scale, _ = theirs[0](rows, fmt)
    params = compute_params(jnp.asarray(rows), fmt)._replace(scale=jnp.asarray(scale))
    zero = 0 * scale if params.zero_point is None else np.asarray(params.zero_point, np.float32) - offset(fmt)
    ours = np.asarray(decode_codes(encode(jnp.asarray(rows), params, fmt), fmt)) - offset(fmt)
    other = theirs[1](rows, scale, zero, fmt)
    quotient = rows.astype(np.float64) / scale
    middle = (ours.astype(np.float64) + other) / 2 - zero
    # Two roundings in our quotient, two in theirs with its zero point.
    at_a_tie = np.abs(quotient - middle) <= 2 * np.spacing(np.float32(np.abs(quotient) + np.abs(zero)))
    assert ((ours == other) | at_a_tie).all()
    assert (ours != other).mean() < 0.01
