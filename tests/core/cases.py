"""What the tests of `core` share: every format, and a quantizer that is nothing but round-to-nearest."""

import itertools
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core.formats import ELEMENTS, PRESETS, BlockParams, Format, compute_params
from jquant.core.qtensor import QTensor, encode_array, to_rows

INTS = [name for name, e in ELEMENTS.items() if e.kind == "int"]
BLOCKS: list[int | str] = ["channel", "tensor", 1, 5, 64]
SCALES = ["float32", "bfloat16", "float16"]
E8M0, E4M3 = "float8_e8m0fnu", "float8_e4m3fn"
# Tiles, scales that are no plain floats, a second level, zero points between codes.
SPECIAL = [
    Format("fp8_e4m3", (2, 5)),
    Format("int4", (4, 3), False),
    Format("fp4_e2m1", 5, scale_dtype=E8M0),
    Format("fp6_e3m2", 5, scale_dtype=E8M0, scale_rule="even"),
    Format("int8", 4, scale_dtype=E8M0, scale_rule="ceil"),
    Format("fp4_e2m1", 5, scale_dtype=E4M3, outer_block="tensor", four_over_six=True),
    Format("int4", 5, False, scale_dtype=E4M3, outer_block="channel"),
    Format("nf4", 5, scale_dtype="uint8", outer_block=8),
    Format("int3", (2, 3), False, scale_dtype="uint8", outer_block=2),
    Format("ternary", "tensor"),
    Format("int4", 5, False, "bfloat16", zero_dtype="bfloat16"),
]

EVERY_FORMAT = [
    Format(element, block, symmetric, scale)
    for element, block, symmetric, scale in itertools.product(ELEMENTS, BLOCKS, (True, False), SCALES)
    if symmetric or ELEMENTS[element].kind == "int"
] + [f for f in SPECIAL if f.element != "ternary"]
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
    *SPECIAL,
]
PRESET_FORMATS = list(PRESETS.values())


def normal(shape: Sequence[int], seed: int = 0, dtype: str = "float32") -> jax.Array:
    """Normal numbers, the same on every JAX."""
    rng = np.random.default_rng([seed, zlib.crc32(repr(tuple(shape)).encode())])
    return jnp.asarray(rng.standard_normal(tuple(shape)), jnp.float32).astype(dtype)


def rtn(w: jax.Array, fmt: Format, contracted: Sequence[int]) -> QTensor:
    """Round to nearest, nothing else."""
    return encode_array(w, compute_params(to_rows(w, contracted), fmt), fmt, contracted)


def params_of_elements(params: BlockParams, fmt: Format, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray | float]:
    """Scale and zero point of every element of `[..., m, n]`, by indexing, float32."""
    m, n = (1, *shape)[-2:]
    row, group = np.arange(m) // fmt.tile_rows, np.arange(n) // (fmt.group_size or max(n, 1))
    scale = np.asarray(params.scale, np.float32)
    if params.outer:
        blocks = scale.shape[-1]
        r, c = np.zeros(scale.shape[-2], int), np.zeros(blocks, int)
        if fmt.outer_block == "channel" or isinstance(fmt.outer_block, int):
            r = np.arange(len(r)) // (max(1, fmt.outer_block // blocks) if fmt.outer_block != "channel" else 1)
        if isinstance(fmt.outer_block, int):
            c = np.arange(blocks) // fmt.outer_block
        outer = [np.asarray(a, np.float32)[..., r[:, None], c] for a in params.outer]
        scale = (scale + outer[1] if len(outer) == 2 else scale) * outer[0]

    def pick(a: np.ndarray) -> np.ndarray:
        a = a if a.ndim > 1 else a[None]
        out = a[..., (row if a.shape[-2] > 1 else 0 * row)[:, None], group]
        return np.broadcast_to(out.reshape(*a.shape[:-2], *shape[-2:]), shape)

    return pick(scale), 0.0 if params.zero_point is None else pick(np.asarray(params.zero_point, np.float32))


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
