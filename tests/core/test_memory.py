"""When freed memory goes back to the system."""

import math
import sys

import pytest

from jquant.core import memory


class Heap:
    """Counts what glibc is asked for; of what is resident, `live` stays."""

    def __init__(self, live: float):
        self.live = self.resident = live
        self.trimmed = 0

    def malloc_trim(self, pad: int) -> None:
        self.trimmed += 1
        self.resident = self.live


@pytest.fixture
def heap(monkeypatch):
    heap = Heap(1000)
    monkeypatch.setattr(memory, "_libc", lambda: heap)
    monkeypatch.setattr(memory, "_resident", lambda: heap.resident)
    monkeypatch.setattr(memory, "_kept", 0)
    memory.give_back()
    assert heap.trimmed == 1
    return heap


def test_without_slack_it_is_done_each_time(heap):
    memory.give_back()
    memory.give_back()
    assert heap.trimmed == 3


def test_with_slack_it_is_done_when_that_much_more_is_resident(heap):
    trimmed = []
    for more in (0, 60, 39, 0, 99, 1):
        heap.resident += more
        memory.give_back(100)
        trimmed.append(heap.trimmed - 1)
    assert trimmed == [0, 0, 0, 0, 1, 1]
    heap.live = heap.resident = 1100  # what lives has grown: from here on it counts anew
    memory.give_back(100)
    heap.resident += 50
    memory.give_back(100)
    assert heap.trimmed == 3


def test_where_the_system_does_not_say_what_is_resident_it_is_done_each_time(heap):
    heap.resident = heap.live = math.inf
    memory.give_back(100)
    memory.give_back(100)
    assert heap.trimmed == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux says what is resident")
def test_what_is_resident_grows_by_what_is_written():
    before = memory._resident()
    block = bytearray(b"x" * 2**25)
    assert 2**24 < memory._resident() - before < 2**27
    del block


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory, "_libc", lambda: None)
    memory.give_back()
    memory.give_back(100)
