"""Learned rotations of the residual stream and of the attention heads, merged into the weights."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core import memory
from jquant.core.errors import JQuantWarning
from jquant.core.method import Folding, Method
from jquant.core.text import call
from jquant.fold import cayley, objectives
from jquant.fold.network import network
from jquant.fold.objectives import Objective, Stacks, Turns, group_blocks
from jquant.fold.program import apply_fold
from jquant.fold.rotate import Ready, begun, folds_of, proven, rotated, start_matrix, without_gains
from jquant.fold.rotations import Block
from jquant.progress import Progress

_OBJECTIVES: dict[str, Callable[[Folding, Ready, Turns], Objective]] = {
    "network": network, "layers": objectives.layers,
}  # fmt: skip
_STEPS = {"network": 20, "layers": 60}
_BATCH = {"network": 1, "layers": 8}
_CHECKED = {"network": 8, "layers": None}


class Settings(NamedTuple):
    """How to learn; the fields are arguments of `learned_rotation`."""

    seed: int
    objective: str
    steps: int
    learning_rate: Any
    momentum: float
    batch: int
    checks: int


def learned_rotation(
    seed: int = 0, *, objective: str = "network", steps: int | None = None, learning_rate: Any = 1.5,
    momentum: float = 0.9, batch: int | None = None, checks: int = 2, stream: bool = True, heads: bool = True,
) -> Method:  # fmt: skip
    """SpinQuant's learned rotations (arXiv 2405.16406) R1 and R2, found in the jaxpr and merged into the weights.

    They start as those of `rotate(seed)` and are learned on the orthogonal group by Cayley steps, so that the model
    with its weights (and inputs, where the policy says so) rounded to nearest comes closer to the float model. The best
    by the objective is kept, the start included, and then folded and proven as `rotate` does: everything said there
    holds. Nothing is learned of what can't be proven. Needs calibration data, unless `steps` is 0, and logits for
    `objective="network"`. Chooses no codes: chain it, as in `chain(learned_rotation(), gptq())`.

    Args:
      seed: of the random signs of the start, and of the order in which parts are drawn.
      objective: "network", KL(float || rounded) over the batches, SpinQuant's but that it aims at the float model's
        predictions and not at the text; a step runs the network several times. Its gradient is taken segment
        by segment: in memory are the activations that cross the narrow places of the function (the residual stream,
        twice a layer), those of one segment, and logits of a few positions where nothing but entrywise operations is
        behind the product that makes them. A function without a narrow place is a warning. "layers", the relative
        squared error of the layers' outputs, tr(E H E^T) / tr(W H W^T), under the second moments of the float model's
        inputs; rounding of inputs is not seen. A step looks at a few layers; all Gram matrices are in a temporary
        file (n x n float32 for every distinct input).
      steps: how many; 0 is `rotate(seed)`, bit for bit. None for 20 of "network" and 60 of "layers", the numbers that
        were measured.
      learning_rate: a number, that falls linearly to zero as in the paper; an optax schedule; or any
        `optax.GradientTransformation`, of the gradients in the skew matrices `[k, n, n]` of the blocks of one size.
        They are those of the objective as a share of its start, so that a number means the same for any model.
      momentum: of the first two; as in SGD.
      batch: how many parts a step looks at: batches for "network" (default 1), inputs that weights share for "layers"
        (default 8).
      checks: how often the objective is measured after the start, evenly, the last time at the end: of "network" on
        the first 8 batches, of "layers" everywhere.
      stream: rotate what norms read (R1).
      heads: rotate the channels that no norm reads (R2).

    Raises:
      ValueError: a setting is out of range.
      JQuantError (when folding): the objective can't be measured: no logits, or no weight that is turned is quantized.
    """
    if objective not in _OBJECTIVES:
        raise ValueError(f'learned_rotation: objective must be "network" or "layers", not {objective!r}')
    steps = _STEPS[objective] if steps is None else steps
    if steps < 0 or checks < 1 or not 0 <= momentum < 1 or (batch is not None and batch < 1):
        raise ValueError(
            "learned_rotation: needs steps >= 0, checks >= 1, batch >= 1 and 0 <= momentum < 1, got "
            f"steps={steps}, checks={checks}, batch={batch}, momentum={momentum}"
        )
    _check_rate(learning_rate)
    how = Settings(seed, objective, steps, learning_rate, momentum, batch or _BATCH[objective], checks)

    def fold(job: Folding) -> Any:
        start: Callable[[Block], np.ndarray] = partial(start_matrix, seed)
        ready = begun(job, "learned_rotation", start, stream, heads, keep=not steps)
        if not (ready.blocks and steps):
            return rotated(ready, start)
        ready = without_gains(ready)
        job = job._replace(box=[ready.params])  # nothing holds the old ones
        memory.give_back()
        turns = group_blocks(ready.blocks)
        learned = learn(_OBJECTIVES[objective](job, ready, turns), turns, how)
        memory.give_back()
        matrix_of = _matrices(turns, learned, start)
        if learned is not None:
            ready = proven(ready, "learned_rotation", matrix_of, keep=False)
        folds, box = folds_of(ready, matrix_of), job.box
        del ready, job  # the box alone holds what is replaced
        return apply_fold(folds, box.pop())

    rate = learning_rate if isinstance(learning_rate, int | float) else _named(learning_rate)
    name = call(
        "learned_rotation", seed=(seed, 0), objective=(objective, "network"), steps=(steps, _STEPS[objective]),
        learning_rate=(rate, 1.5), momentum=(momentum, 0.9), batch=(how.batch, _BATCH[objective]), checks=(checks, 2),
        stream=(stream, True), heads=(heads, True),
    )  # fmt: skip
    return Method(name, None, folds=(fold,), fold_needs=frozenset({"gram"} if steps else ()))


def _named(rate: Any) -> str:
    return "an optax transformation" if hasattr(rate, "update") else getattr(rate, "__qualname__", "a schedule")


def _check_rate(rate: Any) -> None:
    if isinstance(rate, int | float) and not isinstance(rate, bool):
        if rate > 0:
            return
    elif callable(rate) or (hasattr(rate, "init") and hasattr(rate, "update")):
        return
    raise ValueError(
        "learned_rotation: learning_rate must be a positive number, an optax schedule or a GradientTransformation, not "
        f"{rate!r}"
    )


def _transformation(how: Settings) -> Any:
    """The optax transformation that makes steps of gradients."""
    import optax  # only here: it takes a second

    rate = how.learning_rate
    if hasattr(rate, "update"):
        return rate
    schedule = rate if callable(rate) else optax.linear_schedule(rate, 0.0, how.steps)
    return optax.sgd(schedule, momentum=how.momentum)


def learn(objective: Objective, turns: Turns, how: Settings) -> Stacks | None:
    """The best matrices that were met, or None where that is the start."""
    stacks = turns.stack(partial(start_matrix, how.seed))
    transformation = _transformation(how)
    state = transformation.init(jax.tree.map(jnp.zeros_like, stacks))
    step = _stepper(transformation, turns.ones)
    parts = _parts(objective.parts, how)
    measured = min(objective.parts, _CHECKED[how.objective] or objective.parts)
    total = lambda s: sum(float(objective.value(s, i)) for i in range(measured)) / measured
    best, least = None, total(stacks)
    begun = least
    with Progress(how.steps, "learning rotations", "steps") as progress:
        for k in range(1, how.steps + 1):
            loss, gradient = _mean([objective.gradient(stacks, next(parts)) for _ in range(how.batch)])
            stacks, state = step(stacks, [g / begun for g in gradient] if begun > 0 else gradient, state)
            note = f"{float(loss):.4g}"
            if k * how.checks // how.steps > (k - 1) * how.checks // how.steps:
                now = total(stacks)
                if not np.isfinite(now):
                    _warn_lost(k)
                    break
                if now < least:
                    best, least = stacks, now
                note = f"{least:.4g} of {begun:.4g} at the start"
            progress.step(note)
    return best


def _warn_lost(step: int) -> None:
    warnings.warn(
        f"learned_rotation: the objective is no number at step {step}; the best rotation before is used. Lower "
        "learning_rate", JQuantWarning, stacklevel=5,
    )  # fmt: skip


def _parts(count: int, how: Settings) -> Iterator[int]:
    """Numbers of parts, each once in every round, in random order."""
    rng = np.random.default_rng([how.seed, count])
    while True:
        yield from map(int, rng.permutation(count))


def _mean(found: list[tuple[jax.Array, Stacks]]) -> tuple[jax.Array, Stacks]:
    return jax.tree.map(lambda *a: sum(a[1:], a[0]) / len(a), *found)


def _stepper(transformation: Any, ones: list[bool]) -> Callable[[Stacks, Stacks, Any], tuple[Stacks, Any]]:
    """`(matrices, derivatives, state) -> (matrices, state)`, compiled."""

    @jax.jit
    def step(stacks: Stacks, gradient: Stacks, state: Any) -> tuple[Stacks, Any]:
        gradient = [cayley.tangent(g, r, keep) for g, r, keep in zip(gradient, stacks, ones, strict=True)]
        with jax.numpy_dtype_promotion("standard"):  # optax is not strict
            change, state = transformation.update(gradient, state, jax.tree.map(jnp.zeros_like, stacks))
        steps = [cayley.skew(u.astype(r.dtype), keep) for u, r, keep in zip(change, stacks, ones, strict=True)]
        return [cayley.moved(r, u) for r, u in zip(stacks, steps, strict=True)], state

    return step


def _matrices(
    turns: Turns, learned: Stacks | None, start: Callable[[Block], np.ndarray]
) -> Callable[[Block], np.ndarray]:
    """The learned matrix of a block, orthogonal in float64; the start itself where nothing better was found."""
    if learned is None:
        return start
    found = turns.of(learned)
    return lambda block: cayley.orthogonal(np.asarray(found(block)), block.ones)
