"""`find_sites`: every read of every parameter, found in the jaxpr."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.core.text import columns
from jquant.trace import compat, interpreter, view
from jquant.trace.function import Traced, trace_call
from jquant.trace.uses import Dot, Use
from jquant.trace.view import Ref


class Site(NamedTuple):
    """One use of one parameter. Axes are the leaf's own, negative.

    Attributes:
      path: the leaf's path.
      shape, dtype: the leaf's.
      kind: "dot", "lookup", "conv", "ragged_dot"; or "read", where something else reads the leaf and a quantized one
        would be dequantized.
      contracted: the axes that the use sums over (for a lookup: that a row holds).
      batch: axes that the use shares with its input (experts) or that are walked (scanned layers).
      input: number of the array that is the other operand; sites with the same number read the same array. -1: none.
      by: the primitive that reads it.
      note: what else there is to say: slices, the reason for a "read".
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    kind: str
    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    input: int
    by: str
    note: str

    @property
    def nbytes(self) -> int:
        """Bytes of the leaf in float."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def quantizable(self) -> bool:
        """Whether a quantized leaf is used here as it is, not dequantized first by something unknown."""
        return self.kind != "read"


class Sites(Sequence[Site]):
    """The sites of a function, in the order in which it reads them. Prints as a table."""

    def __init__(self, sites: Sequence[Site]):
        self._sites = tuple(sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __getitem__(self, i: Any) -> Any:
        return Sites(self._sites[i]) if isinstance(i, slice) else self._sites[i]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def by_path(self) -> dict[str, list[Site]]:
        """The sites of each leaf."""
        out: dict[str, list[Site]] = {}
        for site in self:
            out.setdefault(site.path, []).append(site)
        return out

    def of(self, path: str) -> list[Site]:
        """The sites of one leaf."""
        return self.by_path().get(path, [])

    def __repr__(self) -> str:
        rows = [("path", "shape", "contracted", "batch", "use", "MiB", "input", "note")]
        for s in self:
            size = f"{s.nbytes / 2**20:.2f}"
            group = str(s.input) if s.input >= 0 else ""
            rows.append((s.path, _axes(s.shape), _axes(s.contracted), _axes(s.batch), s.kind, size, group, s.note))
        return columns(rows)


def _axes(values: Sequence[int]) -> str:
    return "x".join(map(str, values)) if all(v >= 0 for v in values) else ",".join(map(str, values))


def full_axes(ref: Ref, axes: Sequence[int]) -> tuple[int, ...]:
    """Axes as the full leaf names them, ascending."""
    return tuple(sorted(view.full_axis(ref, a) for a in axes))


def batch_axes(use: Use) -> tuple[int, ...]:
    """Axes of the full leaf whose entries meet different inputs: the use's own and the stacked ones, ascending."""
    return tuple(sorted((*full_axes(use.ref, use.batch), *(i.axis for i in use.ref.stack))))


def input_key(use: Use) -> tuple[Any, ...]:
    """Equal for uses that read the same array in the same way, in one trace."""
    how = use.how
    extra: tuple[Any, ...] = ()
    if isinstance(how, Dot):
        atoms = how.contract_atoms
        sizes = tuple(a.size for a in atoms)
        order = tuple(sorted(range(len(atoms)), key=lambda i: (atoms[i].axis, -atoms[i].stride)))
        extra = (how.order_in, sizes, order, len(how.batch_atoms))
    stack = tuple((i.at, i.by) for i in use.ref.stack)
    return (use.kind, id(use.x), extra, stack)


class FindReader:
    """Records each read, and goes on with the float array."""

    inline, unroll = True, False

    def __init__(self) -> None:
        self.found: dict[Any, tuple[Any, Site]] = {}
        self.alive: list[Any] = []

    def use(self, use: Use, frame: interpreter.Frame) -> list[Any]:
        ref = use.ref
        self.alive.append(use.x)
        lost = [a for a in use.contracted if a in ref.sliced]
        note = _note(ref)
        kind = use.kind
        if lost:
            kind, note = "read", f"sliced along the contracted axis {full_axes(ref, lost)[0]}: dequantized there"
        if not jnp.issubdtype(ref.value.dtype, jnp.floating):
            kind, note = "read", f"{ref.value.dtype} is not quantized"
        self._add(use.eqn, ref, frame, kind, full_axes(ref, use.contracted), batch_axes(use), input_key(use), note)
        return compat.bind(use.eqn, *[a.array() if isinstance(a, Ref) else a for a in use.args])

    def read(self, ref: Ref, eqn: Any, frame: interpreter.Frame) -> Any:
        self._add(eqn, ref, frame, "read", (), tuple(i.axis for i in ref.stack), None, _reason(ref, eqn))
        return ref.array()

    def _add(self, eqn: Any, ref: Ref, frame: Any, kind: str, contracted: Any, batch: Any, key: Any, note: str) -> None:
        site = Site(ref.path, (), ref.value.dtype, kind, contracted, batch, -1, eqn.primitive.name, note)
        # One equation may read a leaf twice, as its weight and as something else.
        self.found[(*frame.scope, id(eqn), ref.path, kind)] = (key, site)

    def sites(self, shapes: dict[str, tuple[int, ...]]) -> Sites:
        numbers: dict[Any, int] = {}
        out = []
        for key, site in self.found.values():
            number = -1 if key is None or site.kind == "read" else numbers.setdefault(key, len(numbers))
            out.append(site._replace(shape=shapes[site.path], input=number))
        return Sites(out)


def _note(ref: Ref) -> str:
    words = []
    for index in ref.stack:
        how = f"[{index.at}]" if isinstance(index.at, int) else index.at
        words.append(f"axis {index.axis} {how}")
    if ref.sliced:
        words.append("a slice of axis " + ", ".join(map(str, full_axes(ref, ref.sliced))))
    return "; ".join(words)


def _reason(ref: Ref, eqn: Any) -> str:
    if eqn.primitive.name == "dot_general":
        return "read by a product along part of an axis: dequantized there"
    return f"read by {eqn.primitive.name}: dequantized there"


def find_sites(apply: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Sites:
    """Every place where `apply(params, *args, **kwargs)` reads a parameter.

    Traces the function once at the arguments' shapes; nothing is computed. `params` and `args` may hold
    `jax.ShapeDtypeStruct`s. The result prints as a table.

    Args:
      apply: a pure function of parameters and inputs: `model.apply` of linen, a function that merges an nnx state, any
        JAX function.
      params: a pytree of arrays; quantized leaves count as the floats that they stand for.
      *args, **kwargs: what `apply` takes after the parameters. Python scalars and strings stay static.

    Returns:
      Sites: one `Site` a read. Biases and norm gains are there too, as "read".

    Raises:
      TraceError: a leaf of `params` is no array.
    """
    return sites_of(trace_call(apply, params, args, kwargs))


def sites_of(traced: Traced) -> Sites:
    """The sites of a traced call."""
    reader = FindReader()

    def run(leaves: list[Any], arrays: list[Any]) -> None:
        refs = [view.new_ref(p, v) for p, v in zip(traced.paths, leaves, strict=True)]
        interpreter.run_all(traced.jaxpr, [*refs, *arrays], reader, interpreter.Frame())

    leaves = [compat.abstract(v) for v in traced.leaves]
    jax.eval_shape(run, leaves, [compat.abstract(a) for a in traced.arrays])
    return reader.sites({p: tuple(v.shape) for p, v in zip(traced.paths, leaves, strict=True)})
