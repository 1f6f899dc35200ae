"""Tables: aligned text, Markdown, and what they count."""

import io

import jax.numpy as jnp
import numpy as np

import jquant as jq
from jquant.report import (
    Row,
    Table,
    bits_per_weight,
    bytes_by_format,
    bytes_table,
    evaluation_table,
    layerless,
    megabytes,
    sites_table,
)

TABLE = Table(("name", ">count"), [("a", "1"), ("long name", "1000")])


def test_text_is_aligned():
    assert TABLE.text() == "name       count\n---------  -----\na              1\nlong name   1000"


def test_markdown():
    assert TABLE.markdown() == "| name | count |\n| --- | ---: |\n| a | 1 |\n| long name | 1000 |"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_show_is_plain_in_a_file_and_says_the_same_on_a_terminal(monkeypatch):
    file, terminal = io.StringIO(), Terminal()
    monkeypatch.setenv("COLUMNS", "80")
    TABLE.show(file)
    TABLE.show(terminal)
    assert file.getvalue() == TABLE.text() + "\n"
    assert all(cell in terminal.getvalue() for row in TABLE.rows for cell in row)


def test_show_works_without_rich(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    terminal = Terminal()
    TABLE.show(terminal)
    assert terminal.getvalue() == TABLE.text() + "\n"


def test_evaluations_side_by_side():
    gptq = Row("gptq", 169_788_672, 4.25, 29.97, 0.21312, 0.00488, 0.7731, 101.2)
    rows = [Row("float32", 538_060_032, 32.0, 24.461), gptq]
    table = evaluation_table(rows)
    assert table.names == ["model", "MB", "bits/weight", "perplexity", "KL", "top-1", "seconds"]
    assert table.rows[0] == ("float32", "538.1", "32.00", "24.46", "", "", "")
    assert table.rows[1] == ("gptq", "169.8", "4.25", "29.97", "0.2131 ± 0.0049", "77.3%", "101.2")
    assert "seconds" not in evaluation_table(rows[:1]).names
    assert max(map(len, table.text().splitlines())) <= 80


def tree():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(128, 16)), jnp.float32)
    apply = lambda p, x: x @ p["w"] + p["b"]
    params = {"w": w, "b": jnp.zeros(16)}
    return jq.quantize(apply, params, {"w": jq.INT4_G64}, jq.rtn(), [jnp.zeros((1, 128))]), apply


def test_bytes_by_format_count_codes_scales_and_floats():
    quantized, _ = tree()
    assert bytes_by_format(quantized) == [("int4-g64", 1, 2048, 1024 + 64), ("float32", 1, 16, 64)]
    assert bits_per_weight(quantized) == 4.25
    assert bits_per_weight({"b": quantized["b"]}) == 32
    assert bytes_table(quantized).rows[-1][:3] == ("total", "2", "2,064")


def test_sites_of_equal_layers_are_one_line():
    w = {str(i): {"k": jnp.zeros((4, 4)), "v": jnp.zeros((4, 4))} for i in range(3)}

    def apply(p, x):
        for i in range(3):
            x = x @ p[str(i)]["k"] + x @ p[str(i)]["v"]
        return x

    table = sites_table(jq.find_sites(apply, w, jnp.zeros((1, 4))), w)
    assert [row[:5] for row in table.rows] == [("*/k", "3", "4x4", "dot -2", "0"), ("*/v", "3", "4x4", "dot -2", "0")]


def test_layerless():
    assert layerless("layers/12/mlp/up/kernel") == "layers/*/mlp/up/kernel"
    assert layerless("3/w2/b1/0") == "*/w2/b1/*"


def test_megabytes():
    assert [megabytes(b) for b in (538_060_032, 1_234_567_890, 69_120, 0)] == ["538.1", "1,234.6", "0.069", "0.000"]
