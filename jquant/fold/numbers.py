"""Primitives in numpy: what a program in float64 is run by where each equation runs once.

JAX would compile every equation for its shapes, which takes longer than running it, and lay a copy of each large
parameter beside the parameter. What is not in this table, or of a kind that a rule does not know, is left to JAX.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from scipy import special


def rule_of(name: str, values: Sequence[Any]) -> Callable[..., Any] | None:
    """`(parameters of the equation, *values) -> its output`, or None; a rule may still give NotImplemented."""
    plain = all(isinstance(v, np.ndarray | np.generic) for v in values)
    return RULES.get(name) if plain else None


def plain(x: Any) -> Any:
    """An array of JAX's as one of numpy's; what has no numbers yet, and keys, as they are."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        return x
    return x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) else np.asarray(x)


def _floats(*values: Any) -> bool:
    return all(np.issubdtype(v.dtype, np.floating) for v in values)


def _entrywise(fn: Callable[..., Any], floats: bool = False) -> Callable[..., Any]:
    return lambda params, *values: NotImplemented if floats and not _floats(*values) else fn(*values)


def _power(params: Any, x: Any) -> Any:
    return x ** params["y"] if _floats(x) else NotImplemented


def _converted(params: Any, x: Any) -> Any:
    dtype = params["new_dtype"]
    if jax.dtypes.issubdtype(dtype, np.floating):  # bfloat16 too
        return x.astype(np.float64)
    return NotImplemented if _floats(x) else x.astype(dtype)  # JAX has its own word on floats beyond the range


def _broadcast(params: Any, x: Any, *sizes: Any) -> Any:
    shape, dims = params["shape"], params["broadcast_dimensions"]
    if sizes:
        return NotImplemented
    thin = [1] * len(shape)
    for d, n in zip(dims, x.shape, strict=True):
        thin[d] = n
    return np.broadcast_to(x.reshape(thin), shape)


def _reshaped(params: Any, x: Any, *sizes: Any) -> Any:
    return NotImplemented if sizes or params["dimensions"] is not None else x.reshape(params["new_sizes"])


def _sliced(params: Any, x: Any) -> Any:
    steps = params["strides"] or (1,) * x.ndim
    return x[tuple(map(slice, params["start_indices"], params["limit_indices"], steps))]


def _selected(params: Any, which: Any, *cases: Any) -> Any:
    return np.where(which, cases[1], cases[0]) if which.dtype == bool and len(cases) == 2 else NotImplemented


def _iota(params: Any, *sizes: Any) -> Any:
    shape, d, dtype = params["shape"], params["dimension"], params["dtype"]
    if sizes or not np.issubdtype(dtype, np.integer):
        return NotImplemented
    thin = [n if i == d else 1 for i, n in enumerate(shape)]
    return np.broadcast_to(np.arange(shape[d], dtype=dtype).reshape(thin), shape)


def _reduced(fn: Any) -> Callable[..., Any]:
    return lambda params, x: fn(x, axis=tuple(params["axes"])) if _floats(x) else NotImplemented


def _product(params: Any, a: Any, b: Any) -> Any:
    """dot_general of floats; a matrix that is read as it lies, or transposed, is not copied."""
    if not _floats(a, b):
        return NotImplemented
    (ca, cb), (ba, bb) = params["dimension_numbers"]
    fa = [d for d in range(a.ndim) if d not in (*ca, *ba)]
    fb = [d for d in range(b.ndim) if d not in (*cb, *bb)]
    size = lambda x, dims: int(np.prod([x.shape[d] for d in dims]))
    lead = [a.shape[d] for d in ba]
    left = a.transpose([*ba, *fa, *ca]).reshape(*lead, size(a, fa), size(a, ca))
    right = b.transpose([*bb, *cb, *fb]).reshape(*lead, size(b, cb), size(b, fb))
    return _matmul(left, right).reshape([*lead, *[a.shape[d] for d in fa], *[b.shape[d] for d in fb]])


ALONE = 2**18  # terms of a product for which OpenBLAS starts no thread
_SMALL = 2**26  # terms up to which a product is made of such parts


def _matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A product of floats; one of few rows in parts for which OpenBLAS starts no thread, so that others can run."""
    rows, n = a.shape[-2:]
    terms = rows * n * b.shape[-1]
    if a.ndim > 2 or not ALONE < terms <= _SMALL or rows * 64 * 8 > ALONE:
        return np.matmul(a, b)
    if rows * n * 8 > ALONE:
        return _matmul(a[:, : n // 2], b[: n // 2]) + _matmul(a[:, n // 2 :], b[n // 2 :])
    width = ALONE // (rows * n)
    if last := b.shape[1] % width:
        return np.concatenate([_matmul(a, b[:, :-last]), np.matmul(a, b[:, -last:])], axis=1)
    parts = np.matmul(a, b.reshape(n, -1, width).transpose(1, 0, 2))
    return parts.transpose(1, 0, 2).reshape(rows, -1)


def _looked_up(params: Any, x: Any, indices: Any) -> Any:
    """A gather of whole slices of one axis, all inside."""
    numbers = params["dimension_numbers"]
    dims = tuple(numbers.start_index_map)
    if len(dims) != 1 or tuple(numbers.collapsed_slice_dims) != dims or numbers.operand_batching_dims:
        return NotImplemented
    at = indices[..., 0]
    sizes = [1 if d == dims[0] else n for d, n in enumerate(x.shape)]
    if list(params["slice_sizes"]) != sizes or at.size and (at.min() < 0 or at.max() >= x.shape[dims[0]]):
        return NotImplemented
    rows = np.take(x, at.ravel(), axis=dims[0])
    rows = np.moveaxis(rows, dims[0], 0).reshape(*at.shape, *[n for d, n in enumerate(x.shape) if d != dims[0]])
    batch, offset = iter(range(at.ndim)), iter(range(at.ndim, rows.ndim))
    return rows.transpose([next(offset) if d in numbers.offset_dims else next(batch) for d in range(rows.ndim)])


_BOTH: dict[str, Any] = {
    "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "and": np.bitwise_and, "or": np.bitwise_or, "neg": np.negative, "abs": np.abs,
}  # fmt: skip
_FLOATS: dict[str, Any] = {
    "div": np.divide, "exp": np.exp, "log": np.log, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "square": np.square, "logistic": special.expit, "erf": special.erf,
}  # fmt: skip

RULES: dict[str, Callable[..., Any]] = {
    **{name: _entrywise(fn) for name, fn in _BOTH.items()},
    **{name: _entrywise(fn, True) for name, fn in _FLOATS.items()},
    "integer_pow": _power,
    "convert_element_type": _converted,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshaped,
    "transpose": lambda params, x: x.transpose(params["permutation"]),
    "squeeze": lambda params, x: x.squeeze(tuple(params["dimensions"])),
    "expand_dims": lambda params, x: np.expand_dims(x, params["dimensions"]),
    "concatenate": lambda params, *xs: np.concatenate(xs, params["dimension"]),
    "stack": lambda params, *xs: np.stack(xs, params["axis"]),
    "tile": lambda params, x: np.tile(x, params["reps"]),
    "slice": _sliced,
    "select_n": _selected,
    "iota": _iota,
    "stop_gradient": lambda params, x: x,
    "copy": lambda params, x: x,
    "reduce_sum": _reduced(np.sum),
    "reduce_max": _reduced(np.max),
    "reduce_min": _reduced(np.min),
    "dot_general": _product,
    "gather": _looked_up,
}
