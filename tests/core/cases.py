"""What the tests of `core` share: every format, and a quantizer that is nothing but round-to-nearest."""

import itertools
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core.formats import ELEMENTS, PRESETS, Format, compute_params
from jquant.core.qtensor import QTensor, encode_array, to_rows

INTS = [name for name, e in ELEMENTS.items() if e.kind == "int"]
BLOCKS: list[int | str] = ["channel", "tensor", 1, 5, 64]
SCALES = ["float32", "bfloat16", "float16"]

EVERY_FORMAT = [
    Format(element, block, symmetric, scale)
    for element, block, symmetric, scale in itertools.product(ELEMENTS, BLOCKS, (True, False), SCALES)
    if symmetric or ELEMENTS[element].kind == "int"
]
# Every element, zero point and kind of block, for tests that compute (float16 scales have tests of their own).
COMPUTED = [f for f in EVERY_FORMAT if f.block in ("channel", "tensor", 5) and f.scale_dtype != "float16"]
# One for each element and each kind of zero point: what depends on codes only.
CODINGS = [Format(name) for name in ELEMENTS] + [Format(name, symmetric=False) for name in INTS]
# A few that differ in everything: what costs a compilation a case.
FEW_FORMATS = [
    Format("int8"),
    Format("int4", 5, scale_dtype="bfloat16"),
    Format("int3", 5, symmetric=False, scale_dtype="bfloat16"),
    Format("int2", "tensor", symmetric=False),
    Format("nf4", 64, scale_dtype="bfloat16"),
    Format("fp8_e4m3", "tensor"),
]
PRESET_FORMATS = list(PRESETS.values())


def normal(shape: Sequence[int], seed: int = 0, dtype: str = "float32") -> jax.Array:
    """Normal numbers, the same on every JAX."""
    rng = np.random.default_rng([seed, zlib.crc32(repr(tuple(shape)).encode())])
    return jnp.asarray(rng.standard_normal(tuple(shape)), jnp.float32).astype(dtype)


def rtn(w: jax.Array, fmt: Format, contracted: Sequence[int]) -> QTensor:
    """Round to nearest, nothing else."""
    return encode_array(w, compute_params(to_rows(w, contracted), fmt), fmt, contracted)


def any_bits(fmt: Format, shape: Sequence[int], contracted: Sequence[int], dtype: str = "float32") -> QTensor:
    """A QTensor whose arrays hold any bits at all. Nothing is compiled."""
    q = jax.eval_shape(lambda: rtn(jnp.zeros(shape, dtype), fmt, contracted))
    rng = np.random.default_rng(0)

    def fill(a):
        raw = rng.integers(0, 256, (*a.shape, a.dtype.itemsize), dtype=np.uint8)
        return jnp.asarray(raw.view(a.dtype)[..., 0])

    return jax.tree.map(fill, q)


def same_bits(a: object, b: object) -> bool:
    """Whether two arrays have the same shape, dtype and bits (NaN equals itself, 0 is not -0)."""
    x, y = np.asarray(a), np.asarray(b)
    return x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes()


def same_tree(a: object, b: object) -> bool:
    """Whether two trees have the same structure (with all static data) and the same bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(same_bits(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
