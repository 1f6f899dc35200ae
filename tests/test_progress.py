"""The progress line: nothing where nobody looks, and one line that never wraps where somebody does."""

import io

import pytest

from jquant.progress import Progress, terminal_width


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def lines(stream):
    """What was drawn, one entry a drawing."""
    return [part.removeprefix("\x1b[2K").rstrip("\n") for part in stream.getvalue().split("\r") if part]


@pytest.mark.parametrize("stream", [io.StringIO(), object()], ids=["a file", "no stream at all"])
def test_nothing_is_drawn_where_there_is_no_terminal(stream):
    with Progress(3, "counting", stream=stream) as progress:
        progress.step("note", 3)
    assert not isinstance(stream, io.StringIO) or stream.getvalue() == ""


def test_rate_and_time_left_on_a_terminal():
    stream, clock = Terminal(), Clock()
    with Progress(40, "counting", "sheep", stream, clock) as progress:
        clock.now = 5.0
        progress.step("Dolly", 10)
    first, second, _ = lines(stream)
    assert "0%  0/40 sheep" in first and "-:-- left" in first
    assert "25%  10/40 sheep  2.0/s  0:05 gone, 0:15 left" in second


def test_it_ends_with_the_time_taken_and_a_line_break():
    stream, clock = Terminal(), Clock()
    with Progress(4, "counting", "sheep", stream, clock) as progress:
        clock.now = 3700.0
        progress.step(steps=4)
    last = lines(stream)[-1]
    assert "100%  4/4 sheep" in last and "in 1:01:40" in last and "left" not in last
    assert stream.getvalue().endswith("\n")


def test_slow_steps_are_told_in_seconds_each():
    assert "12.0 s each" in _after(seconds=24, done=2)
    assert "2.0/s" in _after(seconds=1, done=2)


def _after(seconds, done, before=0):
    progress = Progress(100, "counting", stream=io.StringIO(), done=before)
    progress.step(steps=done)
    return progress.text("", seconds)


def test_steps_of_an_earlier_run_do_not_make_this_one_look_fast():
    text = _after(seconds=10, done=10, before=50)
    assert "60/100" in text and "1.0/s" in text and "0:40 left" in text


@pytest.mark.parametrize("width", [20, 40, 60, 79, 100, 200])
def test_the_line_never_exceeds_the_terminal(width):
    progress = Progress(9600, "quantizing", "steps", io.StringIO())
    progress.step(steps=4800)
    text = progress.text("layers/29/attention/q/kernel" * 2, 3661.0, width)
    assert len(text) <= width
    if width >= 79:
        assert "█" in text and "left" in text
    if width == 200:
        assert "layers/29" in text


def test_it_is_drawn_at_most_ten_times_a_second_but_the_last_step_always():
    stream, clock = Terminal(), Clock()
    with Progress(1000, "counting", stream=stream, clock=clock) as progress:
        for i in range(1000):
            clock.now = i / 1000
            progress.step()
    assert len(lines(stream)) <= 13
    assert "1000/1000" in lines(stream)[-1]


def test_an_error_leaves_the_cursor_on_a_new_line():
    stream = Terminal()
    with pytest.raises(KeyError), Progress(3, "counting", stream=stream):
        raise KeyError
    assert stream.getvalue().endswith("\n")


def test_a_stream_without_a_size_is_taken_to_be_80_wide():
    assert terminal_width(io.StringIO()) == terminal_width(object()) == 80
