"""Trees that the tests of checkpoints save."""

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core.formats import Format
from tests.core.cases import normal, rtn


def small_tree(seed: int = 0) -> dict:
    """Two weights and a bias, the least that has everything: quantized and not, two planes and one."""
    return {
        "layers": [
            {
                "kernel": rtn(normal((16, 6), seed), Format("int3", 8, False, "bfloat16"), (0,)),
                "bias": normal((6,), seed),
            },
            {"kernel": rtn(normal((4, 4, 6), seed, "bfloat16"), Format("nf4", 8, True, "bfloat16"), (0, 1))},
        ],
        "step": jnp.int32(seed),
    }


def every_leaf() -> dict:
    """A leaf of every kind that can be saved."""
    arrays = {
        name: jnp.asarray(np.arange(-6, 6).reshape(3, 4)).astype(name)
        for name in ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int16", "int32", "int4")
    }
    unsigned = {
        name: jnp.asarray(np.arange(12).reshape(3, 4)).astype(name) for name in ("uint8", "uint32", "uint4", "bool")
    }
    special = jnp.asarray([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3e38], jnp.float32)
    return {
        "arrays": {**arrays, **unsigned, "special": special, "complex": jnp.asarray([1 + 2j], jnp.complex64)},
        "scalars": [jnp.float32(3.5), jnp.bfloat16(-2), jnp.int32(7), np.float32(2.5)],
        "empty": {
            "a": jnp.zeros((0,), jnp.bfloat16),
            "b": jnp.zeros((3, 0, 2), jnp.int8),
            "none": None,
            "dict": {},
            "list": [],
        },
        "numpy": {"f64": np.asarray([np.pi, 1e300]), "i64": np.asarray([2**60]), "f32": np.ones((2, 3), np.float32)},
        "python": (True, 3, -(2**70), 0.1, float("inf"), float("nan"), "text"),
        "key": jax.random.key(5),
        "keys": jax.random.split(jax.random.key(5, impl="rbg"), 3),
        "nothing": rtn(jnp.zeros((0, 3)), Format("int4", 4), (0,)),
        "a/b.c d:é*?": {"deep": (jnp.ones(1), [jnp.ones(2)])},
    }
