"""Random rotations of the residual stream and of the attention heads, merged into the weights."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jquant.core.method import Folding, Method
from jquant.core.paths import flatten_with_paths
from jquant.core.text import call
from jquant.fold.flow import Flow
from jquant.fold.hadamard import Factored, random_factors, random_rotation
from jquant.fold.info import Fold, Role
from jquant.fold.program import Program, apply_fold, edit, prove, read_program, warn_refused
from jquant.fold.rotations import Block, find_rotations, rotate_array
from jquant.fold.scales import find_scales, scaling
from jquant.fold.wide import cut_leaf

NO_STREAM = "no residual stream was found that could be rotated"


def rotate(seed: int = 0, *, stream: bool = True, heads: bool = True) -> Method:
    """QuaRot's rotations (arXiv 2404.00456) R1 and R2, found in the jaxpr and merged into the weights.

    Outliers of a few channels are spread over all of them by a random Hadamard matrix: the weights that write to the
    residual stream are multiplied by it and those that read from it by its inverse, after the gains of the norms in
    between have been moved into their readers (R1); and likewise, head by head, between the value and the output
    projection (R2). The float model stays the same function, nothing is left to do at run time, but for a tied
    embedding: it becomes a `PerUse`, whose two maps cost 8 n^2 bytes, n the width of the stream (2.7 MB for 576).

    Whatever is found is proven before it is used: float64 outputs equal to 1e-9. What can't be is left as it is, with a
    warning. Works with RMSNorm and LayerNorm (then the rotation keeps the vector of ones, so that the mean stays), in
    scanned layers, with fused and grouped weights. Chooses no codes: chain it, as in `chain(rotate(), gptq())`.

    Args:
      seed: of the random signs.
      stream: rotate what norms read (R1).
      heads: rotate the channels that no norm reads (R2).
    """

    def fold(job: Folding) -> Any:
        matrix_of = partial(start_factors, seed)
        return rotated(begun(job, "rotate", matrix_of, stream, heads), matrix_of)

    return Method(call("rotate", seed=(seed, 0), stream=(stream, True), heads=(heads, True)), None, folds=(fold,))


Matrix = np.ndarray | Factored


def start_matrix(seed: int, block: Block) -> np.ndarray:
    """The random rotation of a block, float64 `[size, size]`."""
    return random_rotation(len(block.labels), _rng(seed, block), block.ones)


def start_factors(seed: int, block: Block) -> Matrix:
    """The same as factors, where it has some."""
    return start_matrix(seed, block) if block.ones else random_factors(len(block.labels), _rng(seed, block))


def _rng(seed: int, block: Block) -> np.random.Generator:
    return np.random.default_rng([seed, int(block.labels[0])])


class Gain(NamedTuple):
    """The gain of a norm: its role, its classes and their values."""

    role: Role
    classes: np.ndarray
    values: np.ndarray


class Ready(NamedTuple):
    """A model that can be rotated.

    Attributes:
      params: its parameters.
      program: of those.
      scales: the labels of their channels under scales.
      gains: the gains of norms that are moved into their readers first.
      flow: the labels of their channels under rotations, once that is done.
      blocks: what may be rotated.
      made: leaves that a proof of all of this changed (see `prove`).
    """

    params: Any
    program: Program
    scales: Flow
    gains: list[Gain]
    flow: Flow
    blocks: list[Block]
    made: Mapping[str, Any] = MappingProxyType({})


def find_blocks(job: Folding, name: str, stream: bool, heads: bool) -> Ready:
    """The gains of a model's norms and the blocks: of residual streams, and of what no norm reads."""
    program = read_program(job.apply, job.params, job.batches[0])
    scales = find_scales(program.line, program.leaves)
    gains, refused = find_gains(program, scales)
    for path, why in refused:
        job.miss(name, f"the gain {path} is left as it is: {why}")
    # Whether a gain is one for all channels is asked of what it will be.
    paths = {r.path for r in scales.outs if r.kind == "read"} if gains else set()
    then = {p: edit((gain_fold(scales, gains),), p, cut_leaf(program.leaves[p], ())) for p in paths}
    found = find_rotations(program.line, {**program.leaves, **then})
    blocks = [b for b in found.blocks if (stream if b.norm else heads)]
    return Ready(job.params, program, scales, gains, found.flow, blocks)


def begun(
    job: Folding, name: str, matrix_of: Callable[[Block], Matrix], stream: bool, heads: bool, keep: bool = True
) -> Ready:
    """What can be rotated, and is proven with these matrices; with what the proof made of leaves if `keep`."""
    ready = proven(find_blocks(job, name, stream, heads), name, matrix_of, keep)
    if stream and not any(b.norm for b in ready.blocks):
        job.miss(name, NO_STREAM)
    return ready


def proven(ready: Ready, name: str, matrix_of: Callable[[Block], Matrix], keep: bool = True) -> Ready:
    """With those gains and blocks whose folds are proven to change no output; a warning for each other."""

    def make(items: list[Any]) -> tuple[Fold, ...]:
        return folds_of(_only(ready, items), matrix_of)

    good, bad, made = prove(ready.program, make, [*ready.gains, *ready.blocks], keep)
    warn_refused(name, bad, _said)
    return _only(ready, good)._replace(made=made)


def _only(ready: Ready, items: list[Any]) -> Ready:
    gains = [i for i in items if isinstance(i, Gain)]
    return ready._replace(gains=gains, blocks=[i for i in items if isinstance(i, Block)])


def _said(item: Any) -> str:
    if isinstance(item, Gain):
        return f"the gain {item.role.path}"
    return f"{item.producers[0]} and what it shares {len(item.labels)} channels with"


def folds_of(ready: Ready, matrix_of: Callable[[Block], Any]) -> tuple[Fold, ...]:
    """The folds of the gains and of the blocks."""
    gains = (gain_fold(ready.scales, ready.gains),) if ready.gains else ()
    return (*gains, rotation(ready.flow, ready.blocks, matrix_of)) if ready.blocks else gains


def gain_fold(flow: Flow, gains: list[Gain]) -> Fold:
    """The fold that makes gains one."""
    scale = np.ones(len(flow.labels.root))
    for g in gains:
        scale[g.classes] = 1 / g.values
    return scaling(flow, scale)


def rotation(flow: Flow, chosen: list[Block], matrix_of: Callable[[Block], Any]) -> Fold:
    """The fold that rotates blocks, each by its matrix (made once)."""
    matrices: dict[int, Any] = {}

    def matrix(i: int) -> Any:
        if i not in matrices:
            matrices[i] = matrix_of(chosen[i])
        return matrices[i]

    def change(a: Any, outs: np.ndarray | None, ins: np.ndarray | None) -> Any:
        for classes in (outs, ins):
            a = a if classes is None else rotate_array(a, classes, chosen, matrix)
        return a

    return Fold(flow, False, change)


def rotated(ready: Ready, matrix_of: Callable[[Block], Matrix]) -> Any:
    """The parameters after the folds of the gains and of the blocks, proven with these matrices."""
    return apply_fold(folds_of(ready, matrix_of), ready.params, ready.made)


def without_gains(ready: Ready) -> Ready:
    """The same model once the gains are moved, its blocks still as they were."""
    params = apply_fold((gain_fold(ready.scales, ready.gains),), ready.params) if ready.gains else ready.params
    leaves = dict(zip(ready.program.leaves, (v for _, v in flatten_with_paths(params)[0]), strict=True))
    return ready._replace(params=params, program=ready.program._replace(leaves=leaves), gains=[], made={})


def find_gains(program: Program, flow: Flow) -> tuple[list[Gain], list[tuple[str, str]]]:
    """Leaves that scale channels which only weights contract."""
    read = np.zeros(len(flow.labels.root), bool)
    for array in flow.ins.values():
        read[flow.labels.find(np.maximum(array, 0))] = True
    read[0] = False
    gains, refused = [], []
    for role in flow.outs:
        if role.kind != "read" or role.path not in flow.gains:
            continue
        a, b = flow.affine.get(role.path, (1.0, 0.0))
        classes = flow.labels.find(flow.outs[role])
        leaf = program.leaves[role.path]
        leaf = np.asarray(leaf, np.float64) if hasattr(leaf, "__array__") else np.full(leaf.shape, 2.0)
        values = np.broadcast_to(leaf * a + b, classes.shape)
        alive = read[classes]
        if not alive.any() or (values == values.ravel()[0]).all() and values.ravel()[0] == 1:
            continue
        if (values[alive] == 0).any():
            refused.append((role.path, "some of its entries are zero"))
            continue
        if len(np.unique(classes[alive])) < alive.sum():
            refused.append((role.path, "several of its entries scale one channel"))
            continue
        gains.append(Gain(role, classes[alive], values[alive]))
    return gains, refused
