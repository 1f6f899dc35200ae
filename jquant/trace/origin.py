"""Back from an operand of attention to the array that a cache would hold.

What stands between is looked through where it only moves numbers, copies them for several query heads, or takes a part
of the tokens.
"""

from typing import Any, Literal

import jax.numpy as jnp

from jquant.trace.dims import Sources

# What a dimension of keys or values is to the products: walked along by both, that of the softmax, or contracted with
# queries (of values: that of the result).
Role = Literal["batch", "token", "channel"]

_LOOK_THROUGH = frozenset((
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "convert_element_type", "slice", "dynamic_slice", "gather",
    "tile", "copy", "copy_p", "sharding_constraint", "stop_gradient", "name",
))  # fmt: skip
# The dimensions that these may make shorter, or longer.
_RESIZED: dict[str, Role] = {"slice": "token", "dynamic_slice": "token", "tile": "batch"}


def roles_before(
    eqn: Any, before: tuple[int, ...], after: tuple[int, ...], where: Sources, roles: tuple[Role, ...]
) -> tuple[Role, ...] | None:
    """Roles of the dimensions before a rearrangement, or None where it can't be looked through.

    That is where dimensions of several roles were one, where other than tokens were left out (of a joint projection of
    queries, keys and values, say), and where numbers were rounded.
    """
    name = eqn.primitive.name
    if name not in _LOOK_THROUGH:
        return None
    if name == "convert_element_type" and not _widens(eqn):
        return None
    if name == "broadcast_in_dim" and any(
        n > 1 and not w and r != "batch" for n, w, r in zip(after, where, roles, strict=True)
    ):
        return None
    if name == "gather" and not _copies(eqn, before, where, roles):
        return None
    if name in _RESIZED:
        resized = {r for a, b, r in zip(before, after, roles, strict=True) if a != b}
        if resized - {_RESIZED[name]} or any(s != 1 for s in eqn.params.get("strides") or ()):
            return None
    found: list[set[Role]] = [set() for _ in before]
    for dims, role in zip(where, roles, strict=True):
        for d in dims:
            found[d].add(role)
    if any(len(f) > 1 for f in found):
        return None
    return tuple(next(iter(f), "batch") for f in found)  # what has no role is of size 1


def _copies(eqn: Any, before: tuple[int, ...], where: Sources, roles: tuple[Role, ...]) -> bool:
    """Whether a lookup only takes key heads, whole, for query heads."""
    gone, sizes = eqn.params["dimension_numbers"].collapsed_slice_dims, eqn.params["slice_sizes"]
    whole = all(n == size for d, (n, size) in enumerate(zip(before, sizes, strict=True)) if d not in gone)
    heads = [r for w, r in zip(where, roles, strict=True) if w == tuple(gone)]
    return whole and len(gone) == 1 and heads == ["batch"]


def _widens(eqn: Any) -> bool:
    """Whether a cast leaves every number as it is."""
    dtypes = eqn.invars[0].aval.dtype, jnp.dtype(eqn.params["new_dtype"])
    if not all(jnp.issubdtype(d, jnp.floating) for d in dtypes):
        return False
    old, new = map(jnp.finfo, dtypes)
    return bool(new.nmant >= old.nmant and new.minexp <= old.minexp and new.maxexp >= old.maxexp)
