"""A line that says how far long work has come. Shown on a terminal, nowhere else."""

import sys
import time
from collections.abc import Callable
from typing import TextIO


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class Progress:
    """Counts steps of work and draws a bar with the rate and the time left.

    Args:
      total: number of steps.
      label: what is being done.
      unit: name of a step, for the rate.
      stream: where to draw; standard error by default. Nothing is drawn unless it is a terminal.
      clock: seconds, for tests.
    """

    def __init__(
        self, total: int, label: str, unit: str = "it", stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.total, self.label, self.unit = max(total, 1), label, unit
        self.stream = sys.stderr if stream is None else stream
        self.clock, self.start, self.done, self.drawn = clock, clock(), 0, -1.0
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
        """Counts `steps` more steps; `note` says what comes next."""
        self.done += steps
        self._draw(note)

    def _draw(self, note: str) -> None:
        now = self.clock()
        if not self.visible or (now - self.drawn < 0.1 and self.done < self.total):
            return
        self.drawn = now
        self.stream.write("\r\x1b[2K" + self.text(note, now - self.start))
        self.stream.flush()

    def text(self, note: str, seconds: float, width: int = 24) -> str:
        """The line, `seconds` after the start."""
        share = min(self.done / self.total, 1.0)
        full = int(share * width)
        bar = "█" * full + "░" * (width - full)
        rate = self.done / seconds if seconds > 0 else 0.0
        left = _clock((self.total - self.done) / rate) if rate > 0 else "-:--"
        line = f"{self.label} {bar} {share:4.0%}  {self.done}/{self.total} {self.unit}  {rate:.1f} {self.unit}/s"
        return f"{line}  {_clock(seconds)} gone, {left} left  {note}".rstrip()
