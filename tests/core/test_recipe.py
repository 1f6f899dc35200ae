"""Recipe: the first match decides, and a pattern that decides nothing is an error."""

import pytest

from jquant.core.errors import FormatError, JQuantError, RecipeError
from jquant.core.format_type import INT4_G64, INT8, NF4, Format
from jquant.core.recipe import Recipe, as_recipe, parse_recipe

PATHS = [
    "embed/embedding",
    "layers/0/attention/q/kernel",
    "layers/0/mlp/up/kernel",
    "layers/1/attention/q/kernel",
    "layers/1/mlp/up/kernel",
    "lm_head/kernel",
]


def test_the_first_match_wins():
    recipe = Recipe({"*mlp*": INT4_G64, "layers/1/*": NF4, "*": INT8})
    assert [recipe(p) for p in PATHS] == [INT8, INT8, INT4_G64, NF4, INT4_G64, INT8]
    assert recipe.rule("layers/1/mlp/up/kernel") == ("*mlp*", INT4_G64)
    turned = Recipe({"layers/1/*": NF4, "*mlp*": INT4_G64, "*": INT8})
    assert turned("layers/1/mlp/up/kernel") == NF4
    assert turned != recipe and hash(turned) != hash(recipe)


def test_none_and_no_match_keep_floats():
    recipe = Recipe({"*lm_head*": None, "layers*": INT8})
    assert recipe("lm_head/kernel") is None and recipe.rule("lm_head/kernel") == ("*lm_head*", None)
    assert recipe("embed/embedding") is None and recipe.rule("embed/embedding") is None


def test_patterns_are_those_of_fnmatch_with_case():
    recipe = Recipe({"layers/[0-2]/*/q/kernel": INT8, "embed/embeddin?": NF4})
    assert [recipe(p) for p in PATHS] == [NF4, INT8, None, INT8, None, None]
    assert recipe("layers/7/attention/q/kernel") is None
    assert Recipe({"LM_HEAD*": INT8})("lm_head/kernel") is None


def test_check_accepts_patterns_that_decide():
    Recipe({"*lm_head*": None, "*mlp*": INT4_G64, "*": INT8}).check(PATHS)
    Recipe({"*lm_head*": None, "*": INT8}).check(iter(PATHS))  # any iterable, read once
    Recipe({}).check(PATHS)


def test_a_pattern_that_matches_nothing_is_an_error_that_suggests():
    with pytest.raises(RecipeError, match=r"'\*attn/q\*' matches no parameter.*layers/0/attention/q/kernel"):
        Recipe({"*attn/q*": INT8, "*": INT8}).check(PATHS)
    with pytest.raises(RecipeError, match="Paths look like: .*embed/embedding"):
        Recipe({"zzzz": INT8}).check(PATHS)
    with pytest.raises(RecipeError, match="no leaf that a matmul reads"):
        Recipe({"*": INT8}).check([])


def test_a_pattern_in_the_shadow_of_earlier_ones_is_an_error():
    with pytest.raises(RecipeError, match=r"'\*mlp\*' decides nothing.*earlier patterns"):
        Recipe({"*": INT8, "*mlp*": INT4_G64}).check(PATHS)
    with pytest.raises(RecipeError, match=r"'\*up\*' decides nothing"):
        Recipe({"layers/0/*": INT8, "layers/1/*": NF4, "*up*": INT4_G64}).check(PATHS)


@pytest.mark.parametrize("rules", [{1: INT8}, {"*": "int8"}, {"*": 4}, {("a",): None}])
def test_wrong_rules_are_errors(rules):
    with pytest.raises(RecipeError, match="Recipe: "):
        Recipe(rules)


def test_recipes_are_values():
    rules = {"*lm_head*": None, "*": INT8}
    recipe = Recipe(rules)
    rules["*"] = NF4
    assert recipe("x") == INT8
    assert recipe == Recipe({"*lm_head*": None, "*": INT8}) and hash(recipe) == hash(Recipe(dict(recipe.rules)))
    assert repr(recipe) == "Recipe({'*lm_head*': None, '*': int8})"
    assert issubclass(RecipeError, JQuantError)


def test_as_recipe():
    recipe = Recipe({"*": INT8})
    assert as_recipe(recipe) is recipe and as_recipe({"*": INT8}) == recipe and as_recipe(INT8) == recipe
    with pytest.raises(RecipeError, match="not str"):
        as_recipe("int8")  # type: ignore[arg-type]


def test_parse_recipe_shorthand_keeps_what_the_model_has():
    assert parse_recipe("int4-g64", PATHS) == Recipe({"*embed*": None, "*lm_head*": None, "*": INT4_G64})
    assert parse_recipe("int4-g64", ["layers/0/kernel", "embed/w"]) == Recipe({"*embed*": None, "*": INT4_G64})
    assert parse_recipe("int8") == Recipe({"*": INT8})
    parse_recipe("int4-g64", iter(PATHS)).check(PATHS)


def test_parse_recipe_with_patterns_in_their_order():
    recipe = parse_recipe("*lm_head*=none, *mlp*=int4-g64,*=int8")
    assert recipe == Recipe({"*lm_head*": None, "*mlp*": INT4_G64, "*": INT8})
    assert parse_recipe("a=float,b=NF4-g64") == Recipe({"a": None, "b": NF4})


@pytest.mark.parametrize(
    ("text", "error"), [("int9", FormatError), ("a=int9", FormatError), ("a=,b=int8", RecipeError)]
)
def test_parse_recipe_errors(text, error):
    with pytest.raises(error):
        parse_recipe(text)


@pytest.mark.parametrize("text", ["*mlp*=int4-g64,*=int8", "*lm_head*=none,*=nf4-g32-f32"])
def test_parse_recipe_reads_its_own_formats(text):
    recipe = parse_recipe(text)
    again = ",".join(f"{p}={'none' if v is None else v}" for p, v in recipe.rules)
    assert parse_recipe(again) == recipe
    assert all(v is None or isinstance(v, Format) for _, v in recipe.rules)
