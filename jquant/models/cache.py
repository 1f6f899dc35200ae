"""The key/value cache of a decoder: `{"length": int32 [batch], "layers": {"0": KVCache, ...}}`, of any format."""

from typing import Any

from jquant import kv_cache
from jquant.kv_cache import CacheFormat
from jquant.models.config import Config


def init_cache(
    config: Config, batch: int, length: int, format: str | CacheFormat = "float32", **settings: Any
) -> dict[str, Any]:
    """An empty cache for `length` positions of each of `batch` sequences.

    Args:
      config: the model's.
      batch, length: its size.
      format: how keys and values are stored: "float32", "int8", "int4-g64-asym-rot", ...; see `kv_cache.parse`.
      settings: of `kv_cache.init`, for every layer; one that is a dict by layer ("0", "1", ...) gives each its own
        (static scales, centers).
    """

    def layer(name: str) -> kv_cache.KVCache:
        own = {k: v[name] if isinstance(v, dict) else v for k, v in settings.items()}
        return kv_cache.init(batch, length, config.num_kv_heads, config.head_dim, format, **own)

    layers = {str(i): layer(str(i)) for i in range(config.num_layers)}
    # An array of its own: two leaves of one buffer can't both be donated.
    return {"length": layers["0"].length + 0, "layers": layers}


def cache_length(cache: dict[str, Any]) -> int:
    """The number of positions a sequence has room for (static)."""
    return int(cache["layers"]["0"].capacity)
