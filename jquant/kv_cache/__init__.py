"""The quantized KV cache: pure functions on a pytree.

    cache = kv_cache.init(batch, length, kv_heads, head_dim, "int8")
    cache = kv_cache.append(cache, k, v)      # [batch, tokens, kv_heads, head_dim]
    out = kv_cache.attend(q, cache)           # [batch, tokens, heads, head_dim]
    print(kv_cache.explain(cache, heads).text)  # whether a GPU reads the codes in a kernel, or why not
"""

from jquant.core.errors import CacheError
from jquant.core.kv_stats import KVStats
from jquant.kv_cache.attention import attend, explain
from jquant.kv_cache.cache import KVCache, append, evict, init, insert
from jquant.kv_cache.format import CacheFormat, Coding, parse
from jquant.kv_cache.scales import static_scales

__all__ = [
    "CacheError",
    "CacheFormat",
    "Coding",
    "KVCache",
    "KVStats",
    "append",
    "attend",
    "evict",
    "explain",
    "init",
    "insert",
    "parse",
    "static_scales",
]
