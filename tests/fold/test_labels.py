"""The parts that carry labels: a union-find in numpy, and label arrays that are reshaped as values are."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jquant.core import kept
from jquant.fold import arrays
from jquant.fold.labels import Labels, _unique_pairs
from jquant.trace import view


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=15))
def test_union_find(pairs):
    labels, parts = Labels(), {i: {i} for i in range(13)}
    labels.new((12,))
    for a, b in pairs:
        labels.union(np.array([a]), np.array([b]))
        joined = parts[a] | parts[b]
        parts.update((i, joined) for i in joined)
    assert list(labels.root) == [min(parts[i]) for i in range(13)]


def test_killed_labels_are_label_zero():
    labels = Labels()
    a, b = labels.new((3,)), labels.new((3,))
    labels.union(a, b)
    labels.kill(b[:1])
    assert list(labels.find(a)) == [0, 2, 3] and list(labels.find(b)) == [0, 2, 3]


def test_marks_do_not_depend_on_the_order():
    def run(order):
        labels = Labels()
        a, b = labels.new((4,)), labels.new((4,))
        steps = [
            lambda: labels.note(a, np.arange(4) // 2, 5),
            lambda: labels.note(b, np.ones(4, int), 6),
            lambda: labels.union(a, b),
        ]
        for i in order:
            steps[i]()
        return labels.mark[labels.find(a)]

    want = run((0, 1, 2))
    assert want[0] == want[1] != want[2] == want[3]
    for order in ((1, 2, 0), (2, 0, 1), (2, 1, 0)):
        np.testing.assert_array_equal(run(order), want)


@settings(max_examples=60)
@given(st.data())
def test_a_reshape_of_labels_is_the_reshape_of_the_value(data):
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    full = [data.draw(st.booleans()) for _ in shape]
    labels = np.arange(np.prod([n if f else 1 for n, f in zip(shape, full)])).reshape(
        [n if f else 1 for n, f in zip(shape, full)]
    )
    target = list(data.draw(st.permutations(shape)))
    if len(target) > 1 and data.draw(st.booleans()):
        target = [target[0] * target[1], *target[2:]]
    found = arrays.reshape(labels, shape, target)
    assert found.ndim == len(target) and all(a in (1, b) for a, b in zip(found.shape, target))
    np.testing.assert_array_equal(np.broadcast_to(found, target), np.broadcast_to(labels, shape).reshape(target))


def test_labels_follow_a_view_of_a_leaf():
    leaf = kept.Later((4, 6, 5), np.float32)
    ref = view.transpose(view.reshape(view.new_ref("w", leaf), (2, 2, 6, 5)), (3, 0, 2, 1))
    w = np.arange(120).reshape(4, 6, 5)
    want = w.reshape(2, 2, 6, 5).transpose(3, 0, 2, 1)
    np.testing.assert_array_equal(arrays.arrange(ref, w), want)
    one = w[:, :1]  # labels that do not depend on the middle axis
    np.testing.assert_array_equal(np.broadcast_to(arrays.arrange(ref, one), want.shape)[:, :, 0], want[:, :, 0])
    cuts = ((-3, 1, 1), (-3,), (-1, 2, 2))
    np.testing.assert_array_equal(arrays.cut(w, cuts), w[1, :, 2:4])
    np.testing.assert_array_equal(arrays.cut(w[:1], cuts), w[0, :, 2:4])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=20), st.sampled_from([1, 2**33]))
def test_unique_pairs_are_the_set_in_order(pairs, large):
    """Also where two numbers do not go into one."""
    a, b = (np.array([p[i] for p in pairs], np.int64) * large for i in (0, 1))
    got = _unique_pairs(a, b)
    assert list(map(tuple, got.T.tolist())) == sorted({(i * large, j * large) for i, j in pairs})
