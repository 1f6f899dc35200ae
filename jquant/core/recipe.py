"""`Recipe`: which leaf gets which format. Patterns over paths, first match wins, None keeps floats."""

import difflib
import fnmatch
from collections.abc import Iterable, Mapping

from jquant.core.activation import Policy, parse_policy
from jquant.core.errors import RecipeError
from jquant.core.formats import Format

# What the shorthand "int4-g64" means for a language model: the head and the embedding keep floats.
_KEEP_FLOAT = ("*embed*", "*lm_head*")


class Recipe:
    """An ordered mapping from path patterns (`fnmatch`: `*`, `?`, `[...]`) to a `Format`, a `Policy` or None (floats).

    `Recipe({"*lm_head*": None, "*": INT4_G128})`. `*` also matches "/". A path that no pattern matches keeps floats.
    Immutable and hashable.

    Raises:
      RecipeError: a key is no string, or a value neither a Format, a Policy nor None.
    """

    def __init__(self, rules: Mapping[str, Format | Policy | None]):
        for pattern, value in rules.items():
            if not isinstance(pattern, str):
                raise RecipeError(f"Recipe: the pattern {pattern!r} must be a string, as in '*attention/q/kernel'")
            if value is not None and not isinstance(value, Format | Policy):
                raise RecipeError(
                    f"Recipe: {pattern!r} has {value!r}; write a Format (jquant.INT4_G128, parse_format('int4-g64')), "
                    "a Policy (jquant.W8A8), or None to keep floats"
                )
        self.rules = tuple(rules.items())

    def rule(self, path: str) -> tuple[str, Format | Policy | None] | None:
        """The first rule whose pattern matches `path`, or None."""
        return next((r for r in self.rules if fnmatch.fnmatchcase(path, r[0])), None)

    def __call__(self, path: str) -> Format | Policy | None:
        """The format (or policy) for `path`, or None where it stays in float."""
        rule = self.rule(path)
        return rule[1] if rule else None

    def check(self, paths: Iterable[str]) -> None:
        """Refuses patterns that decide nothing.

        Raises:
          RecipeError: a pattern matches no path, or every path that it matches was taken by an earlier pattern.
        """
        paths = list(paths)
        used = {rule[0] for p in paths if (rule := self.rule(p))}
        for pattern, _ in self.rules:
            if pattern in used:
                continue
            if any(fnmatch.fnmatchcase(p, pattern) for p in paths):
                raise RecipeError(
                    f"Recipe: {pattern!r} decides nothing, earlier patterns match all that it matches; put it first"
                )
            raise RecipeError(f"Recipe: {pattern!r} matches no parameter. {_suggest(pattern, paths)}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.rules == other.rules

    def __hash__(self) -> int:
        return hash(self.rules)

    def __repr__(self) -> str:
        return "Recipe({" + ", ".join(f"{p!r}: {v if v is None else str(v)}" for p, v in self.rules) + "})"


def _suggest(pattern: str, paths: list[str]) -> str:
    close = difflib.get_close_matches(pattern.replace("*", ""), paths, n=3, cutoff=0.3) or paths[:3]
    return "Paths look like: " + ", ".join(close) if close else "The parameters have no leaf that a matmul reads"


def as_recipe(recipe: "Recipe | Mapping[str, Format | Policy | None] | Format | Policy") -> Recipe:
    """A Recipe from a Recipe, a mapping, or one Format or Policy for everything."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Format | Policy):
        return Recipe({"*": recipe})
    if isinstance(recipe, Mapping):
        return Recipe(recipe)
    raise RecipeError(
        f"a recipe is a jquant.Recipe, a mapping of patterns, a Format or a Policy, not "
        f"{type(recipe).__name__}"
    )


def parse_recipe(text: str, paths: Iterable[str] = ()) -> Recipe:
    """A Recipe from the command line.

    "int4-g64" quantizes everything but embeddings and a head named `lm_head`; "*mlp*=int4-g64,*=int8" or
    "*lm_head*=none,*=int4" says each pattern, and "w8a8" or "int8+int8-max-asym" rounds the inputs of the matmuls too.

    Args:
      text: the recipe.
      paths: the paths of the model, so that the shorthand leaves out patterns that match none of them.

    Raises:
      RecipeError, FormatError: the text can't be read.
    """
    if "=" not in text:
        paths = list(paths)
        keep = {p: None for p in _KEEP_FLOAT if any(fnmatch.fnmatchcase(path, p) for path in paths)}
        return Recipe({**keep, "*": parse_policy(text)})
    rules: dict[str, Format | Policy | None] = {}
    for part in text.split(","):
        pattern, _, value = part.partition("=")
        if not value:
            raise RecipeError(f"recipe {text!r}: {part!r} should be PATTERN=FORMAT, as in '*mlp*=int4-g64'")
        rules[pattern.strip()] = None if value.strip().lower() in ("none", "float") else parse_policy(value)
    return Recipe(rules)
