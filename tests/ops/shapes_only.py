"""Models whose parameters are shapes: what a test of programs needs of a model that is too large to be made."""

from typing import Any

import jax
import jax.numpy as jnp

import jquant as jq
from jquant.core.formats import compute_params
from jquant.core.paths import map_with_paths
from jquant.core.qtensor import encode_array, to_rows
from jquant.models import Config, param_shapes
from jquant.models.decoder import nest
from jquant.trace.targets import plan_targets

SMOLLM2 = Config(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    tied=True,
)  # fmt: skip
LLAMA_8B = Config(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128,
)  # fmt: skip


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def quantized_shapes(config: Config, recipe: Any) -> Any:
    """The shapes of the tree that `quantize` makes of the model's parameters in bfloat16."""
    params = nest({path: shape(*sizes) for path, sizes in param_shapes(config).items()})
    recipe = recipe if isinstance(recipe, jq.Recipe) else jq.Recipe({"*": recipe})
    sites = jq.find_sites(jq.models.build(config), params, shape(1, 2, dtype=jnp.int32))
    targets = plan_targets(sites, params, recipe)

    def one(path: str, leaf: Any) -> Any:
        if path not in targets:
            return leaf
        t = targets[path]
        encode = lambda w: encode_array(w, compute_params(to_rows(w, t.contracted), t.format), t.format, t.contracted)
        return jax.eval_shape(encode, leaf).replace(activation=t.activation)

    return map_with_paths(one, params)
