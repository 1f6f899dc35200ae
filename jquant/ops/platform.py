"""Kernels in programs that are lowered for several platforms at once, as `jax.export` does.

`lax.platform_dependent` chooses a branch, but JAX lowers what is in a branch for every platform of the program, and a
kernel for NVIDIA GPUs can't be lowered for any other. Rules of a primitive are lowered for their own platform alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.interpreters import batching, mlir

from pallas_kernels import compat

_function = jex.Primitive("function")
_function.multiple_results = True


def on_cuda(fn: Callable[..., Any], *args: jax.Array) -> Any:
    """`fn(*args)`, a tuple of arrays, with a rule for vmap but none for a derivative.

    In a program for several platforms it is zeros on all but NVIDIA GPUs, where a branch that is not taken has it.
    """
    return tuple(_function.bind(*args, fn=fn, only_cuda=True))


def opaque(fn: Callable[..., Any], *args: jax.Array) -> Any:
    """`fn(*args)` as one equation, on all platforms: in its trace there are no constants, whatever `fn` reads."""
    return tuple(_function.bind(*args, fn=fn, only_cuda=False))


def _shapes(*args: Any, fn: Callable[..., Any], only_cuda: bool) -> list[Any]:
    out = jax.eval_shape(fn, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args))
    return [jax.core.ShapedArray(a.shape, a.dtype) for a in out]


def _batched(args: Any, dims: Any, *, fn: Callable[..., Any], only_cuda: bool) -> Any:
    axes = [d if isinstance(d, int) else None for d in dims]
    outs = _function.bind(*args, fn=jax.vmap(fn, axes), only_cuda=only_cuda)
    return outs, [0] * len(outs)


def _elsewhere(ctx: Any, *args: Any, fn: Callable[..., Any], only_cuda: bool) -> Any:
    if ctx.platforms is None or not only_cuda:  # of the only platform: what can't be lowered says so itself
        return mlir.lower_fun(fn)(ctx, *args)
    return mlir.lower_fun(lambda *_: [jnp.zeros(a.shape, a.dtype) for a in ctx.avals_out])(ctx, *args)


def _cuda(ctx: Any, *args: Any, fn: Callable[..., Any], only_cuda: bool) -> Any:
    with compat.lowering_on(compat.target_of(ctx)):
        return mlir.lower_fun(fn)(ctx, *args)


_function.def_impl(lambda *args, fn, only_cuda: fn(*args))
_function.def_abstract_eval(_shapes)
batching.primitive_batchers[_function] = _batched
mlir.register_lowering(_function, _elsewhere)
mlir.register_lowering(_function, _cuda, platform="cuda")
