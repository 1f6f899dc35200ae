"""`quantized_matmul`: any implementation, any leading axes, with a derivative and a batching rule."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels import compat
from pallas_kernels.quantized_matmul import decode, rings, triton, xla
from pallas_kernels.quantized_matmul.elements import element, plane_widths
from pallas_kernels.quantized_matmul.rings import Ring
from pallas_kernels.quantized_matmul.tilings import FEW, Tiling

IMPLEMENTATIONS = ("auto", "mosaic", "triton", "xla")


class Options(NamedTuple):
    """What is static: see `quantized_matmul`."""

    element: str
    group_size: int | None
    out_dtype: Any
    implementation: str
    device: str | None
    tiling: Tiling | Ring | None
    exact: bool
    packed: bool
    interpret: bool


class Arrays(NamedTuple):
    """The weight: `[*batch, N, ...]`."""

    planes: tuple[jax.Array, ...]
    scale: jax.Array
    zero_point: jax.Array | None


def quantized_matmul(
    x: jax.Array,
    planes: tuple[jax.Array, ...] | jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    element: str,
    group_size: int | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: str = "auto",
    device: str | None = None,
    tiling: Tiling | Ring | None = None,
    exact: bool = False,
    packed: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """`out[..., n] = sum_k x[..., k] (value(code[n, k]) - zero_point[n, k // group]) scale[n, k // group]`.

    More than `FEW` rows of 16-bit activations are multiplied by XLA with the weight that a kernel has written out: 2
    bytes an element, for the time of the product. With a `tiling`, or if `exact`, the kernel that reads codes takes
    them.

    Under `vmap` over weights (experts) the kernel gets one more axis of its grid; over activations alone, more rows.
    The derivative, with respect to x, the scales and float zero points, is XLA's of the dequantized product.

    Args:
      x: `[..., K]`: bfloat16, float16, or float32 (which keeps its precision).
      planes: the codes as `reference.pack` makes them: uint8 `[N, bytes]`, one for each plane.
      scale: `[N (or 1), blocks]`, blocks = 1 or ceil(K / group_size); any float dtype, or float8_e8m0fnu or
        float8_e4m3fn.
      zero_point: the shape of `scale`, uint8 (one of the codes) or float; None for codes in two's complement, and for
        other elements.
      element: "int2" to "int8", "nf4", "fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1".
      group_size: elements of a row that share a scale (the last group may be shorter); None where the row does.
      out_dtype: of the result; that of `x` by default. Sums are float32.
      implementation: "mosaic" (Hopper alone), "triton", "xla"; "auto" takes one of the first two: "mosaic" where it
        was the faster one.
      device: the GPU, one of `gpus.GPUS`; by default that which the program is lowered for, where it is known
        (`compat.lowering_on`), else "any".
      tiling: to choose it oneself: a `Tiling` for Triton, a `Ring` for Mosaic.
      exact: never write the weight out, which rounds it: codes of activations times codes of weights keep their sums,
        also where `vmap` makes few rows many.
      packed: upcast elements two and four at a time by inline PTX (`packed`), where there is one for them. No
        interpreter runs it: there, and with False, one at a time.
      interpret: run the kernel in Pallas' interpreter: on any machine, slowly.

    Returns:
      `[..., N]`.

    Raises:
      ValueError: the shapes do not fit together, or the implementation can't do this product (it says why).
    """
    planes = planes if isinstance(planes, tuple) else (planes,)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"quantized_matmul: implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    _check(x, planes, scale, element, group_size)
    dtype = jnp.dtype(out_dtype or x.dtype)
    if tiling is not None and implementation == "auto":
        implementation = "mosaic" if isinstance(tiling, Ring) else "triton"
    options = Options(element, group_size, dtype, implementation, device, tiling, exact, packed, interpret)
    return _product(options, x, Arrays(planes, scale, zero_point))


def _check(x: jax.Array, planes: tuple[jax.Array, ...], scale: jax.Array, name: str, group_size: int | None) -> None:
    e, k = element(name), x.shape[-1]
    want = [-(-k * w // 8) for w in plane_widths(e.bits)]
    have = [p.shape[-1] for p in planes]
    if want != have:
        raise ValueError(
            f"quantized_matmul: rows of {k} codes of {name} are planes of {want} bytes, but planes has {have}; "
            "pack the codes along the contracted axis with reference.pack"
        )
    blocks = 1 if group_size is None else -(-k // group_size)
    if scale.shape[-1] != blocks:
        raise ValueError(f"quantized_matmul: scale {scale.shape} must have {blocks} blocks at its end")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(options: Options, x: jax.Array, w: Arrays) -> jax.Array:
    return _batched(options, 0, x, w)


def _forward(options: Options, x: jax.Array, w: Arrays) -> Any:
    return _product(options, x, w), (x, w)


def _backward(options: Options, kept: Any, cotangent: jax.Array) -> Any:
    plain = options._replace(implementation="xla")
    return jax.vjp(lambda x, w: _flat(plain, 0, x, w), *kept)[1](cotangent)


_product.defvjp(_forward, _backward)


def _batched(options: Options, batch: int, x: jax.Array, w: Arrays) -> jax.Array:
    """`_flat`, with a batching rule: `batch` leading axes of all arrays hold separate products."""
    if options.implementation == "xla":  # XLA knows how to batch its own
        return _flat(options, batch, x, w)
    run = custom_vmap(partial(_flat, options, batch))

    def rule(size: int, mapped: Any, x: jax.Array, w: Arrays) -> tuple[jax.Array, bool]:
        x_mapped, w_mapped = mapped
        if not any(jax.tree.leaves(w_mapped)):  # more rows: the weight is still read once
            out = _batched(options, batch, jnp.moveaxis(x, 0, batch), w)
            return jnp.moveaxis(out, batch, 0), True
        every = lambda a, is_mapped: a if is_mapped else jnp.broadcast_to(a, (size, *a.shape))
        return _batched(options, batch + 1, every(x, x_mapped), jax.tree.map(every, w, w_mapped)), True

    run.def_vmap(rule)
    return run(x, w)


def _flat(options: Options, batch: int, x: jax.Array, w: Arrays) -> jax.Array:
    """The product with its axes put together: `[B, M, K]` by `[B, N, ...]`, or without B."""
    lead, rows, k = x.shape[:batch], x.shape[batch:-1], x.shape[-1]
    front = (math.prod(lead),) if batch else ()
    together = lambda a: a.reshape(*front, *a.shape[batch:])
    flat = x.reshape(*front, math.prod(rows), k)
    planes, scale, zero_point = jax.tree.map(together, w)
    how = _implementation(options, flat, planes, scale, zero_point)
    stored: dict[str, Any] = dict(element=options.element, group_size=options.group_size, out_dtype=options.out_dtype)
    out = how(flat, planes, scale, zero_point, **stored)
    return out.reshape(*lead, *rows, out.shape[-1])


def _implementation(options: Options, x: jax.Array, planes: Any, scale: Any, zero_point: Any) -> Any:
    """The function that multiplies: `triton.quantized_matmul` or another one with its arguments."""
    name = options.implementation
    device = compat.device_of(options.device)
    place: dict[str, Any] = dict(device=device, interpret=options.interpret)
    tiling: Any = options.tiling
    if name == "auto" and options.packed and not options.interpret:  # Mosaic's upcasts are inline PTX, all of them
        weight = (options.element, options.group_size, x, planes, scale, zero_point)
        name = "mosaic" if rings.preferred(device, *weight) else "triton"
    if name == "xla":
        return xla.quantized_matmul
    if name == "mosaic":
        # Here, not above: jaxlib has it for some platforms only.
        from pallas_kernels.quantized_matmul import mosaic

        return partial(mosaic.quantized_matmul, ring=tiling, **place)
    if not options.exact and tiling is None and x.dtype.itemsize == 2 and x.shape[-2] > FEW:
        return partial(decode.quantized_matmul, **place)
    return partial(triton.quantized_matmul, tiling=tiling, packed=options.packed, **place)
