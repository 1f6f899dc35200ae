"""A fold changes no output: float64, before and after, to 1e-9 of the largest."""

import glob
import warnings

import jax
import numpy as np
import pytest

import jquant as jq
from jquant.core.method import Folding
from jquant.core.per_use import is_per_use
from jquant.fold.program import read_program
from jquant.fold.wide import cut_leaf, run_wide
from jquant.models import build
from jquant.trace.targets import plan_targets
from jquant.walk import observe
from tests.fold.models import BANK, MODELS
from tests.models.cases import CONFIGS, make_params, make_tokens

INT4 = jq.parse_format("int4-g5-asym")
METHODS = {
    "rotate": jq.rotate(seed=3),
    "awq": jq.awq(grid=4),
    "smoothquant": jq.smoothquant(0.7, everywhere=True),
    "smoothquant_searched": jq.smoothquant(None),
    "all": jq.chain(jq.smoothquant(), jq.rotate(), jq.awq(grid=3)),
}


_QUICK, _LONG = ("rotate", "smoothquant"), ("awq", "smoothquant_searched", "all")


def _slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def widened(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64) if np.issubdtype(a.dtype, np.floating) else a, tree)


def folded(method, apply, params, args):
    """What the method's folds do to the parameters; the leaves that the model reads in products are to be quantized."""
    sites = jq.find_sites(apply, params, *args).by_path()
    formats = {p: INT4 for p, s in sites.items() if any(x.quantizable for x in s)}

    for fold in method.folds:
        params = fold(job_of(apply, params, args, formats))
    return params


def job_of(apply, params, args, formats, activations=None):
    """What `quantize` gives a fold."""
    sites = jq.find_sites(apply, params, *args)
    targets = plan_targets(sites, params, jq.Recipe({glob.escape(p): f for p, f in formats.items()}))
    axes = {p: (t.contracted, t.batch) for p, t in targets.items()}

    def calibrate(params, paths, gram=False):
        return jq.calibrate(apply, params, [args], paths=paths, gram=gram)

    def observed(params, paths, needs, take):
        observe(apply, params, [args], axes, paths, needs, take)

    return Folding(apply, [params], [args], formats, calibrate, observed, activations or {})


def error(want, got):
    return np.max(np.abs(np.asarray(want) - np.asarray(got))) / np.max(np.abs(np.asarray(want)))


@pytest.mark.parametrize("model", [m for m in MODELS if m.name not in ("hidden_norm", "gpt2_nnx")], ids=repr)
@pytest.mark.parametrize(
    "method", [METHODS[k] for k in _QUICK] + [_slow(METHODS[k]) for k in _LONG], ids=lambda m: m.name
)
def test_models_in_float64(model, method):
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*: nothing in front", jq.JQuantWarning)
        if model.name in ("experts", "mlp"):
            warnings.filterwarnings("ignore", "rotate: no residual stream", jq.JQuantWarning)
        params, args = widened(model.params), widened(model.args)
        after = folded(method, model.apply, params, args)
        want, got = model.apply(params, *args), jq.quantized(model.apply)(after, *args)
        assert want.dtype == np.float64 and error(want, got) < 1e-9
    changed = [a is not b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(after, is_leaf=is_per_use))]
    needs_norm = method.name in ("rotate(seed=3)", "smoothquant(alpha=None)")
    assert any(changed) != (model.name == "mlp" and needs_norm)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", ["gpt2_nnx", "llama", "llama-tied-all-biases", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("method", ["rotate", _slow("all")])
def test_models_that_cast_to_float32(name, method):
    """So their equations are run in float64."""
    if name == "gpt2_nnx":
        apply, params, (tokens,), tied = BANK[name].apply, BANK[name].params, BANK[name].args, True
    else:
        apply, params, tokens = build(CONFIGS[name]), make_params(CONFIGS[name]), make_tokens(CONFIGS[name], 6)
        tied = CONFIGS[name].tied
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("error", jq.JQuantWarning)
        warnings.filterwarnings("ignore", "awq: nothing in front", jq.JQuantWarning)  # of GPT-2's GELU
        warnings.filterwarnings("ignore", "smoothquant: nothing in front", jq.JQuantWarning)
        after = folded(METHODS[method], apply, widened(params), (tokens,))
    program = read_program(apply, params, tokens)
    leaves = dict(zip(program.leaves, jax.tree.leaves(after, is_leaf=is_per_use), strict=True))
    assert sum(map(is_per_use, leaves.values())) == tied
    outs = [
        run_wide(program.small, lambda p, cuts, of=of: cut_leaf(of[p], cuts), program.arrays)[0]
        for of in (program.leaves, leaves)
    ]
    assert outs[0].dtype == np.float64 and error(*outs) < 1e-9


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_the_float64_run_is_the_model(model):
    program = read_program(model.apply, model.params, model.args)
    [wide] = run_wide(program.line, lambda p, cuts: cut_leaf(program.leaves[p], cuts), model.args)
    assert error(model.apply(model.params, *model.args), wide) < 1e-5


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_what_a_rotation_leaves_at_run_time(model):
    """Only a table that is looked up and multiplied becomes a PerUse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jq.JQuantWarning)
        after = folded(jq.rotate(), model.apply, model.params, model.args)
    flat = jax.tree_util.tree_flatten_with_path(after, is_leaf=is_per_use)[0]
    found = [
        jax.tree_util.keystr(k, simple=True, separator="/").removesuffix("/value") for k, v in flat if is_per_use(v)
    ]
    assert found == list(model.per_use)


def test_a_fold_that_is_none_is_not_applied():
    """The proof looks at numbers: channels that are nearly, not quite, the same to what reads them."""
    from jquant.fold.program import prove
    from jquant.fold.scales import find_scales, scaling

    model = BANK["mlp"]
    program = read_program(model.apply, model.params, model.args)
    flow = find_scales(program.line, program.leaves)
    alive = np.unique(flow.labels.root)[1:]

    def make(items):
        scale = np.ones(len(flow.labels.root))
        for item in items:
            scale[alive[item]] = 2.0 if item % 5 else -1.0  # a negative scale does not commute with relu
        return (scaling(flow, scale),)

    good, bad, made = prove(program, make, list(range(12)))
    assert [b.item for b in bad] == [0, 5, 10] and len(good) == 9 and all("float64" in b.why for b in bad)
    assert not made  # what the last run made may be no part of what was proven
