"""A generation on disk: `save_state` and `load_state`."""

import os
from typing import Any

import jax
import jax.numpy as jnp

from jquant import checkpoint
from jquant.core.errors import CheckpointError
from jquant.core.paths import flatten_with_paths
from jquant.kv_cache import KVCache, init
from jquant.models.generate import State

_NAME = "generation_state"


def save_state(path: str | os.PathLike[str], state: State, *, overwrite: bool = False) -> None:
    """Writes the cache, the newest token, the key and the step: all of a generation but the weights.

    Raises:
      CheckpointError: the path is taken, or can't be written.
    """
    layers = state.cache["layers"]
    noted = {name: _settings(cache) for name, cache in layers.items()}
    key = {"impl": str(jax.random.key_impl(state.key)), "layers": noted}
    tree = state._replace(key=jax.random.key_data(state.key))
    flat = dict(flatten_with_paths(tree)[0])
    checkpoint.save(path, flat, metadata={_NAME: key}, overwrite=overwrite)


def load_state(path: str | os.PathLike[str]) -> State:
    """What `save_state` wrote: `generate(apply, params, state=load_state(path))` goes on with the same tokens.

    Raises:
      CheckpointError: no checkpoint of a state, or a damaged one.
    """
    noted = checkpoint.read_metadata(path).get(_NAME)
    if noted is None:
        raise CheckpointError(f"{path}: a checkpoint without a generation's state; write it with save_state")
    leaves = checkpoint.load(path)
    layers = {name: jax.eval_shape(lambda s=settings: _empty(s)) for name, settings in noted["layers"].items()}
    slot: Any = jax.ShapeDtypeStruct((), jnp.int32)
    like = State({"length": slot, "layers": layers}, slot, slot, slot, slot)
    flat, structure = flatten_with_paths(like)
    if missing := [name for name, _ in flat if name not in leaves]:
        raise CheckpointError(f"{path}: {missing[0]} is missing")
    state = jax.tree.unflatten(structure, [jnp.asarray(leaves[name]) for name, _ in flat])
    return state._replace(key=jax.random.wrap_key_data(state.key, impl=noted["impl"]))


def _settings(cache: KVCache) -> dict[str, Any]:
    """The arguments of `init` that make a cache like this one, as JSON."""
    codes = cache.keys.codes[0]
    floats = cache.window or cache.sinks
    return {
        "batch": cache.length.shape[0], "length": cache.capacity, "kv_heads": codes.shape[1],
        "head_dim": cache.head_dim, "format": str(cache.format), "ring": cache.ring,
        "dtype": "bfloat16" if floats is None else str(floats.keys.dtype),
        "center": cache.center is not None, "gain": cache.gain is not None,
        **({} if cache.table is None else {"pages": codes.shape[0], "page_size": cache.page_size}),
    }  # fmt: skip


def _empty(settings: dict[str, Any]) -> KVCache:
    given = {"center": 0.0 if settings["center"] else None, "gain": 1.0 if settings["gain"] else None}
    return init(**{**settings, **given})
