"""`Ref`: a parameter on its way from the leaf to the operation that reads it.

Between a leaf and its matmul stand reshapes, transposes, casts, slices, the scan over a stack. None of them computes
anything, so a Ref carries them as a *view* and no array is made. Each axis of the leaf is factored into atoms
(axis, stride, size); each dimension of the view is a list of atoms, major to minor. Reshape splits and regroups atoms,
transpose permutes them. Axes are negative, so that they keep their names when a scan takes a leading axis away.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core import kept
from jquant.core.errors import TraceError
from jquant.core.per_use import is_per_use
from jquant.core.qtensor import is_qtensor


class Atom(NamedTuple):
    """Part of an axis: an index i along `axis` is the sum over its atoms of `stride` times the atom's own index."""

    axis: int
    stride: int
    size: int


Dim = tuple[Atom, ...]


class Index(NamedTuple):
    """A stacked axis of the leaf of which one slice was taken: its name in the full leaf, its size, and which slice
    ("scanned" by the scan `by`, an identity; an int; or "traced")."""

    axis: int
    size: int
    at: Any
    by: int = 0


@jax.tree_util.register_pytree_node_class
class Ref:
    """A view of a parameter.

    Attributes:
      value: what is viewed: a QTensor, or the float array (perhaps abstract); slices are already taken from it.
      position: traced start of a dynamic index, for the observer, or None.
      path: the leaf's path.
      dims: the view, one list of atoms for each dimension; atoms of size 1 are left out.
      casts: names of the dtypes that it was cast to, in order.
      sliced: axes (in today's numbering) that a slice shortened.
      stack: the axes of the full leaf that were indexed away, outermost first.
      origins: for each of `sliced`, where its slice starts (None: at a traced number) and how long the axis was.
    """

    __slots__ = ("value", "position", "path", "dims", "casts", "sliced", "stack", "origins")

    def __init__(self, value, position, path, dims, casts=(), sliced=(), stack=(), origins=()):
        self.value, self.position, self.path, self.dims = value, position, path, dims
        self.casts, self.sliced, self.stack, self.origins = casts, sliced, stack, origins

    def tree_flatten(self):
        return (self.value, self.position), (self.path, self.dims, self.casts, self.sliced, self.stack, self.origins)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, *static)

    def replace(self, **changes: Any) -> "Ref":
        return Ref(**({k: getattr(self, k) for k in self.__slots__} | changes))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(a.size for a in dim) for dim in self.dims)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.casts[-1]) if self.casts else self.value.dtype

    def array(self) -> jax.Array:
        """The array that the view stands for: dequantized, rearranged and cast."""
        if is_per_use(self.value):
            raise TraceError(
                f"{self.path}: is one array to lookups and another to products, and is read as a whole; a fold made it "
                "so for a function that does not"
            )
        w = self.value.dequantize() if is_qtensor(self.value) else self.value
        return self.cast(self.arrange(w))

    def cast(self, w: jax.Array) -> jax.Array:
        """Applies the casts on the way."""
        for dtype in self.casts:
            w = w.astype(dtype)
        return w

    def arrange(self, w: jax.Array) -> jax.Array:
        """Brings an array of the leaf's shape into the view's shape."""
        atoms = axis_order(a for dim in self.dims for a in dim)
        w = w.reshape([a.size for a in atoms])
        w = w.transpose([atoms.index(a) for dim in self.dims for a in dim])
        return w.reshape(self.shape)


def axis_order(atoms: Any) -> list[Atom]:
    """Atoms in the order in which the leaf holds them."""
    return sorted(atoms, key=lambda a: (a.axis, -a.stride))


def new_ref(path: str, value: Any) -> Ref:
    """The view of a whole leaf."""
    ndim = len(value.shape)
    dims = tuple(_dim(Atom(i - ndim, 1, s)) for i, s in enumerate(value.shape))
    return Ref(value, None, path, dims)


def _dim(atom: Atom) -> Dim:
    return () if atom.size == 1 else (atom,)


def merged(dim: Sequence[Atom]) -> Dim:
    """Joins neighbouring atoms that are one run of one axis."""
    out: list[Atom] = []
    for a in dim:
        if out and out[-1].axis == a.axis and out[-1].stride == a.stride * a.size:
            out[-1] = Atom(a.axis, a.stride, out[-1].size * a.size)
        else:
            out.append(a)
    return tuple(out)


def whole_axis(ref: Ref, dim: int) -> int | None:
    """The leaf's axis that dimension `dim` of the view is, whole and alone, or None."""
    atoms = merged(ref.dims[dim])
    if len(atoms) != 1 or atoms[0].size != ref.value.shape[atoms[0].axis]:
        return None
    return atoms[0].axis


def reshape(ref: Ref, sizes: Sequence[int]) -> Ref | None:
    """The view reshaped, or None where an atom would have to be cut unevenly."""
    if math.prod(sizes) == 0:
        return None
    atoms = [a for dim in ref.dims for a in dim]
    dims: list[Dim] = []
    for size in sizes:
        dim: list[Atom] = []
        while size > 1:
            if not atoms:
                return None
            a = atoms.pop(0)
            if size % a.size == 0:
                size //= a.size
            elif a.size % size == 0:
                rest = a.size // size
                atoms.insert(0, Atom(a.axis, a.stride, rest))
                a, size = Atom(a.axis, a.stride * rest, size), 1
            else:
                return None
            dim.append(a)
        dims.append(merged(dim))
    return ref.replace(dims=tuple(dims))


def transpose(ref: Ref, permutation: Sequence[int]) -> Ref:
    return ref.replace(dims=tuple(ref.dims[p] for p in permutation))


def cast(ref: Ref, dtype: Any) -> Ref | None:
    """The view cast to another float dtype, or None where it is cast to no float."""
    if not (jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(ref.dtype, jnp.floating)):
        return None
    return ref if ref.dtype == dtype else ref.replace(casts=(*ref.casts, jnp.dtype(dtype).name))


def cut(ref: Ref, dim: int, start: Any, size: int) -> Ref | None:
    """Elements `start` .. `start + size` of one dimension, or None where that can't be taken from the leaf itself.

    `start` is inside bounds; it may be traced.
    """
    if size == ref.shape[dim]:
        return ref
    axis = whole_axis(ref, dim)
    if axis is None or is_per_use(ref.value):
        return None
    if is_qtensor(ref.value) and axis in ref.value.contracted:
        return None
    start = int(start) if isinstance(start, np.integer) else start
    dims = tuple(_dim(Atom(axis, 1, size)) if i == dim else d for i, d in enumerate(ref.dims))
    if size == 1:
        return _drop(ref.replace(dims=dims), axis, start)
    value = kept.slice_axis(ref.value, axis, start, size)
    return ref.replace(value=value, dims=dims, **_sliced(ref, axis, start))


def _origin(ref: Ref, axis: int) -> tuple[int | None, int]:
    """Where today's `axis` starts in the full leaf's, and how long that is."""
    origins = dict(zip(ref.sliced, ref.origins, strict=False))
    if axis in ref.sliced:
        return origins.get(axis, (None, ref.value.shape[axis]))
    return 0, ref.value.shape[axis]


def _sliced(ref: Ref, axis: int, start: Any) -> dict[str, Any]:
    first, full = _origin(ref, axis)
    known = first is not None and isinstance(start, int)
    origins = {**dict(zip(ref.sliced, ref.origins, strict=False)), axis: (first + start if known else None, full)}
    return {"sliced": tuple(origins), "origins": tuple(origins.values())}


def _renamed(ref: Ref, gone: int) -> dict[str, Any]:
    dims = tuple(tuple(Atom(kept.renamed(a.axis, gone), *a[1:]) for a in d) for d in ref.dims)
    left = {kept.renamed(a, gone): _origin(ref, a) for a in ref.sliced if a != gone}
    return {"dims": dims, "sliced": tuple(left), "origins": tuple(left.values())}


def _drop(ref: Ref, axis: int, start: Any) -> Ref | None:
    """Takes away an axis of which one slice was taken, and notes it in `stack`."""
    first, size = _origin(ref, axis)
    if first is None:
        return None
    static = isinstance(start, int)
    index = Index(full_axis(ref, axis), size, first + start if static else "traced")
    value = kept.remove_axis(kept.slice_axis(ref.value, axis, start, 1), axis)
    position = ref.position if static else start + first
    return ref.replace(value=value, position=position, stack=(*ref.stack, index), **_renamed(ref, axis))


def full_axis(ref: Ref, axis: int) -> int:
    """The name, in the full leaf, of an axis as it is named today: the dropped axes put back."""
    dropped = {index.axis for index in ref.stack}
    full, left = 0, -axis
    while left:
        full -= 1
        left -= full not in dropped
    return full


def leading_axis(ref: Ref) -> int | None:
    """The leaf's axis that the view's first dimension is, whole and alone; a stack of one counts."""
    if ref.dims and ref.shape[0] == 1 and ref.value.shape[:1] == (1,):
        return -len(ref.value.shape)
    return whole_axis(ref, 0) if ref.dims else None


def stackable(ref: Ref) -> bool:
    """Whether the leading dimension of the view is a whole axis that can be scanned over."""
    if ref.sliced or is_per_use(ref.value) or any(i.at == "traced" for i in ref.stack):
        return False
    axis = leading_axis(ref)
    return axis is not None and not (is_qtensor(ref.value) and axis in ref.value.contracted)


def to_stack(ref: Ref) -> Ref:
    """The same view of a leaf whose stacked axis is in front: what a scan takes as `xs`."""
    axis, size = leading_axis(ref), ref.shape[0]
    assert axis is not None
    names = _renamed(ref, axis)["dims"]
    front = Atom(-len(ref.value.shape), 1, size)
    value = kept.move_to_front(ref.value, axis)
    # The scale of a "tensor" block may be one for the whole stack; a scan wants one for each slice.
    value = jax.tree.map(lambda a: jnp.broadcast_to(a, (size, *a.shape[1:])), value) if is_qtensor(value) else value
    return ref.replace(value=value, dims=((front,), *names[1:]))


def from_stack(stacked: Ref, original: Ref, by: int) -> Ref:
    """Inside the scan's body: the view of one slice, given the stacked view outside (`value` already sliced)."""
    axis = leading_axis(original)
    assert axis is not None
    index = Index(full_axis(original, axis), original.shape[0], "scanned", by)
    return stacked.replace(dims=stacked.dims[1:], stack=(*stacked.stack, index))
