"""Results that other threads make ahead of time are those of calls in order."""

import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jquant.fold.ahead import ahead

KEYS = st.lists(st.tuples(st.integers(0, 4)), max_size=12)


@settings(max_examples=50, deadline=None)
@given(KEYS, KEYS, st.integers(1, 3))
def test_whatever_was_foretold_each_call_gives_its_own_result(foretold, asked, times):
    with ahead(lambda i: ("made of", i), foretold, lambda key: 1) as get:
        for key in asked:
            for _ in range(times):
                assert get(*key) == ("made of", *key)


def test_what_is_asked_for_as_foretold_is_made_once_and_elsewhere():
    calls: list[tuple[int, threading.Thread]] = []
    keys = [(i,) for i in range(7)]
    with ahead(lambda i: calls.append((i, threading.current_thread())) or i, keys, lambda key: 1) as get:
        assert [(get(i), get(i)) for i in range(7)] == [(i, i) for i in range(7)]
    assert sorted(i for i, _ in calls) == list(range(7))
    assert threading.main_thread() not in {t for _, t in calls}


def test_large_results_do_not_pile_up():
    """At most one waits when two of them are too many."""
    begun: list[int] = []
    with ahead(begun.append, [(i,) for i in range(6)], lambda key: 2**23) as get:
        get(0)
        get(1)
        assert max(begun) <= 2


def test_an_error_comes_where_its_result_is_asked_for():
    def make(i: int) -> int:
        if i == 2:
            raise ValueError("two")
        return i

    with ahead(make, [(i,) for i in range(4)], lambda key: 1) as get:
        assert get(1) == 1
        with pytest.raises(ValueError, match="two"):
            get(2)
        assert get(3) == 3


def test_the_other_threads_work_in_64_bits():
    with ahead(lambda i: np.asarray(jax.numpy.asarray(np.float64(i) + 1e-12)), [(1,), (2,)], lambda key: 1) as get:
        assert get(1) == 1 + 1e-12 and get(2) == 2 + 1e-12
