"""`Method`: how weights are rounded. A pair of pure functions, composed by `chain`, as optax composes."""

import itertools
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from jquant.core.activation import Activation
from jquant.core.errors import JQuantWarning
from jquant.core.formats import BlockParams, Format
from jquant.core.side import Side
from jquant.core.stats import Stats

Notes = dict[str, jax.Array]


class Rounding(NamedTuple):
    """One weight (or a batch of them) on its way from floats to codes; what the solvers of a chain hand on.

    Attributes:
      rows: the float weight, `[batch, m, n]`: `batch` separate matrices of m rows along the contracted axes.
      params: scales and zero points chosen so far, `[batch, M, blocks]` (`BlockParams` says what M is), or None.
      codes: codes chosen so far, uint8 `[batch, m, n]`, or None.
      notes: diagnostics, small arrays `[batch]` by name ("dead_channels", "damping_added", ...): the driver turns them
        into warnings with the site's path.
      parts: how many of the rows belong to each of the weights that are solved as one matrix; empty for a single one.
      sides: for each of them the float matrix beside the codes, `left` `[batch, its rows, r]` and `right`
        `[batch, r, n]`, or None; empty for none at all.
      inputs: the statistics of what the codes will be multiplied with, for the methods that follow, where that is not
        the input itself: a side takes something out of it.
    """

    rows: jax.Array
    params: BlockParams | None = None
    codes: jax.Array | None = None
    notes: Notes = {}
    parts: tuple[int, ...] = ()
    sides: tuple[Side | None, ...] = ()
    inputs: Stats | None = None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first row of each weight, and the one behind its last."""
        ends = list(itertools.accumulate(self.parts or (self.rows.shape[1],)))
        return list(zip([0, *ends], ends))


Solver = Callable[[Rounding, Stats | None, Format], Rounding]


class Folding(NamedTuple):
    """What a fold is given.

    Attributes:
      apply: the function.
      box: its parameters, floats, alone in a list: a fold that takes them out frees each as it replaces it.
      batches: calibration data, at least one batch; perhaps shapes only.
      formats: path -> format, of the leaves that will be quantized.
      calibrate: `(params, paths) -> path -> Stats`, with Gram matrices where `gram=True`; all at once.
      observe: `(params, paths, needs, take)`: some statistics, unit by unit (a leaf, or a slice of a stacked one),
        given to `take` as soon as they are known, as `path -> at -> Stats` with `at` as in `trace.program.Unit`.
      activations: path -> how the inputs of its products are rounded, where they are.
    """

    apply: Callable[..., Any]
    box: list[Any]
    batches: list[Any]
    formats: Mapping[str, Format]
    calibrate: Callable[..., dict[str, Stats]]
    observe: Callable[..., None]
    activations: Mapping[str, Activation] = MappingProxyType({})

    @property
    def params(self) -> Any:
        """What is in the box."""
        return self.box[0]

    def miss(self, name: str, what: str) -> None:
        """Says in a warning what a fold did not find."""
        warnings.warn(f"{name}: {what}", JQuantWarning, stacklevel=3)


Fold = Callable[[Folding], Any]


class Method(NamedTuple):
    """How to quantize: what is done to the model before rounding, and to each weight.

    Attributes:
      name: for messages and reports, "gptq(act_order=True)".
      solve: what it does to one weight: `(rounding, stats, format) -> rounding`, pure and jit-able, batched over the
        leading axis, or None.
      folds: what it does to the model before rounding, in order: `Folding -> params`, the same function of the inputs.
      fold_needs: the statistics that its folds read, likewise; a rotation reads none.
      needs: the statistics that `solve` reads: a subset of {"gram", "absmax", "mean_abs", "peak", "cross"}; empty for
        methods without data. "cross" has the walk carry the float model's activations too.
      last: what `solve` does is for the codes that there are: nothing may round behind it.
      first: what `solve` does is for inputs and weights in float: nothing may round in front of it.
    """

    name: str
    solve: Solver | None
    needs: frozenset[str] = frozenset()
    folds: tuple[Fold, ...] = ()
    fold_needs: frozenset[str] = frozenset()
    last: bool = False
    first: bool = False

    @property
    def needs_data(self) -> bool:
        """It looks at calibration data; without, a batch of shapes is enough."""
        return bool(self.needs or self.fold_needs)


def chain(*methods: Method) -> Method:
    """Applies methods left to right: each sees the weight, the scales and the codes that the ones before it left.

    `chain(rtn(search=True), gptq())` rounds by GPTQ under the scales that the search chose. What methods do to the
    model (`rotate`, the scales of `awq`) is done before any of them rounds, in their order.

    Raises:
      ValueError: no method, or one that rounds behind one that must come last (`lowrank`), or in front of one that
        must come first (`lowrank_inputs`); or both of those, each of which has the one side that a weight can have.
    """
    if not methods:
        raise ValueError("chain: give at least one method, as in jquant.chain(jquant.gptq())")
    rounding = [m for m in methods if m.solve is not None]
    for first, then in zip(rounding, rounding[1:]):
        if first.last:
            raise ValueError(f"chain: {first.name} is for the codes that were chosen before it; put {then.name} first")
        if then.first:
            raise ValueError(f"chain: {then.name} is for weights that nothing has rounded; put {first.name} behind it")
    if rounding and rounding[0].first and rounding[-1].last:
        both = f"{rounding[0].name} and {rounding[-1].name}"
        raise ValueError(f"chain: {both} would both stand beside the codes, which have one side; leave one out")
    solvers = [m.solve for m in rounding if m.solve is not None]

    def solve(state: Rounding, stats: Stats | None, fmt: Format) -> Rounding:
        for step in solvers:
            state = step(state, stats if state.inputs is None else state.inputs, fmt)
        return state

    folds = tuple(f for m in methods for f in m.folds)
    name = " + ".join(m.name for m in methods)
    needs, fold_needs = (frozenset().union(*(getattr(m, k) for m in methods)) for k in ("needs", "fold_needs"))
    ends = {"last": any(m.last for m in methods), "first": any(m.first for m in methods)}
    return Method(name, solve if solvers else None, needs, folds, fold_needs, **ends)
