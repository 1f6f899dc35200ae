"""What a recipe quantizes: the leaves that it names and a matmul or lookup reads."""

import math
import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp

from jquant.core.activation import Activation, Policy, split_policy
from jquant.core.errors import JQuantWarning, RecipeError
from jquant.core.format_type import Format, fitted
from jquant.core.paths import flatten_with_paths
from jquant.core.per_use import held
from jquant.core.qtensor import is_qtensor
from jquant.core.recipe import Recipe
from jquant.trace.sites import Site, Sites


class Target(NamedTuple):
    """A leaf to be quantized. Axes are negative.

    Attributes:
      path, format: which, and how it is stored.
      contracted: the axes that its matmuls contract.
      batch: the axes that are solved apart: experts, stacked layers.
      observable: some matmul reads it (a table that is only looked up meets no activations).
      activation: how the inputs of its matmuls are rounded, or None.
    """

    path: str
    format: Format
    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    observable: bool
    activation: Activation | None = None


def plan_targets(sites: Sites, params: Any, recipe: Recipe) -> dict[str, Target]:
    """The leaves that the recipe quantizes, by path.

    Raises:
      RecipeError: a pattern decides nothing, or gives a format to leaves that no matmul and no lookup reads.
    """
    flat, _ = flatten_with_paths(params)
    recipe.check([p for p, _ in flat])
    by_path = sites.by_path()
    targets, unread = {}, []
    for path, leaf in flat:
        rule = recipe(path)
        if rule is None or is_qtensor(held(leaf)):
            continue
        target = _target(path, leaf, rule, by_path.get(path, []))
        if target is not None:
            targets[path] = target
        elif jnp.ndim(held(leaf)) >= 2:
            unread.append(path)
    _check_rules(recipe, [p for p, _ in flat], targets)
    if unread:
        some = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
        warnings.warn(
            f"{len(unread)} leaves that the recipe names stay in float, no matmul or lookup reads them whole: {some}; "
            "find_sites says what reads them",
            JQuantWarning, stacklevel=3,
        )  # fmt: skip
    return targets


def _check_rules(recipe: Recipe, paths: list[str], targets: dict[str, Target]) -> None:
    used = {rule[0] for p in targets if (rule := recipe.rule(p))}
    for pattern, fmt in recipe.rules:
        if fmt is not None and pattern not in used:
            example = next(p for p in paths if (r := recipe.rule(p)) and r[0] == pattern)
            raise RecipeError(
                f"Recipe: {pattern!r} gives {fmt} to leaves that no matmul and no lookup reads, such as {example}; "
                "see find_sites for those that can be quantized"
            )


def _target(path: str, leaf: Any, rule: Format | Policy, sites: list[Site]) -> Target | None:
    usable = [s for s in sites if s.quantizable]
    if not usable or not jnp.issubdtype(jnp.result_type(held(leaf)), jnp.floating):
        return None
    if math.prod(jnp.shape(held(leaf))) == 0:
        warnings.warn(f"{path}: empty ({jnp.shape(held(leaf))}), kept as it is", JQuantWarning, stacklevel=4)
        return None
    products = [s for s in usable if s.kind != "lookup"]
    main = (products or usable)[0]
    batch = {a for s in (products or usable) if s.contracted == main.contracted for a in s.batch}
    fmt, activation = split_policy(rule)
    activation = activation if products else None
    axes = main.contracted, tuple(sorted(batch))
    return Target(path, fitted(fmt, jnp.shape(leaf), *axes), *axes, bool(products), activation)
