"""`QTensor`: an array held as packed codes, scales and zero points. A pytree node.

Layout. The logical array's contracted axes (those that its matmul sums over) are moved to the end, in order, and
flattened into rows: `kept axes x n`. Codes are packed along the rows; the kept axes stay separate, in order and in
front. So any kept axis can be sliced, scanned, vmapped or sharded on all the arrays at once, and the kernels read every
row contiguously.

What several rows share (a scale of a 2-D tile, a second-level scale) is shared along the last kept axis only. That axis
has fewer entries there, so it must be cut at the ends of tiles, or by `core.kept`, which first gives every row its own
scales (`untiled`): the slices of a tile are no tiles. All other kept axes are as free as without tiles.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core import packing
from jquant.core import side as _side
from jquant.core.activation import Activation, Policy
from jquant.core.errors import DamagedQTensorError, FormatError, TraceError
from jquant.core.exported import static_from_bytes, static_to_bytes
from jquant.core.formats import BlockParams, Format, decode, encode, row_params
from jquant.core.scales import Outer, spread_rows
from jquant.core.side import Side

_KEYS = ("codes", "scale", "zero_point", "outer", "activation_params", "side")
_STATIC = ("format", "contracted", "inner", "pad", "_dtype", "activation")


@jax.tree_util.register_pytree_with_keys_class
class QTensor:
    """A quantized array that stands for a float array of the same shape and dtype.

    Attributes:
      codes: one uint8 array for each plane of `core.packing`, `[*kept, packed n]`; a single one for 4 and 8 bits.
      scale: `[*kept, blocks]` in the format's scale dtype ("channel": `[*kept, 1]`; "tensor": ones in place of the kept
        axes that share it; tiles of r rows: ceil(size / r) in place of the last kept axis).
      zero_point: in the format's zero dtype, the shape of `scale`, or None.
      outer: the second level of scales, as `core.scales` says, `[*kept, outer blocks]` with the last kept axis shorter
        where rows share one; (1, ..., 1, or one for each stacked tensor) for "tensor"; empty without one.
      format: the `Format`.
      contracted: the contracted axes, negative and ascending.
      inner: sizes of the contracted axes after the first one. (The first follows from the codes, so that a leading or a
        sharded axis may change its size under vmap, scan and shard_map.)
      pad: how many codes of the last byte of the first plane are padding.
      dtype: the dtype it decodes to.
      activation: how the inputs of its matmuls are rounded, or None where they stay in float.
      activation_params: for a static range its scale and zero point, `[*batch, 1]`, ones in place of the kept axes that
        its matmuls do not share with their input; None otherwise.
      side: a float matrix of low rank that is added to what the codes stand for (`lowrank`), or beside which they see
        what is left of the input (`lowrank_inputs`), or None.
    """

    __slots__ = (*_KEYS, *_STATIC)

    def __init__(
        self,
        codes: tuple[jax.Array, ...],
        scale: jax.Array,
        zero_point: jax.Array | None,
        format: Format,
        contracted: tuple[int, ...],
        inner: tuple[int, ...],
        pad: int,
        dtype: str,
        activation: Activation | None = None,
        activation_params: BlockParams | None = None,
        outer: Outer = (),
        side: Side | None = None,
    ):
        self.codes, self.scale, self.zero_point, self.outer, self.side = codes, scale, zero_point, outer, side
        self.format, self.contracted, self.inner, self.pad, self._dtype = format, contracted, inner, pad, dtype
        self.activation, self.activation_params = activation, activation_params

    def tree_flatten_with_keys(self):
        children = [(jax.tree_util.GetAttrKey(k), getattr(self, k)) for k in _KEYS]
        return children, tuple(getattr(self, k) for k in _STATIC)

    def tree_flatten(self):
        return tuple(getattr(self, k) for k in _KEYS), tuple(getattr(self, k) for k in _STATIC)

    @classmethod
    def tree_unflatten(cls, static, children):
        # No checks: JAX unflattens with tracers, shapes, shardings and sentinels. `check` runs at every read instead.
        q = object.__new__(cls)
        for name, value in zip((*_KEYS, *_STATIC), (*children, *static), strict=True):
            setattr(q, name, value)
        return q

    def check(self) -> "QTensor":
        """Itself, or an error if its arrays are not what the format says.

        Raises:
          DamagedQTensorError: the codes were cast, or an array was cut along a packed axis.
        """
        widths = packing.plane_widths(self.format.bits)
        dtypes = [np.dtype(c.dtype) for c in self.codes]
        if any(d != np.uint8 for d in dtypes):
            raise DamagedQTensorError(
                f"the codes of a QTensor ({self.format}) are {dtypes[0]}, not uint8: a cast was mapped over its "
                "arrays. Use jax.tree.map(..., is_leaf=jquant.is_qtensor) with QTensor.astype, or cast it before"
            )
        if np.dtype(self.scale.dtype) != jnp.dtype(self.format.scale_dtype):
            raise DamagedQTensorError(
                f"the scales of a QTensor ({self.format}) are {np.dtype(self.scale.dtype)}, not "
                f"{self.format.scale_dtype}: a cast was mapped over its arrays. "
                "Use jax.tree.map(..., is_leaf=jquant.is_qtensor) with QTensor.astype, or choose another scale_dtype"
            )
        n = self.row_length
        want = [-(-n * w // 8) for w in widths]
        have = [c.shape[-1] if c.ndim else -1 for c in self.codes]
        kept = self.codes[0].shape[:-1]
        lead_ok = all(c.shape[:-1] == kept for c in self.codes) and _scales_fit(self, kept, self.format.blocks(n))
        if want != have or not lead_ok:
            raise DamagedQTensorError(
                f"a QTensor ({self.format}) has codes {[c.shape for c in self.codes]} and scale {self.scale.shape}, "
                "which do not belong together: an array was sliced, mapped or sharded along a packed axis"
            )
        if self.side is not None and (wrong := _side.problem_of(self.side, kept, n)):
            raise DamagedQTensorError(f"a QTensor ({self.format}): {wrong}; an array was sliced, mapped or cast alone")
        self._check_activation()
        return self

    def _check_activation(self) -> None:
        params, static = self.activation_params, self.activation is not None and self.activation.static
        if static != (params is not None):
            raise DamagedQTensorError(
                f"a QTensor ({self.scheme}) {'lacks' if static else 'has'} the scale of a static input range; "
                "quantize sets it, with calibration batches"
            )
        if params is not None and np.dtype(params.scale.dtype) != np.float32:
            raise DamagedQTensorError(
                f"the input scale of a QTensor ({self.scheme}) is {np.dtype(params.scale.dtype)}, not float32: a cast "
                "was mapped over its arrays. Use jax.tree.map(..., is_leaf=jquant.is_qtensor) with QTensor.astype"
            )

    @property
    def row_length(self) -> int:
        """n, the number of elements along the contracted axes."""
        return self.codes[0].shape[-1] * packing.codes_per_byte(self.format.bits) - self.pad

    @property
    def contracted_shape(self) -> tuple[int, ...]:
        """Sizes of the contracted axes, in their order."""
        if not self.contracted:
            return ()
        inner = math.prod(self.inner)
        return (self.row_length // inner if inner else 0, *self.inner)

    @property
    def ndim(self) -> int:
        return self.codes[0].ndim - 1 + len(self.contracted)

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes that are not contracted, negative and ascending."""
        return tuple(a for a in range(-self.ndim, 0) if a not in self.contracted)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""
        sizes = dict(zip(self.contracted, self.contracted_shape, strict=True))
        sizes.update(zip(self.kept, self.codes[0].shape[:-1], strict=True))
        return tuple(sizes[a] for a in range(-self.ndim, 0))

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(self._dtype)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def arrays(self) -> list[jax.Array]:
        """Every array it holds."""
        return jax.tree.leaves(tuple(getattr(self, k) for k in _KEYS))

    @property
    def nbytes(self) -> int:
        """Bytes that memory holds: packed codes, scales, zero points, the side."""
        return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in self.arrays)

    @property
    def scheme(self) -> str:
        """The name of its format, and of its inputs' where those are rounded: "int8+int8"."""
        return str(Policy(self.format, self.activation))

    @property
    def params(self) -> BlockParams:
        """Scales and zero points."""
        return BlockParams(self.scale, self.zero_point, self.outer)

    def row_params(self) -> tuple[jax.Array, jax.Array | None]:
        """Scale and zero point to calculate with, float32: `[*kept (or 1), blocks]`."""
        return row_params(self.params, self.format, self.codes[0].shape[-2] if self.kept else 1)

    @property
    def shares_rows(self) -> bool:
        """Whether rows share scales along the last kept axis, so that it can't be cut anywhere."""
        fmt = self.format
        return bool(self.kept) and (fmt.tile_rows > 1 or fmt.outer_rows(fmt.blocks(self.row_length)) > 1)

    def untiled(self) -> "QTensor":
        """The same numbers with scales for every row, where rows share some (except those of a whole tensor)."""
        if not self.shares_rows:
            return self
        fmt, m = self.format, self.codes[0].shape[-2]
        blocks, tiled = fmt.blocks(self.row_length), self.scale.shape[-2]
        tall = lambda a: spread_rows(a, fmt.tile_rows, m)
        outer, rows = self.outer, fmt.outer_rows(blocks)
        outer = tuple(a if fmt.outer_block == "tensor" else tall(spread_rows(a, rows, tiled)) for a in outer)
        single = fmt.replace(
            block=fmt.group_size if fmt.tile_rows > 1 else fmt.block,
            outer_block="channel" if rows > 1 else fmt.outer_block,
        )
        zero = None if self.zero_point is None else tall(self.zero_point)
        return self.replace(scale=tall(self.scale), zero_point=zero, outer=outer, format=single)

    def unpacked(self) -> jax.Array:
        """The codes one to a byte: uint8 `[*kept, n]`."""
        self.check()
        return packing.unpack(self.codes, self.format.bits, self.row_length)

    def rows(self) -> jax.Array:
        """The decoded rows and their side, float32 `[*kept, n]`."""
        decoded = decode(self.unpacked(), self.params, self.format)
        return decoded if self.side is None else _side.rows(self.side, decoded)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The array that it stands for, decoded in float32 and cast to `dtype` (its own by default)."""
        return from_rows(self.rows(), self.contracted, self.contracted_shape).astype(dtype or self.dtype)

    def astype(self, dtype: Any) -> "QTensor":
        """The same numbers, decoding to another float dtype. Codes and scales are untouched."""
        name = jnp.dtype(dtype).name
        if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            raise DamagedQTensorError(f"a QTensor stands for floats, it can't be cast to {name}; dequantize it first")
        return self.replace(dtype=name)

    def replace(self, **changes: Any) -> "QTensor":
        """A copy with some fields changed."""
        fields = {k: getattr(self, k) for k in (*_KEYS, *_STATIC)} | {
            "_dtype" if k == "dtype" else k: v for k, v in changes.items()
        }
        return type(self).tree_unflatten([fields.pop(k) for k in _STATIC], list(fields.values()))

    def _read(self) -> jax.Array:
        """Read by a model outside `quantized`: correct, if not fused."""
        if self.activation is not None:
            raise TraceError(
                f"a QTensor of {self.scheme} was read as an array: its matmuls are to round their inputs too, which "
                "only jquant.quantized(apply) does. Wrap the function; or call .dequantize() for the weight alone"
            )
        return self.dequantize()

    def __jax_array__(self) -> jax.Array:
        return self._read()

    def __getitem__(self, index: Any) -> jax.Array:
        # nnx layers read `self.kernel[...]`.
        return self._read()[index]

    def __iter__(self):
        return iter(self._read())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # Without it NumPy would make an object array of one QTensor, silently.
        return np.asarray(self._read(), dtype)

    def __reduce__(self):
        children = tuple(getattr(self, k) for k in _KEYS)
        host = jax.tree.map(lambda a: np.asarray(a) if isinstance(a, jax.Array) else a, children)
        return _rebuild, (tuple(getattr(self, k) for k in _STATIC), host)

    def __repr__(self) -> str:
        try:
            shape = ", ".join(map(str, self.shape))
            side = "" if self.side is None else f"{self.side.words}, "
            return (
                f"QTensor({self.scheme}, {self._dtype}[{shape}], contracted={self.contracted}, {side}"
                f"{self.nbytes:,} bytes)"
            )
        except Exception:  # holding shardings, specs or sentinels instead of arrays
            return f"QTensor({self.format}, contracted={self.contracted}, codes={self.codes}, scale={self.scale})"


jax.export.register_pytree_node_serialization(
    QTensor, serialized_name="jquant.QTensor", serialize_auxdata=static_to_bytes, deserialize_auxdata=static_from_bytes
)


def _rebuild(static: tuple[Any, ...], children: tuple[Any, ...]) -> QTensor:
    """Unpickles."""
    return QTensor.tree_unflatten(static, children)


def _scales_fit(q: QTensor, kept: tuple[int, ...], blocks: int) -> bool:
    """Whether the shapes of scales, zero points and second-level scales fit codes `[*kept, ...]`."""
    fmt = q.format

    def fits(a: Any, lead: tuple[int, ...], rows: int, last: int) -> bool:
        want = (*lead[:-1], -(-lead[-1] // rows)) if lead else ()
        return a.ndim == len(kept) + 1 and a.shape[-1] == last and all(s in (1, k) for s, k in zip(a.shape, want))

    if not fits(q.scale, kept, fmt.tile_rows, blocks) or len(q.outer) != _outer_count(fmt):
        return False
    if q.zero_point is not None and q.zero_point.shape != q.scale.shape:
        return False
    lead, rows, last = q.scale.shape[:-1], fmt.outer_rows(blocks), fmt.outer_blocks(blocks)
    same = all(a.shape == q.outer[0].shape for a in q.outer)
    return same and all(fits(a, lead, rows, last) for a in q.outer)


def _outer_count(fmt: Format) -> int:
    return 0 if fmt.outer_block is None else 2 if fmt.scale_dtype == "uint8" else 1


def is_qtensor(x: Any) -> bool:
    """True for a QTensor: the `is_leaf` of a `jax.tree.map` that takes quantized leaves whole."""
    return isinstance(x, QTensor)


def normalize_axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    """Axes as negative numbers, ascending."""
    out = tuple(sorted({(a % ndim) - ndim for a in axes}))
    if len(out) != len(axes):
        raise FormatError(f"axes {tuple(axes)} name one axis of {ndim} twice")
    return out


def to_rows(w: jax.Array, contracted: Sequence[int]) -> jax.Array:
    """Moves the contracted axes to the end and flattens them: `[*kept, n]`."""
    axes = normalize_axes(contracted, w.ndim)
    kept = [a for a in range(-w.ndim, 0) if a not in axes]
    n = math.prod(w.shape[a] for a in axes)
    return w.transpose([a + w.ndim for a in (*kept, *axes)]).reshape(*[w.shape[a] for a in kept], n)


def from_rows(rows: jax.Array, contracted: Sequence[int], contracted_shape: Sequence[int]) -> jax.Array:
    """The inverse of `to_rows`; `contracted` negative and ascending."""
    full = rows.reshape(*rows.shape[:-1], *contracted_shape)
    kept = [a for a in range(-full.ndim, 0) if a not in contracted]
    order = [*kept, *contracted]
    return full.transpose([order.index(a) for a in range(-full.ndim, 0)])


def from_codes(
    codes: jax.Array, params: BlockParams, fmt: Format, contracted: tuple[int, ...], shape: Sequence[int], dtype: Any
) -> QTensor:
    """Packs codes (uint8 `[*kept, n]`) and block parameters into a QTensor that stands for an array of `shape`."""
    contracted = normalize_axes(contracted, len(shape))
    inner = tuple(shape[a] for a in contracted[1:])
    if 0 in inner and shape[contracted[0]] != 0:
        raise FormatError(f"an array of shape {tuple(shape)} without elements along {contracted} can't be quantized")
    pad = -codes.shape[-1] % packing.codes_per_byte(fmt.bits)
    return QTensor(
        packing.pack(codes, fmt.bits),
        params.scale,
        params.zero_point,
        fmt,
        contracted,
        inner,
        pad,
        jnp.dtype(dtype).name,
        outer=params.outer,
    )


def encode_array(w: jax.Array, params: BlockParams, fmt: Format, contracted: Sequence[int]) -> QTensor:
    """Rounds `w` to the nearest codes under the given scales."""
    codes = encode(to_rows(w, contracted), params, fmt)
    return from_codes(codes, params, fmt, tuple(contracted), w.shape, w.dtype)


def dequantize(tree: Any) -> Any:
    """The float tree that a quantized tree stands for; leaves that are no QTensor are returned as they are.

    A `PerUse` (a tied table that a rotation left in place) stays one, with a float array inside: no one array stands
    for both of its uses, and `quantized` runs it.
    """
    return jax.tree.map(lambda x: x.dequantize() if is_qtensor(x) else x, tree, is_leaf=is_qtensor)


def tree_nbytes(tree: Any) -> int:
    """Bytes of all arrays in `tree`."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))
