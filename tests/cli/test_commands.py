"""The four commands on a tiny model: what they write, print and measure."""

import io
import json
import re
import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jquant as jq
from jquant.checkpoint import read_metadata
from jquant.cli import main
from jquant.cli.generate import Writer
from jquant.core.paths import flatten_with_paths


def call(capsys, *argv):
    """Exit code, standard output, standard error."""
    code = main([str(a) for a in argv])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_quantize_by_gptq_writes_a_folder_that_holds_everything(files, tmp_path, capsys):
    text, out = files / "text.txt", tmp_path / "new" / "out"
    data = ["--calibration", text, "--samples", 3, "--length", 32, "--batch", 2]
    code, shown, said = call(capsys, "quantize", files / "model", "--recipe", "*mlp/up*=int4-g16", *data, "--out", out)
    assert code == 0
    assert re.search(r"int4-g16 +2 ", shown) and re.search(r"total +21 ", shown)
    assert "loading" in said and "3 windows of 32 tokens" in said and f"saved to {out}" in said
    note = read_metadata(out)
    assert note["recipe"] == "*mlp/up*=int4-g16" and note["rules"] == [["*mlp/up*", "int4-g16"]]
    assert note["method"] == "gptq()" and note["source"] == str(files / "model")
    assert note["calibration"]["windows"] == 3 and len(note["calibration"]["sha256"]) == 64
    assert note["versions"]["jax"] == jax.__version__
    moved = shutil.move(out, tmp_path / "elsewhere")  # without the original, and anywhere
    model = jq.models.load(moved)
    assert model.config == jq.models.load(files / "model").config
    assert model.tokenizer.encode("naïve") == jq.models.load(files / "model").tokenizer.encode("naïve")
    kinds = {p: str(leaf.format) for p, leaf in flatten_with_paths(model.params)[0] if jq.is_qtensor(leaf)}
    assert kinds == {f"layers/{i}/mlp/up/kernel": "int4-g16" for i in (0, 1)}


@pytest.mark.slow(optimized=False)
def test_quantize_equals_the_library(files):
    model = jq.models.load(files / "model")
    recipe = jq.Recipe({"*embed*": None, "*lm_head*": None, "*": jq.parse_format("int4-g16")})
    expected = jq.quantize(model.apply, model.params, recipe, jq.rtn(), [np.zeros((1, 4), np.int32)])
    saved = jq.models.load(files / "saved")
    for (path, a), (_, b) in zip(flatten_with_paths(expected)[0], flatten_with_paths(saved.params)[0], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b), path
    tokens = np.arange(20, dtype=np.int32)[None]
    want = jq.quantized(model.apply)(expected, tokens)
    np.testing.assert_allclose(saved.apply(saved.params, tokens), want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow(optimized=False)
@pytest.mark.parametrize("recipe, static", [("w8a8", False), ("int8+fp8_e4m3-p99.9", True), ("*up*=w8a8-static", True)])
def test_policies_quantize_evaluate_and_are_shown(files, tmp_path, capsys, recipe, static):
    out, data = tmp_path / "out", ["--calibration", files / "text.txt", "--samples", 3, "--length", 32]
    command = ["quantize", files / "model", "--recipe", recipe, "--method", "rtn", "--out", out]
    if not static:  # a dynamic range needs no text
        assert "looks at no data" in call(capsys, *command, *data)[2]
    code, shown, said = call(capsys, *command, *(data if static else []))
    assert code == 0, said
    name = str(jq.parse_recipe(recipe.split("=")[-1])("x"))
    assert "+" in name and name in shown
    model = jq.models.load(out)
    assert name in {leaf.scheme for _, leaf in flatten_with_paths(model.params)[0] if jq.is_qtensor(leaf)}
    assert name in call(capsys, "inspect", out)[1]
    assert name in call(capsys, "inspect", files / "model", "--recipe", recipe)[1]
    code, shown, _ = call(capsys, "eval", out, "--text", files / "text.txt", "--windows", 2, "--length", 32)
    assert code == 0 and "KL" in shown
    if static:
        short = [a for a in command if a != "--out" and a != out]
        assert "needs data" in call(capsys, *short, "--out", tmp_path / "none")[2]


def test_quantize_overwrites_when_asked(files, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(files / "saved", out)
    command = ["quantize", files / "model", "--recipe", "int8", "--method", "rtn", "--out", out]
    code, _, said = call(capsys, *command)
    assert code == 1 and "--overwrite" in said
    assert call(capsys, *command, "--overwrite")[0] == 0
    assert read_metadata(out)["recipe"] == "int8"


def test_a_short_text_is_used_whole_and_that_is_said(files, tmp_path, capsys):
    data = ["--calibration", files / "text.txt", "--samples", 5000, "--length", 64, "--method", "rtn-weighted"]
    recipe = ["--recipe", "*0/mlp/up*=int8", "--batch", 99]
    code, _, said = call(capsys, "quantize", files / "model", *recipe, *data, "--out", tmp_path / "o")
    windows = len((files / "text.txt").read_bytes()) // 64
    assert code == 0 and f"holds {windows} windows of 64 tokens; all are used" in said
    assert read_metadata(tmp_path / "o")["calibration"]["windows"] == windows


def evaluation(capsys, files, *argv):
    code, shown, _ = call(
        capsys, "eval", *argv, "--text", files / "text.txt", "--windows", 3, "--length", 32, "--format", "json"
    )
    assert code == 0
    return json.loads(shown)


def test_eval_compares_a_folder_with_the_model_it_was_made_from(files, capsys):
    reference, saved = evaluation(capsys, files, files / "saved")
    assert (reference["name"], saved["name"]) == (str(files / "model"), str(files / "saved"))
    model, quantized = jq.models.load(files / "model"), jq.models.load(files / "saved")
    windows = jq.windows(model.tokenizer.encode((files / "text.txt").read_text(encoding="utf-8")), 32, 3)
    found = jq.evaluate(model.apply, model.params, quantized.params, windows)
    assert (saved["kl"], saved["kl_stderr"], saved["top1"]) == found[:2] + (found.top1_agreement,)
    assert saved["kl"] > 0 and reference["kl"] is None and reference["perplexity"] == found.perplexity_reference
    assert saved["nbytes"] == found.bytes < reference["nbytes"] and reference["bits"] == 32 > saved["bits"] > 4


def test_eval_of_a_float_model_alone_gives_its_perplexity(files, capsys):
    [only] = evaluation(capsys, files, files / "model")
    assert only["perplexity"] > 1 and only["kl"] is None


def test_eval_of_a_float_model_against_its_copy_gives_kl_zero(files, tmp_path, capsys):
    shutil.copytree(files / "model", tmp_path / "copy")
    _, copy = evaluation(capsys, files, tmp_path / "copy", "--reference", files / "model")
    assert copy["kl"] == copy["kl_stderr"] == 0 and copy["top1"] == 1


def test_eval_tables(files, capsys):
    options = ["--text", files / "text.txt", "--windows", 1, "--length", 16]
    _, text, _ = call(capsys, "eval", files / "saved", *options)
    _, markdown, _ = call(capsys, "eval", files / "saved", *options, "--format", "markdown")
    assert text.splitlines()[0].split() == ["model", "MB", "bits/weight", "perplexity", "KL", "top-1"]
    assert "±" in text and len(text.splitlines()) == 4
    assert all(line.startswith("| ") for line in markdown.splitlines()) and len(markdown.splitlines()) == 4


def test_inspect_shows_equal_layers_in_one_line(files, capsys):
    code, shown, _ = call(capsys, "inspect", files / "model")
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line}
    assert code == 0
    assert lines["layers/*/attention/q/kernel"] == ["2", "32x32", "dot", "-2", "1", "float32", "0.008"]
    x = {name: lines[f"layers/*/{name}/kernel"][4] for name in ("attention/q", "attention/v", "mlp/gate", "mlp/up")}
    assert x["attention/q"] == x["attention/v"] != x["mlp/gate"] == x["mlp/up"]
    assert lines["norm/scale"][2:4] == ["read:", "mul"]
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_inspect_with_a_recipe_tells_the_bytes_that_quantizing_gives(files, capsys):
    _, planned, _ = call(capsys, "inspect", files / "model", "--recipe", "int4-g16")
    _, saved, _ = call(capsys, "inspect", files / "saved")
    assert planned.split("\n\n")[-1] == saved.split("\n\n")[-1]
    assert planned.split("\n\n")[0] == saved.split("\n\n")[1]
    assert "int4-g16" in planned


def test_inspect_tells_where_a_saved_folder_came_from(files, capsys):
    _, shown, _ = call(capsys, "inspect", files / "saved")
    assert f"made from:   {files / 'model'}\nrecipe:      int4-g16\nmethod:      rtn()\nwith:        jax" in shown


def test_inspect_all_lists_every_layer(files, capsys):
    _, shown, _ = call(capsys, "inspect", files / "model", "--all")
    assert "layers/0/mlp/up/kernel" in shown and "layers/1/mlp/up/kernel" in shown


def generate(capsys, files, *argv, model="saved"):
    return call(capsys, "generate", files / model, "--max-tokens", 12, *argv)


@pytest.mark.slow(optimized=False)
def test_generate_streams_what_the_library_generates(files, capsys):
    code, shown, said = generate(capsys, files, "--prompt", "It was")
    model = jq.models.load(files / "saved")
    ids = model.tokenizer.encode("It was")
    done = jq.models.generate(model.apply, model.params, ids, model.config, max_tokens=12, stop_ids=(256,))
    assert code == 0 and shown == model.tokenizer.decode([*ids, *done.tokens[0]]) + "\n"
    assert re.search(r"prompt: 6 tokens, \d+ tokens/s; new: 12 tokens, [\d.]+ tokens/s", said)


@pytest.mark.slow(optimized=False)
def test_generate_samples_by_seed(files, capsys):
    warm = ["--prompt", "It", "--temperature", "1.5", "--top-k", "200", "--top-p", "0.99"]
    one, again, other = (generate(capsys, files, *warm, "--seed", seed)[1] for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.slow(optimized=False)
def test_generate_reads_the_prompt_from_standard_input(files, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.read", lambda: "It was", raising=False)
    assert generate(capsys, files, "--prompt", "-")[1] == generate(capsys, files, "--prompt", "It was")[1]


def test_generate_stops_at_a_token_and_does_not_write_it(files, capsys):
    model = jq.models.load(files / "saved")
    first = model.tokenizer.decode(
        jq.models.generate(model.apply, model.params, [1, 2], model.config, max_tokens=1).tokens[0]
    )
    prompt = model.tokenizer.decode([1, 2])
    if first.isascii():
        assert generate(capsys, files, "--prompt", prompt, "--stop", first)[1] == prompt + "\n"


def test_a_character_of_several_tokens_is_written_when_it_is_whole(files, capsys):
    tokenizer = jq.models.load(files / "model").tokenizer
    stream, steps = io.StringIO(), []
    ids = tokenizer.encode("a ☃b")
    writer = Writer(tokenizer, ids[:1], [256], stream)
    for i in [*ids[1:], 256]:
        writer(np.array([i]))
        steps.append(stream.getvalue())
    assert steps == [" ", " ", " ", " ☃", " ☃b", " ☃b"]
    writer(np.array([tokenizer.encode("☃")[0]]))
    writer.close()
    assert stream.getvalue() == " ☃b\N{REPLACEMENT CHARACTER}\n"


@pytest.mark.slow
def test_on_the_demo_model_gptq_beats_round_to_nearest(tmp_path, capsys):
    pytest.importorskip("gguf")
    data = ["--samples", 8, "--length", 256, "--batch", 4]
    for name, more in {"rtn": [], "gptq": data}.items():
        code, _, said = call(
            capsys, "quantize", "demo", "--recipe", "int4-g64", "--method", name, *more, "--out", tmp_path / name
        )
        assert code == 0, said
    code, shown, said = call(
        capsys, "eval", tmp_path / "rtn", tmp_path / "gptq", "--windows", 2, "--length", 256, "--format", "json"
    )
    assert code == 0, said
    reference, rtn, gptq = json.loads(shown)
    assert gptq["kl"] + gptq["kl_stderr"] < rtn["kl"] - rtn["kl_stderr"] and gptq["top1"] > rtn["top1"]
    assert reference["nbytes"] > 3 * gptq["nbytes"] and gptq["bits"] == 4.25


@pytest.mark.slow(optimized=False)
def test_generate_fits_the_cache_to_a_text(files, capsys):
    """As the library does with the text's first windows; a cache that rounds no keys has nothing to fit."""
    name = "keys=int4-g8-asym-rot,values=fp8_e4m3-tensor"
    fit = ["--cache", name, "--cache-text", files / "text.txt"]
    code, shown, said = generate(capsys, files, "--prompt", "It was", *fit)
    model = jq.models.load(files / "saved")
    ids = model.tokenizer.encode("It was")
    start = model.tokenizer.encode((files / "text.txt").read_text(encoding="utf-8"))[: 8 * 64]
    text = list(np.asarray(start, np.int32).reshape(8, 1, 64))
    ease = jq.models.key_settings(model.params, model.config, text)
    scales = jq.models.static_scales(model.params, model.config, text, name, **ease)
    cache = jq.models.init_cache(model.config, 1, len(ids) + 11, name, **ease, **scales)
    done = jq.models.generate(model.apply, model.params, ids, cache=cache, max_tokens=12, stop_ids=(256,))
    assert code == 0 and "8 x 64 tokens" in said
    assert shown == model.tokenizer.decode([*ids, *done.tokens[0]]) + "\n"
    code, _, said = generate(capsys, files, "--prompt", "It", "--cache-text", files / "text.txt")
    assert code == 2 and "rounds no keys" in said
    code, _, said = generate(capsys, files, "--prompt", "It", "--cache", "kivi4", "--cache-text", files / "text.txt")
    assert code == 2 and "nothing of it is fitted to a text" in said


@pytest.mark.slow
def test_the_example_of_a_fitted_cache_writes_what_generate_does(files, capsys, monkeypatch):
    """Quantized weights, a cache fitted to a text; the example stops half-way and goes on from what it saved."""
    given = ["--prompt", "It was", "--cache", "keys=int4-g8-asym-rot,values=fp8_e4m3-tensor,sinks=2"]
    text = str(files / "text.txt")
    code, shown, _ = generate(capsys, files, *given, "--cache-text", text)
    model = ["--model", str(files / "saved"), "--text", text, "--length", "64", "--windows", "8", "--tokens", "12"]
    monkeypatch.setattr("sys.argv", ["fitted_cache", *given, *model])
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "fitted_cache.py"), run_name="__main__")
    assert code == 0 and capsys.readouterr().out == shown
