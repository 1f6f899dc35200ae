"""A walk that is interrupted, for the tests of what goes on behind it."""

from collections.abc import Callable
from typing import Any

import pytest

import jquant.resume
from jquant.walk import Walk


def interrupt_walk(monkeypatch: pytest.MonkeyPatch, stop: int) -> list[int]:
    """Has the next walk interrupted in front of a stop, with its state kept at each. Returns the stops that begin."""
    monkeypatch.setattr(jquant.resume, "_SECONDS_BETWEEN_STATES", 0)
    run, calls = Walk._stop, []

    def interrupted(self, k, *args):
        if self.label != "quantizing":  # the walk of a fold, which begins anew
            return run(self, k, *args)
        calls.append(k)
        if calls == [*range(stop + 1)]:
            raise KeyboardInterrupt
        return run(self, k, *args)

    monkeypatch.setattr(Walk, "_stop", interrupted)
    return calls


def resumed(monkeypatch: pytest.MonkeyPatch, stop: int, run: Callable[[], Any]) -> Any:
    """What `run()` gives, called again after the walk in it was interrupted at a stop."""
    interrupt_walk(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    return run()
