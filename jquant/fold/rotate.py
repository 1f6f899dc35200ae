"""Random rotations of the residual stream and of the attention heads, merged into the weights."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jquant.core.method import Folding, Method
from jquant.core.text import call
from jquant.fold.flow import Flow
from jquant.fold.hadamard import random_rotation
from jquant.fold.info import Fold, Role
from jquant.fold.program import Program, apply_fold, prove, read_program, warn_refused
from jquant.fold.rotations import Block, find_rotations, rotate_array
from jquant.fold.scales import find_scales, scaling

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
        job = job._replace(params=fold_gains(job, "rotate"))  # nothing holds the old ones
        matrix_of = partial(start_matrix, seed)
        ready, good = begun(job, "rotate", matrix_of, stream, heads)
        return rotated(ready, good, matrix_of)

    return Method(call("rotate", seed=(seed, 0), stream=(stream, True), heads=(heads, True)), None, folds=(fold,))


def begun(
    job: Folding, name: str, matrix_of: Callable[[Block], np.ndarray], stream: bool, heads: bool
) -> tuple["Ready", list[Block]]:
    """Of a model whose gains are folded: what can be rotated, and the blocks that are proven with these matrices."""
    ready = find_blocks(job, stream, heads)
    good = proven(ready, name, matrix_of)
    if stream and not any(b.norm for b in good):
        job.miss(name, NO_STREAM)
    return ready, good


def start_matrix(seed: int, block: Block) -> np.ndarray:
    """The random rotation of a block, float64 `[size, size]`."""
    rng = np.random.default_rng([seed, int(block.labels[0])])
    return random_rotation(len(block.labels), rng, block.ones)


class Ready(NamedTuple):
    """A model that can be rotated.

    Attributes:
      params: its parameters, the gains of norms moved into their readers.
      program: of those.
      flow: the labels of their channels.
      blocks: what may be rotated.
    """

    params: Any
    program: Program
    flow: Flow
    blocks: list[Block]


def find_blocks(job: Folding, stream: bool, heads: bool) -> Ready:
    """The blocks of a model whose gains are folded: of residual streams, and of what no norm reads."""
    program = read_program(job.apply, job.params, job.batches[0])
    found = find_rotations(program.line, program.leaves)
    return Ready(job.params, program, found.flow, [b for b in found.blocks if (stream if b.norm else heads)])


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


def proven(ready: Ready, name: str, matrix_of: Callable[[Block], np.ndarray]) -> list[Block]:
    """The blocks whose rotation is proven to change no output; a warning for each other."""
    good, bad = prove(ready.program, lambda chosen: rotation(ready.flow, chosen, matrix_of), ready.blocks)
    warn_refused(name, bad, lambda b: f"{b.producers[0]} and what it shares {len(b.labels)} channels with")
    return good


def rotated(ready: Ready, chosen: list[Block], matrix_of: Callable[[Block], np.ndarray]) -> Any:
    """The parameters with some blocks rotated."""
    return apply_fold(rotation(ready.flow, chosen, matrix_of), ready.params) if chosen else ready.params


class _Gain(NamedTuple):
    """The gain of a norm: its role, its classes and their values."""

    role: Role
    classes: np.ndarray
    values: np.ndarray


def fold_gains(job: Folding, name: str) -> Any:
    """Moves the gains of norms into the weights that read them."""
    program = read_program(job.apply, job.params, job.batches[0])
    flow = find_scales(program.line, program.leaves)
    gains, refused = find_gains(program, flow)

    def make(chosen: list[_Gain]) -> Fold:
        scale = np.ones(len(flow.labels.root))
        for g in chosen:
            scale[g.classes] = 1 / g.values
        return scaling(flow, scale)

    good, bad = prove(program, make, gains)
    warn_refused(name, bad, lambda g: f"the gain {g.role.path}")
    for path, why in refused:
        job.miss(name, f"the gain {path} is left as it is: {why}")
    return apply_fold(make(good), job.params) if good else job.params


def find_gains(program: Program, flow: Flow) -> tuple[list[_Gain], list[tuple[str, str]]]:
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
        gains.append(_Gain(role, classes[alive], values[alive]))
    return gains, refused
