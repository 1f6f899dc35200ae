"""Labels: which channels must change together. A union-find over numbers, kept flat, in numpy.

Every channel that a parameter produces gets a label; what the program computes from it carries the label on. Label 0 is
what can't change. Two labels that meet where both must change alike become one; a label that meets something that
would notice becomes 0.
"""

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components


class Labels:
    """A growing set of labels.

    Attributes:
      root: the label that stands for each label's class, the smallest of it; int64.
      mark: for each class a number that says what has happened to it, uint64: classes with the same number were
        treated alike, entry by entry, by everything that read them.
    """

    def __init__(self) -> None:
        self.root = np.zeros(1, np.int64)
        self.mark = np.zeros(1, np.uint64)

    def new(self, shape: tuple[int, ...]) -> np.ndarray:
        """Fresh labels."""
        count = int(np.prod(shape))
        ids = np.arange(len(self.root), len(self.root) + count)
        self.root = np.concatenate([self.root, ids])
        self.mark = np.concatenate([self.mark, np.zeros(count, np.uint64)])
        return ids.reshape(shape)

    def find(self, labels: np.ndarray) -> np.ndarray:
        """The class of each label."""
        return self.root[labels]

    def union(self, a: np.ndarray, b: np.ndarray) -> None:
        """Joins the classes of `a` and `b`, entry by entry (they broadcast)."""
        a, b = np.broadcast_arrays(self.root[a], self.root[b])
        differ = a != b
        if not differ.any():
            return
        pairs = _unique_pairs(a[differ], b[differ])
        nodes, ends = np.unique(pairs, return_inverse=True)
        ends = ends.reshape(2, -1)
        graph = coo_matrix((np.ones(ends.shape[1]), (ends[0], ends[1])), shape=(len(nodes), len(nodes)))
        count, part = connected_components(graph, directed=False)
        lowest = np.full(count, len(self.root))
        np.minimum.at(lowest, part, nodes)
        marks = np.zeros(count, np.uint64)
        np.add.at(marks, part, self.mark[nodes])
        self.mark[lowest] = marks
        table = np.arange(len(self.root))
        table[nodes] = lowest[part]
        self.root = table[self.root]

    def kill(self, labels: np.ndarray) -> None:
        """Nothing may change these."""
        self.union(labels, np.zeros((1,) * np.ndim(labels), np.int64))

    def note(self, labels: np.ndarray, key: np.ndarray, where: int) -> None:
        """Marks classes: at the place `where` (a number), entry by entry with a key that broadcasts."""
        labels, key = np.broadcast_arrays(self.root[labels], key)
        pairs = _unique_pairs(labels.ravel(), key.ravel())
        marks = _hash(pairs[1].astype(np.uint64), np.uint64(where))
        np.add.at(self.mark, pairs[0], marks)  # a sum: the order of what happened does not count


def _unique_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The columns of `[a, b]`, none of which is negative, each once, in order; int64 `[2, count]`."""
    width = int(b.max(initial=0)) + 1
    if (int(a.max(initial=0)) + 1) * width < 2**63:  # a pair is one number
        return np.stack(np.divmod(np.unique(a * width + b), width))
    return np.unique(np.stack([a, b]), axis=1)


def _hash(key: np.ndarray, where: np.uint64) -> np.ndarray:
    """splitmix64 of the pair."""
    with np.errstate(over="ignore"):
        x = key * np.uint64(0x9E3779B97F4A7C15) + where * np.uint64(0xD1B54A32D192ED03) + np.uint64(1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
