"""A user's mistake: one line that says what to do, the right exit code, no traceback."""

import shlex
import shutil

import pytest

from jquant.checkpoint import save
from jquant.cli import main

RTN = ["--recipe", "int8", "--method", "rtn"]


@pytest.fixture
def fails(files, tmp_path, capsys, monkeypatch):
    """`fails(code, words, *argv)`: the command ends with the code, and says the words in one line."""
    monkeypatch.chdir(files)

    def check(code, words, *argv):
        assert main([str(a) for a in argv]) == code
        said = capsys.readouterr().err
        [line] = [line for line in said.splitlines() if "error:" in line]
        assert line.startswith(f"jquant {argv[0]}: error: " if argv else "jquant: error: ")
        assert all(word in line for word in words), line
        assert "Traceback" not in said
        return said

    return check


@pytest.mark.parametrize(
    "words, argv",
    [
        (["does not exist", "rtn-search, "], ["--recipe", "int8", "--method", "foo"]),
        (["'rtnn' does not exist"], ["--recipe", "int8", "--method", "rtnn+gptq"]),
        (["rotat(seed=1", "does not exist"], ["--recipe", "int8", "--method", "rotat(seed=1"]),
        (["can't be read", "act_order=True"], ["--recipe", "int8", "--method", "gptq(act_order=)"]),
        (["unexpected keyword", "sed"], ["--recipe", "int8", "--method", "rotate(sed=1)+gptq"]),
        (["'g'", "int4-g64-asym"], ["--recipe", "int4-g", "--method", "rtn"]),
        (["element 'int9'", "int2"], ["--recipe", "int9", "--method", "rtn"]),
        (["PATTERN=FORMAT"], ["--recipe", "*mlp*=int4,int8", "--method", "rtn"]),
        (["needs data", "--calibration FILE"], ["--recipe", "int8"]),
        (["looks at no data", "leave out --calibration"], [*RTN, "--calibration", "text.txt"]),
        (["looks at no data"], [*RTN, "--resume", "work"]),
        (["--act-order", "for gptq"], [*RTN, "--act-order"]),
        (["damp >= 0"], ["--recipe", "int8", "--damp", "-1"]),
        (["trained on 64 tokens"], ["--recipe", "int8", "--calibration", "text.txt"]),
        (["must be 1 or more, not 0"], ["--recipe", "int8", "--samples", "0"]),
        (["invalid whole number value: 'x'"], ["--recipe", "int8", "--length", "x"]),
        (["--recipe"], []),
    ],
)
def test_quantize_usage(fails, words, argv):
    said = fails(2, words, "quantize", "model", "--out", "never", *argv)
    assert "usage:" in said or "'jquant quantize --help' shows" in said


def test_quantize_of_a_quantized_model(fails):
    fails(2, ["is quantized already"], "quantize", "saved", *RTN, "--out", "never")


def test_quantize_where_something_is(fails, tmp_path):
    fails(1, ["saved exists", "--overwrite"], "quantize", "model", *RTN, "--out", "saved")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    fails(1, ["no jquant checkpoint"], "quantize", "model", *RTN, "--out", tmp_path / "mine", "--overwrite")
    fails(1, ["text.txt exists"], "quantize", "model", *RTN, "--out", "text.txt")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "..."


@pytest.mark.parametrize("command", ["quantize", "inspect", "eval", "generate"])
def test_a_model_that_does_not_exist(fails, command):
    more = {"quantize": [*RTN, "--out", "never"], "generate": ["--prompt", "a"], "eval": ["--text", "text.txt"]}
    fails(1, ["nowhere does not exist", ".gguf file"], command, "nowhere", *more.get(command, []))


def test_a_folder_that_is_no_model(fails, tmp_path):
    fails(1, ["config.json does not exist"], "inspect", tmp_path)
    fails(1, ["text.txt is no .gguf file"], "inspect", "text.txt")


def test_calibration_texts(fails, tmp_path):
    command = ["quantize", "model", "--recipe", "int8", "--out", "never", "--length", "32", "--calibration"]
    fails(1, ["nowhere.txt: No such file"], *command, "nowhere.txt")
    (tmp_path / "latin").write_bytes("café".encode("latin-1"))
    fails(1, ["latin: not a text in UTF-8 (byte 3)"], *command, tmp_path / "latin")
    (tmp_path / "short").write_text("short")
    fails(1, ["5 tokens, fewer than one window of 32", "--length"], *command, tmp_path / "short")


def test_a_pattern_that_matches_nothing(fails):
    recipe = ["--recipe", "*atention*=int8", "--method", "rtn"]
    fails(1, ["'*atention*' matches no parameter", "attention"], "quantize", "model", *recipe, "--out", "never")
    fails(1, ["'*atention*' matches no parameter"], "inspect", "model", *recipe[:2])


def test_a_model_without_tokenizer(fails, files, tmp_path):
    shutil.copytree(files / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    fails(1, ["has no tokenizer", "tokenizer.json"], "generate", tmp_path / "bare", "--prompt", "a")


def test_eval_texts_and_references(fails, files, tmp_path):
    fails(2, ["--text FILE is needed"], "eval", "saved")
    fails(2, ["saved is a quantized model"], "eval", "saved", "--reference", "saved", "--text", "text.txt")
    shutil.copytree(files / "saved", tmp_path / "saved")
    save(tmp_path / "saved", {"a": 1}, metadata={"source": "/gone/model"}, overwrite=True)
    command = ["eval", tmp_path / "saved", "--text", "text.txt", "--length", "32"]
    fails(1, ["made from /gone/model, which is gone", "--reference MODEL"], *command)
    fails(1, ["without a model's config"], *command, "--reference", "model")


def test_a_damaged_folder(fails, files, tmp_path):
    shutil.copytree(files / "saved", tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_text("{}")
    fails(1, ["tokenizer.json", "bytes"], "generate", tmp_path / "saved", "--prompt", "a")


def test_inspect_of_a_saved_folder_takes_no_recipe(fails):
    fails(2, ["--recipe is for float models"], "inspect", "saved", "--recipe", "int8")


@pytest.mark.parametrize(
    "code, words, argv",
    [
        (2, ["--prompt is empty"], ["--prompt", ""]),
        (2, ["--temperature, such as 0.8"], ["--prompt", "a", "--top-k", "5"]),
        (2, ["--top-p 3.0 is not in (0, 1]"], ["--prompt", "a", "--temperature", "1", "--top-p", "3"]),
        (2, ["temperature -1.0 is negative"], ["--prompt", "a", "--temperature", "-1"]),
        (2, ["must be 1 or more"], ["--prompt", "a", "--max-tokens", "0"]),
        (1, ["--stop 'abc' is no single token"], ["--prompt", "a", "--stop", "abc"]),
    ],
)
def test_generate_settings(fails, code, words, argv):
    fails(code, words, "generate", "saved", *argv)


@pytest.mark.parametrize("argv", [[], ["foo"], ["quantize"], ["--foo"], ["quantize", "a", "--foo"]])
def test_argparse_errors_are_2(argv, capsys):
    assert main(argv) == 2
    assert "usage: jquant" in capsys.readouterr().err


def test_debug_shows_the_traceback(files, capsys):
    assert main(["inspect", "nowhere", "--debug"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "jquant inspect: error: nowhere does not exist" in said


def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setattr("jquant.cli.inspect.run", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "demo"])


COMMAND = "jquant quantize 'a b' --resume work"


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("resume", [[], ["--resume", "work"]])
def test_an_interruption_says_how_to_go_on(files, capsys, monkeypatch, resume):
    monkeypatch.chdir(files)
    monkeypatch.setattr("jquant.cli.quantize.jq.quantize", interrupt)
    monkeypatch.setattr("sys.argv", shlex.split(COMMAND))
    data = ["--calibration", "text.txt", "--length", "32", *resume]
    assert main(["quantize", "model", "--recipe", "int8", *data, "--out", "never"]) == 130
    said = capsys.readouterr().err
    if resume:
        assert said.endswith("interrupted; the same command goes on where it stopped:\n" + f"  {COMMAND}\n")
    else:
        assert "interrupted; nothing was saved. With --resume DIR" in said


def test_other_commands_are_just_interrupted(capsys, monkeypatch):
    monkeypatch.setattr("jquant.cli.inspect.run", interrupt)
    assert main(["inspect", "demo"]) == 130
    assert capsys.readouterr().err == "jquant inspect: interrupted\n"


def test_a_file_that_cannot_be_read_is_one_line(capsys, monkeypatch):
    def deny(args):
        raise PermissionError(13, "Permission denied", "secret.txt")

    monkeypatch.setattr("jquant.cli.inspect.run", deny)
    assert main(["inspect", "demo"]) == 1
    assert capsys.readouterr().err == "jquant inspect: error: secret.txt: Permission denied\n"
