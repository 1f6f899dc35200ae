"""Attention, found in the jaxpr: softmax(q k) v, its keys and values on their way into the products.

What is looked for, in one level of control flow (calls are entered, so it may be spread over several):

    a product of two arrays, neither a parameter                      scores: q k
    ... exp of what is left of them after scales, masks, caps         weights
    ... summed along dimensions t that only one operand had           a softmax along t: that operand is the keys
    ... a product of the weights with an array, along t               that array is the values

Every array has a label that says which of its dimensions a weight made (the free axes of a matmul's parameter, the rows
of a lookup). Of the dimensions that the products only walk along, those are the heads; the others are the batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.trace import interpreter
from jquant.trace.dims import Sources, sources
from jquant.trace.origin import Role, roles_before
from jquant.trace.rearrange import is_ref
from jquant.trace.uses import find_use

Flags = tuple[bool | None, ...]

_EXP = frozenset(("exp", "exp2"))

class Product(NamedTuple):
    """A product of two arrays.

    Attributes:
      operands: both.
      numbers: dimension numbers of the equation.
      sides: for each dimension of the result the operand that alone has it (0 or 1), or None: both.
      summed: the sets of dimensions of the result along which exp of it was summed.
    """

    operands: tuple[Any, Any]
    numbers: Any
    sides: tuple[int | None, ...]
    summed: set[frozenset[int]]


class Scores(NamedTuple):
    """What was made of a product: for each dimension the product's, or None; and whether exp was taken."""

    product: Product
    dims: tuple[int | None, ...]
    exp: bool


class Known(NamedTuple):
    """What is known of an array.

    Attributes:
      value: the array itself, so that its identity stays its own.
      made: for each dimension whether a weight made it; None: in part.
      scores: what it has of a product, or None.
      by: what made it, or None: the equation, its first operand, and where that one's dimensions went.
    """

    value: Any
    made: Flags
    scores: Scores | None
    by: tuple[Any, Any, Sources | None] | None


class Found(NamedTuple):
    """An attention that was found.

    Attributes:
      softmax: the products whose softmax it takes, each with the dimensions along which.
      one_head: of "keys", "values" those for which it can't be told which dimensions are heads.
    """

    softmax: list[tuple[Product, frozenset[int]]]
    one_head: tuple[str, ...]

    @property
    def is_softmax(self) -> bool:
        """Whether the weights were summed along the tokens; known when all was traced."""
        return any(along in product.summed for product, along in self.softmax)


Observe = Callable[[jax.Array, jax.Array], Any]


class AttentionWatch:
    """Emits `observe(keys, values)`, both `[batch, kv_heads, tokens, head_dim]`, for each attention.

    Attentions of one level that read parts (along the tokens) of the same keys and values are one; it sees them whole.

    Args:
      observe: gives what is emitted, a pytree with a method `merge`.

    Attributes:
      found: by the name of what is emitted, in the order in which the model runs them. Complete once the function has
        been traced.
    """

    def __init__(self, observe: Observe, found: dict[Any, Found]):
        self.observe, self.found = observe, found
        self.known: dict[int, Known] = {}

    def ran(self, eqn: Any, args: list[Any], outs: list[Any], frame: interpreter.Frame) -> None:
        if eqn.primitive.name in interpreter.ENTER:
            return  # its equations were seen one by one
        shapes = [np.shape(a) for a in args]
        for out in outs:
            if is_ref(out) or any(out is a for a in args):
                continue
            where = sources(eqn, shapes, out.shape)
            made = self._made(eqn, args, where, out.ndim)
            by = (eqn, args[0], where[0]) if args else None
            self.known[id(out)] = Known(out, made, self._scores(eqn, args, where, out), by)
        if eqn.primitive.name == "dot_general" and not any(map(is_ref, args)):
            self._attention(eqn, args, frame)

    def entered(self, outside: Sequence[Any], inside: Sequence[Any]) -> None:
        for a, b in zip(outside, inside, strict=True):
            known = self.of(a)
            if known is not None and not is_ref(b):
                self.known[id(b)] = Known(b, known.made[len(known.made) - b.ndim :], None, None)

    def of(self, a: Any) -> Known | None:
        """What is known of an array, or None."""
        known = self.known.get(id(a))
        return known if known is not None and known.value is a else None

    # --- which dimensions a weight made ---

    def _made(self, eqn: Any, args: list[Any], where: list[Sources | None], ndim: int) -> Flags:
        if eqn.primitive.name in _FEATURES and find_use(eqn, args) is not None:
            feature = _FEATURES[eqn.primitive.name](eqn) % ndim
            return tuple(d == feature for d in range(ndim))
        flags: list[list[bool | None]] = [[] for _ in range(ndim)]
        for i, (a, source) in enumerate(zip(args, where, strict=True)):
            mine = self._flags(eqn, a, i)
            if mine is not None and source is not None:
                for votes, dims in zip(flags, source, strict=True):
                    votes.append(_mixed([mine[d] for d in dims]))
        return tuple(None if None in votes else any(votes) for votes in flags)

    def _flags(self, eqn: Any, a: Any, i: int) -> Flags | None:
        if not is_ref(a):
            known = self.of(a)
            return None if known is None else known.made
        name, ndim = eqn.primitive.name, len(a.shape)
        if name == "dot_general":
            shared = eqn.params["dimension_numbers"][1][i]  # the other operand has them too, and says what they are
            return tuple(d not in shared for d in range(ndim))
        if name == "gather":
            rows = eqn.params["dimension_numbers"].collapsed_slice_dims
            return tuple(d not in rows for d in range(ndim))
        return None

    # --- scores ---

    def _scores(self, eqn: Any, args: list[Any], where: list[Sources | None], out: Any) -> Scores | None:
        name = eqn.primitive.name
        mine = [(k.scores, w) for a, w in zip(args, where, strict=True) if (k := self.of(a)) is not None and k.scores]
        if name == "dot_general" and not any(map(is_ref, args)):
            product = None if any(s.exp for s, _ in mine) else _product(eqn, args, where)
            return None if product is None else Scores(product, tuple(range(out.ndim)), False)
        if not mine or any(s.product is not mine[0][0].product for s, _ in mine):
            return None
        if name == "dot_general":
            return _with_heads_mixed(eqn, args, mine[0][0], where)
        if len(np.shape(args[0])) != out.ndim and eqn.params.get("axes") is not None:
            if name == "reduce_sum" and mine[0][0].exp:
                gone = [mine[0][0].dims[d] for d in eqn.params["axes"]]
                mine[0][0].product.summed.add(frozenset(d for d in gone if d is not None))
            return None
        dims = _first_of([_moved(s.dims, w, out.ndim) for s, w in mine])
        return Scores(mine[0][0].product, dims, name in _EXP or any(s.exp for s, _ in mine))

    # --- attention ---

    def _attention(self, eqn: Any, args: list[Any], frame: interpreter.Frame) -> None:
        for which, weights in enumerate(args):
            known = self.of(weights)
            if known is not None and known.scores is not None and known.scores.exp:
                self._weighted(eqn, known.scores, which, args[1 - which], frame)

    def _weighted(self, eqn: Any, scores: Scores, which: int, values: Any, frame: interpreter.Frame) -> None:
        """The product of weights, operand number `which`, with values."""
        product, numbers = scores.product, eqn.params["dimension_numbers"]
        pairs = [(scores.dims[p], v) for p, v in zip(numbers[0][which], numbers[0][1 - which], strict=True)]
        pairs = [(d, v) for d, v in pairs if d is not None and product.sides[d] is not None]
        sides = {product.sides[d] for d, _ in pairs if d is not None}
        if len(sides) != 1:
            return
        (side,) = sides
        assert side is not None
        along = frozenset(d for d, _ in pairs if d is not None)
        keys = product.operands[side]
        keys, key_roles = self._origin(keys, _key_roles(product, side, along))
        values, value_roles = self._origin(values, _value_roles(numbers, 1 - which, [v for _, v in pairs], values.ndim))
        pair = ("attention", id(keys), id(values))
        if pair not in frame.known:
            name = (*frame.scope, id(eqn), "attention")
            (k, k_told), (v, v_told) = self._arranged(keys, key_roles), self._arranged(values, value_roles)
            interpreter.emit(frame, interpreter.Key(name, frame.stacked), self.observe(k, v))
            frame.known[pair] = ([keys, values], name)
            one_head = tuple(n for n, told in (("keys", k_told), ("values", v_told)) if not told)
            self.found[name] = Found([], one_head)  # of a second trace: the arrays of the first are no more
        self.found[frame.known[pair][1]].softmax.append((product, along))

    def _origin(self, a: Any, roles: tuple[Role, ...]) -> tuple[Any, tuple[Role, ...]]:
        """The array of which `a` is a rearrangement, copies for several query heads or a part of the tokens."""
        while (known := self.of(a)) is not None and known.by is not None:
            eqn, operand, where = known.by
            if where is None or is_ref(operand):
                break
            before = roles_before(eqn, np.shape(operand), a.shape, where, roles)
            if before is None:
                break
            a, roles = operand, before
        return a, roles

    def _arranged(self, a: Any, roles: tuple[Role, ...]) -> tuple[jax.Array, bool]:
        """`[batch, heads, tokens, channels]`, and whether the heads are known (if not, they are in the batch)."""
        heads = self._heads(a, roles)
        own = {r: [d for d, role in enumerate(roles) if role == r] for r in ("batch", "token", "channel")}
        groups = [[d for d in own["batch"] if d not in (heads or ())], heads or [], own["token"], own["channel"]]
        sizes = [math.prod(a.shape[d] for d in group) for group in groups]
        order = [d for group in groups for d in group]
        return jnp.asarray(a).transpose(order).reshape(sizes), heads is not None

    def _heads(self, a: Any, roles: tuple[Role, ...]) -> list[int] | None:
        walked = [d for d, role in enumerate(roles) if role == "batch" and a.shape[d] > 1]
        if not walked:
            return []
        known = self.of(a)
        made = (False,) * len(roles) if known is None else known.made
        # Where no weight made the channels either, what the dimensions are lies outside of what is seen.
        told = any(made[d] is not False for d, role in enumerate(roles) if role == "channel")
        if not told or any(made[d] is None for d in walked):
            return None
        return [d for d in walked if made[d]]


# Products other than dot_general with a parameter: the dimension of the result that the parameter makes.
_FEATURES: dict[str, Callable[[Any], int]] = {
    "conv_general_dilated": lambda eqn: eqn.params["dimension_numbers"].out_spec[1],
    "ragged_dot_general": lambda eqn: -1,
}


def _mixed(flags: Sequence[bool | None]) -> bool | None:
    """One flag for dimensions that became one."""
    return flags[0] if len(set(flags)) == 1 else None if flags else False


def _product(eqn: Any, args: list[Any], where: list[Sources | None]) -> Product | None:
    left, right = where
    assert left is not None and right is not None
    if not jnp.issubdtype(jnp.result_type(args[0]), jnp.floating):
        return None
    sides = tuple(None if a and b else 0 if a else 1 for a, b in zip(left, right, strict=True))
    return Product((args[0], args[1]), eqn.params["dimension_numbers"], sides, set())


def _with_heads_mixed(eqn: Any, args: list[Any], scores: Scores, where: list[Sources | None]) -> Scores | None:
    """Scores multiplied with a parameter along their heads ("talking heads", arXiv 2003.02436); None along others."""
    side = int(is_ref(args[0]))
    names = [scores.dims[d] for d in eqn.params["dimension_numbers"][0][side]]
    if not names or any(n is None or scores.product.sides[n] is not None for n in names):
        return None
    moved = zip(where[side] or (), _moved(scores.dims, where[side], len(where[side] or ())), strict=True)
    return scores._replace(dims=tuple(name if dims else names[0] for dims, name in moved))


def _moved(dims: tuple[int | None, ...], where: Sources | None, ndim: int) -> tuple[int | None, ...]:
    """Names of dimensions after an operation; those that it splits or joins lose theirs."""
    if where is None:
        return (None,) * ndim
    return tuple(dims[w[0]] if len(w) == 1 and where.count(w) == 1 else None for w in where)


def _first_of(names: Sequence[tuple[int | None, ...]]) -> tuple[int | None, ...]:
    """For each dimension the first name that an operand has for it."""
    return tuple(next((n for n in column if n is not None), None) for column in zip(*names, strict=True))


def _key_roles(product: Product, side: int, along: frozenset[int]) -> tuple[Role, ...]:
    (contract, batch), ndim = ([n[side] for n in product.numbers]), product.operands[side].ndim
    free = [d for d in range(ndim) if d not in (*contract, *batch)]
    first = product.sides.index(side)  # the free dimensions of an operand stand side by side in the result
    roles: list[Role] = ["batch"] * ndim
    for d in contract:
        roles[d] = "channel"
    for i, d in enumerate(free):
        if first + i in along:
            roles[d] = "token"
    return tuple(roles)


def _value_roles(numbers: Any, side: int, tokens: Sequence[int], ndim: int) -> tuple[Role, ...]:
    contract, batch = (n[side] for n in numbers)
    rest = lambda d: "batch" if d in (*contract, *batch) else "channel"
    return tuple("token" if d in tokens else rest(d) for d in range(ndim))  # type: ignore[misc]


def watching(observe: Observe, found: dict[Any, Found]) -> interpreter.Frame:
    """The top frame of a run in which attention is observed."""
    found.clear()
    return interpreter.Frame(watch=AttentionWatch(observe, found))

