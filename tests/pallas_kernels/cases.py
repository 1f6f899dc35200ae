"""Random products for the kernels' tests, and what they are in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul import reference
from pallas_kernels.quantized_matmul.elements import element, values


def interpreted() -> bool:
    """Whether the tests run kernels in Pallas' interpreter: everywhere but on a GPU (`make test-gpu`)."""
    return jax.default_backend() != "gpu"


class Case(NamedTuple):
    """One product: activations, codes, scales, zero points."""

    x: jax.Array
    planes: tuple[jax.Array, ...]
    scale: jax.Array
    zero_point: jax.Array | None
    options: dict

    @property
    def arrays(self) -> tuple:
        return (self.x, self.planes, self.scale, self.zero_point)


def random_scale(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> jax.Array:
    if dtype == "float8_e8m0fnu":
        return jax.lax.bitcast_convert_type(jnp.asarray(rng.integers(118, 132, shape), jnp.uint8), jnp.float8_e8m0fnu)
    return jnp.asarray(rng.uniform(0.25, 2, shape), jnp.float32).astype(dtype)


def random_codes(rng: np.random.Generator, name: str, shape: tuple[int, ...], signed: bool) -> np.ndarray:
    """Codes that all stand for finite numbers."""
    finite = np.flatnonzero(np.isfinite(values(name, signed)))
    return rng.choice(finite, shape).astype(np.uint8)


def make(
    name: str,
    m: int,
    n: int,
    k: int,
    group: int | None = None,
    *,
    asymmetric: bool = False,
    zero_dtype: str = "uint8",
    dtype: str = "bfloat16",
    scale_dtype: str = "bfloat16",
    lead: tuple[int, ...] = (),
    seed: int = 0,
) -> Case:
    """A product of random activations and codes; `lead` axes in front of all of them."""
    rng = np.random.default_rng(seed)
    bits = element(name).bits
    blocks = 1 if group is None else -(-k // group)
    planes = reference.pack(jnp.asarray(random_codes(rng, name, (*lead, n, k), not asymmetric)), bits)
    zero = None
    if asymmetric:
        raw = rng.integers(0, 2**bits, (*lead, n, blocks)).astype(np.float32)
        zero = jnp.asarray(raw if zero_dtype == "uint8" else raw * 0.9).astype(zero_dtype)
    x = jnp.asarray(rng.standard_normal((*lead, m, k)), jnp.float32).astype(dtype)
    options = dict(element=name, group_size=group)
    return Case(x, planes, random_scale(rng, (*lead, n, blocks), scale_dtype), zero, options)


def exact(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, and the sum of the absolute terms, which errors are measured by."""
    name, group = case.options["element"], case.options["group_size"]
    w = reference.dequantize(case.planes, case.scale, case.zero_point, name, group, case.x.shape[-1])
    x64, w64 = (np.asarray(a.astype(jnp.float32), np.float64) for a in (case.x, w))
    return x64 @ np.swapaxes(w64, -1, -2), np.abs(x64) @ np.swapaxes(np.abs(w64), -1, -2)
