"""`PerUse`: a leaf that is one array to lookups and another to products, each by a small linear map of what it holds.

A tied embedding stands at both ends of the residual stream. A rotation of the stream, and the last norm's gain, would
need two different tables; this holds one, and what leads from it to the two.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core.errors import TraceError
from jquant.core.qtensor import QTensor, is_qtensor

_KEYS = ("value", "lookup", "product")


@jax.tree_util.register_pytree_with_keys_class
class PerUse:
    """A leaf that stands for two arrays of the same shape and dtype. A pytree node.

    Its rows lie along the axis that a use contracts (a lookup: that it brings out). With a map T, `[n, n]` or, of a
    diagonal one, `[n]`, a row w stands for w T. `quantized` never makes those arrays: it multiplies what a lookup
    brings out by T, and what a product takes in by T^T. The price is the bytes of the maps, and n * n multiplications
    for every token at each use.

    Attributes:
      value: the array or the QTensor that is held.
      lookup: the map of lookups, float32 `[n, n]` or `[n]`, or None for the identity.
      product: the map of products, likewise.
    """

    __slots__ = ("value", "lookup", "product")

    def __init__(self, value: Any, lookup: Any = None, product: Any = None):
        self.value, self.lookup, self.product = value, lookup, product

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey(k), getattr(self, k)) for k in _KEYS], None

    def tree_flatten(self):
        return (self.value, self.lookup, self.product), None

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children)

    def replace(self, **changes: Any) -> "PerUse":
        """A copy with some fields changed."""
        return PerUse(**({k: getattr(self, k) for k in _KEYS} | changes))

    def check(self) -> "PerUse":
        """Itself, or an error if the QTensor that it holds is damaged."""
        if is_qtensor(self.value):
            self.value.check()
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    @property
    def arrays(self) -> list[Any]:
        """Every array it holds."""
        return jax.tree.leaves(self)

    @property
    def nbytes(self) -> int:
        """Bytes that memory holds, the maps included."""
        return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in self.arrays)

    def dequantize(self) -> "PerUse":
        """The same with a float array inside. No one array stands for both uses."""
        return self.replace(value=self.value.dequantize()) if is_qtensor(self.value) else self

    def __jax_array__(self) -> jax.Array:
        # Read by a model outside `quantized`: it can't be known for which use.
        raise TraceError(
            f"a leaf of shape {self.shape} is one array to lookups and another to products (a fold made it of a tied "
            "table); run the function as jquant.quantized(apply)"
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.__jax_array__())

    def __getitem__(self, index: Any) -> jax.Array:
        return self.__jax_array__()

    def __repr__(self) -> str:
        maps = ", ".join(f"{k}={getattr(getattr(self, k), 'shape', None)}" for k in _KEYS[1:])
        return f"PerUse({self.value!r}, {maps})"


jax.export.register_pytree_node_serialization(
    PerUse, serialized_name="jquant.PerUse", serialize_auxdata=lambda _: b"", deserialize_auxdata=lambda _: None
)


def is_per_use(x: Any) -> bool:
    """True for a PerUse."""
    return isinstance(x, PerUse)


def is_node(x: Any) -> bool:
    """True for jquant's leaves that hold several arrays: the `is_leaf` of a `jax.tree.map` that takes them whole."""
    return isinstance(x, QTensor | PerUse)


def held(leaf: Any) -> Any:
    """What a leaf holds: of a PerUse its array or QTensor, of any other itself."""
    return leaf.value if isinstance(leaf, PerUse) else leaf


def holding(leaf: Any, value: Any) -> Any:
    """The leaf with another array or QTensor in it."""
    return leaf.replace(value=value) if isinstance(leaf, PerUse) else value


def mapped(x: jax.Array, axis: int, by: Any, transposed: bool) -> jax.Array:
    """Applies a map to one axis of `x`, in float32: rows times `by`, or times its transpose. Of numpy's, in numpy."""
    if by is None:
        return x
    xp: Any = np if isinstance(x, np.ndarray) and isinstance(by, np.ndarray) else jnp
    rows = xp.moveaxis(x, axis, -1)
    dtype = np.float64 if np.float64 in (x.dtype, by.dtype) else np.float32
    wide, by = rows.astype(dtype), by.astype(dtype)
    out = wide * by if by.ndim == 1 else xp.matmul(wide, by.T if transposed else by)
    return xp.moveaxis(out.astype(x.dtype), -1, axis)
