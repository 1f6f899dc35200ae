"""A line that says how far long work has come. Shown on a terminal, nowhere else."""

import os
import sys
import time
from collections.abc import Callable
from typing import TextIO


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def terminal_width(stream: TextIO) -> int:
    """Columns of the terminal behind a stream, 80 where it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):  # no descriptor, closed, no terminal
        return 80


class Progress:
    """Counts steps of work and draws a bar with the rate and the time left.

    Args:
      total: number of steps.
      label: what is being done.
      unit: name of the steps, for the rate.
      stream: where to draw; standard error by default. Nothing is drawn unless it is a terminal.
      clock: seconds, for tests.
      done: steps done by an earlier run; they don't count for the rate.
    """

    def __init__(
        self, total: int, label: str, unit: str = "it", stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic, done: int = 0,
    ):  # fmt: skip
        self.total, self.label, self.unit = max(total, 1), label, unit
        self.stream = sys.stderr if stream is None else stream
        self.clock, self.start, self.drawn = clock, clock(), -1.0
        self.done = self.before = done
        self.visible = bool(getattr(self.stream, "isatty", lambda: False)())

    def __enter__(self) -> "Progress":
        self._draw("")
        return self

    def __exit__(self, *exc: object) -> None:
        if self.visible:
            self.drawn = -1.0
            self._draw("")
            self.stream.write("\n")
            self.stream.flush()

    def step(self, note: str = "", steps: int = 1) -> None:
        """Counts `steps` more steps; `note` says what they were."""
        self.done += steps
        self._draw(note)

    def _draw(self, note: str) -> None:
        now = self.clock()
        if not self.visible or (0 <= now - self.drawn < 0.1 and self.done < self.total):
            return
        self.drawn = now
        # One column stays free: a full line would wrap, and the next one would not overwrite it.
        line = self.text(note, now - self.start, terminal_width(self.stream) - 1)
        self.stream.write("\r\x1b[2K" + line)
        self.stream.flush()

    def text(self, note: str, seconds: float, width: int = 120) -> str:
        """The line, `seconds` after the start, in at most `width` columns: the note gives way first, then the bar."""
        share = min(self.done / self.total, 1.0)
        rate = (self.done - self.before) / seconds if seconds > 0 else 0.0
        if self.done >= self.total:
            when = f"in {_clock(seconds)}"
        else:
            when = f"{_clock(seconds)} gone, {_clock((self.total - self.done) / rate) if rate > 0 else '-:--'} left"
        words = f"{share:4.0%}  {self.done}/{self.total} {self.unit}  {_rate(rate)}  {when}"
        room = width - len(self.label) - len(words) - 2
        line = f"{self.label} {_bar(share, min(room, 24))} {words}" if room >= 4 else f"{self.label} {words}"
        left = width - len(line) - 2
        note = note if len(note) <= left else "…" + note[1 - left :] if left > 8 else ""
        return f"{line}  {note}".rstrip()[:width]


def _bar(share: float, width: int) -> str:
    full = int(share * width)
    return "█" * full + "░" * (width - full)


def _rate(rate: float) -> str:
    return f"{rate:.1f}/s" if rate >= 1 or rate == 0 else f"{1 / rate:.1f} s each"
