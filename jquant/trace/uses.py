"""How an operation reads a parameter: which of the leaf's axes it contracts, and how its operands and its result are
brought to the order of the leaf ("canonical": batch axes, tokens, the axes the leaf keeps)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jquant.trace import view
from jquant.trace.view import Atom, Ref


class Dot(NamedTuple):
    """A dot_general read by its leaf's axes.

    Attributes:
      contracted, batch, free: the leaf's axes, each ascending; together all of them (but for those of size 1).
      order_in: permutation of the other operand: batch, its free dimensions, contracted.
      contract_atoms, batch_atoms: the leaf's atoms as the equation pairs them with the other operand's dimensions.
      free_atoms: the leaf's free atoms in the order of the view.
      free_shape: the view's free dimensions.
      weight_first: the parameter is the left operand.
    """

    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]
    order_in: tuple[int, ...]
    contract_atoms: tuple[Atom, ...]
    batch_atoms: tuple[Atom, ...]
    batch_shape: tuple[int, ...]
    free_atoms: tuple[Atom, ...]
    free_shape: tuple[int, ...]
    weight_first: bool

    def operand(self, x: jax.Array) -> jax.Array:
        """The other operand as `[*batch axes, tokens, n]`."""
        x = x.transpose(self.order_in)
        batch = [a.size for a in self.batch_atoms]
        contract = [a.size for a in self.contract_atoms]
        tokens = x.size // max(1, math.prod(batch) * math.prod(contract))
        x = x.reshape(*batch, tokens, *contract)
        b, c = len(batch), len(contract)
        order = [*_order(self.batch_atoms), b, *[b + 1 + i for i in _order(self.contract_atoms)]]
        x = x.transpose(order)
        lead = _axis_sizes(self.batch, self.batch_atoms)
        return x.reshape(*lead, tokens, math.prod(contract[:c]))

    def result(self, out: jax.Array, x_free: Sequence[int]) -> jax.Array:
        """`[*batch axes, tokens, *free axes]` as the equation's output."""
        batch, free = view.axis_order(self.batch_atoms), view.axis_order(self.free_atoms)
        out = out.reshape(*[a.size for a in batch], -1, *[a.size for a in free])
        b = len(batch)
        order = [batch.index(a) for a in self.batch_atoms]
        order += [b] + [b + 1 + free.index(a) for a in self.free_atoms]
        out = out.transpose(order).reshape(*self.batch_shape, *x_free, *self.free_shape)
        if not self.weight_first:
            return out
        nb, nx, nf = len(self.batch_shape), len(x_free), len(self.free_shape)
        return out.transpose([*range(nb), *range(nb + nx, nb + nx + nf), *range(nb, nb + nx)])


def _order(atoms: Sequence[Atom]) -> list[int]:
    return [list(atoms).index(a) for a in view.axis_order(atoms)]


def _axis_sizes(axes: Sequence[int], atoms: Sequence[Atom]) -> list[int]:
    return [math.prod(a.size for a in atoms if a.axis == axis) for axis in axes]


class Lookup(NamedTuple):
    """A gather of whole slices: `axis` of the leaf is looked up (`dim` of the view)."""

    axis: int
    dim: int


class Use(NamedTuple):
    """One operation that reads a parameter.

    Attributes:
      kind: "dot", "lookup", "conv" or "ragged_dot".
      eqn: the equation.
      args: its operands; `args[which]` is the Ref.
      contracted: the leaf's axes that it contracts (for a lookup: all but the one looked up).
      batch: the leaf's axes that its other operand has too (experts).
      how: a Dot or a Lookup; None for the others, which read the leaf as it is.
    """

    kind: str
    eqn: Any
    args: tuple[Any, ...]
    which: int
    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    how: Any

    @property
    def ref(self) -> Ref:
        return self.args[self.which]

    @property
    def x(self) -> Any:
        """The other operand of a product; the indices of a lookup."""
        return self.args[1 - self.which]


def find_use(eqn: Any, args: Sequence[Any]) -> Use | None:
    """The use that an equation makes of a Ref among `args`, or None where it is none that we know."""
    finder = _FINDERS.get(eqn.primitive.name)
    return finder(eqn, args) if finder else None


def _find_dot(eqn: Any, args: Sequence[Any]) -> Use | None:
    # Of two parameters the right one is the weight, the left one is made an array.
    for which in (1, 0):
        if isinstance(args[which], Ref):
            how = _dot(args[which], eqn.params["dimension_numbers"], which, eqn.invars[1 - which].aval.ndim)
            if how is not None:
                return Use("dot", eqn, tuple(args), which, how.contracted, how.batch, how)
    return None


def _dot(ref: Ref, numbers: Any, which: int, x_ndim: int) -> Dot | None:
    contract, batch = numbers
    wc, wb, xc, xb = contract[which], batch[which], contract[1 - which], batch[1 - which]
    free_dims = [d for i, d in enumerate(ref.dims) if i not in wc and i not in wb]
    c_atoms = [a for i in wc for a in ref.dims[i]]
    b_atoms = [a for i in wb for a in ref.dims[i]]
    contracted, batch_axes = _whole(ref, c_atoms), _whole(ref, b_atoms)
    if not contracted or batch_axes is None:
        return None
    x_free = [i for i in range(x_ndim) if i not in xc and i not in xb]
    free_atoms = [a for d in free_dims for a in d]
    free = tuple(sorted({a.axis for a in free_atoms}))
    shape = ref.shape
    return Dot(
        contracted, batch_axes, free, (*xb, *x_free, *xc), tuple(c_atoms), tuple(b_atoms),
        tuple(shape[i] for i in wb), tuple(free_atoms), tuple(math.prod(a.size for a in d) for d in free_dims),
        which == 0,
    )  # fmt: skip


def _whole(ref: Ref, atoms: Sequence[Atom]) -> tuple[int, ...] | None:
    """The axes that `atoms` cover, if each is covered whole."""
    axes = tuple(sorted({a.axis for a in atoms}))
    return axes if _axis_sizes(axes, atoms) == [ref.value.shape[a] for a in axes] else None


def _find_lookup(eqn: Any, args: Sequence[Any]) -> Use | None:
    ref, numbers, sizes = args[0], eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if not isinstance(ref, Ref) or isinstance(args[1], Ref) or len(numbers.start_index_map) != 1:
        return None
    dim = numbers.start_index_map[0]
    axis = view.whole_axis(ref, dim)
    others_whole = all(s == full for i, (s, full) in enumerate(zip(sizes, ref.shape, strict=True)) if i != dim)
    if axis is None or tuple(numbers.collapsed_slice_dims) != (dim,) or sizes[dim] != 1 or not others_whole:
        return None
    if numbers.operand_batching_dims:
        return None
    contracted = tuple(a for a in range(-len(ref.value.shape), 0) if a != axis)
    return Use("lookup", eqn, tuple(args), 0, contracted, (), Lookup(axis, dim)) if contracted else None


def lookup_axis(use: Use) -> int:
    """The dimension of a lookup's result that holds the rows; the first of them where it is several."""
    return use.eqn.params["dimension_numbers"].offset_dims[0]


def product_axis(use: Use) -> int | None:
    """The dimension of a product's other operand that meets the rows of a leaf, whole; None where it is several."""
    if use.kind != "dot" or len(use.contracted) != 1:
        return None
    contract, _ = use.eqn.params["dimension_numbers"]
    mine = contract[use.which]
    return contract[1 - use.which][0] if len(mine) == 1 and view.whole_axis(use.ref, mine[0]) is not None else None


def _is_identity(ref: Ref) -> bool:
    shape = tuple(ref.value.shape)
    return ref.dims == view.new_ref(ref.path, ref.value).dims and ref.shape == shape


def _find_conv(eqn: Any, args: Sequence[Any]) -> Use | None:
    ref = args[1]
    if not isinstance(ref, Ref) or isinstance(args[0], Ref) or not _is_identity(ref):
        return None
    spec = eqn.params["dimension_numbers"].rhs_spec
    contracted = tuple(sorted(d - len(spec) for d in spec[1:]))
    return Use("conv", eqn, tuple(args), 1, contracted, (), None)


def _find_ragged(eqn: Any, args: Sequence[Any]) -> Use | None:
    ref = args[1]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    if not isinstance(ref, Ref) or any(isinstance(args[i], Ref) for i in (0, 2)) or not _is_identity(ref):
        return None
    (lc, rc), (lb, _) = numbers.dot_dimension_numbers
    plain = len(lc) == 1 and not lb and tuple(numbers.lhs_ragged_dimensions) == (0,) and tuple(lc) == (1,)
    groups = tuple(numbers.rhs_group_dimensions)
    if not plain or groups != (0,) or len(ref.shape) != 3:
        return None
    return Use("ragged_dot", eqn, tuple(args), 1, (rc[0] - 3,), (-3,), None)


_FINDERS = {
    "dot_general": _find_dot,
    "gather": _find_lookup,
    "conv_general_dilated": _find_conv,
    "ragged_dot_general": _find_ragged,
}
