"""What a decoder is made of, as frozen values that turn into JSON and back."""

import dataclasses
from typing import Any

from jquant.models.errors import ModelError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "freq_factors")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding and its scaling; fields are named as in Hugging Face's `rope_parameters`.

    `freq_factors` (one divisor per frequency) is how GGUF files store the llama3 scaling.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: multiplies cos and sin; None computes the paper's
    mscale: float | None = None  # yarn, as DeepSeek sets it
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: round the corrected range to whole dimensions
    freq_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.type not in ROPE_TYPES:
            raise ModelError(f"unsupported rope type {self.type!r}; supported: {', '.join(ROPE_TYPES)}")
        if self.type in ("llama3", "yarn") and self.original_max_position_embeddings <= 0:
            raise ModelError(f"rope type {self.type!r} needs original_max_position_embeddings, the length trained on")
        if (self.type == "freq_factors") != bool(self.freq_factors):
            raise ModelError("rope type 'freq_factors' and the field freq_factors go together; give both or neither")


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder of the Llama kind. Llama, Mistral, Qwen2 and Qwen3 differ only in these values.

    Attributes:
      family: "llama", "mistral", "qwen2" or "qwen3"; for people, nothing depends on it.
      head_dim: width of one head, independent of `hidden_size`.
      max_position_embeddings: the length trained on; only the dynamic rope scaling computes with it.
      tied: the head is the transposed embedding, and `params` has no `lm_head`.
      qkv_bias, o_bias, mlp_bias: which linear layers add a bias.
      qk_norm: RMS norm over each query and key head before rope (Qwen3).
      sliding_window: in the layers `sliding_layers` a token sees itself and the `sliding_window - 1` before it.
      eos_ids: tokens that end a text; `generate` stops at them when asked to.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    family: str = "llama"
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    max_position_embeddings: int = 2048
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd; rope rotates pairs")
        if self.rope.freq_factors and len(self.rope.freq_factors) != self.head_dim // 2:
            raise ModelError(f"{len(self.rope.freq_factors)} rope freq_factors for head_dim {self.head_dim}; need half")
        if self.sliding_layers and not self.sliding_window:
            raise ModelError("sliding_layers are given, sliding_window is not")

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, None where it sees everything before it."""
        return self.sliding_window if layer in self.sliding_layers else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json.dumps` takes; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`, also after a trip through JSON. ModelError for unknown or missing keys."""
        rope = dict(values.get("rope", {}))
        rope["freq_factors"] = tuple(rope.get("freq_factors", ()))
        tuples = {k: tuple(values.get(k, ())) for k in ("sliding_layers", "eos_ids")}
        try:
            return cls(**{**values, **tuples, "rope": Rope(**rope)})
        except TypeError as error:
            raise ModelError(f"not a jquant model config: {error}") from error


def param_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The path and shape of every parameter, in the order of the forward pass. Kernels are [in, out]."""
    shapes: dict[str, tuple[int, ...]] = {"embed/embedding": (config.vocab_size, config.hidden_size)}
    for i in range(config.num_layers):
        shapes |= {f"layers/{i}/{name}": shape for name, shape in _layer_shapes(config).items()}
    shapes["norm/scale"] = (config.hidden_size,)
    if not config.tied:
        shapes["lm_head/kernel"] = (config.hidden_size, config.vocab_size)
    return shapes


def _layer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    linears = [
        ("attention/q", hidden, queries, config.qkv_bias),
        ("attention/k", hidden, keys, config.qkv_bias),
        ("attention/v", hidden, keys, config.qkv_bias),
        ("attention/o", queries, hidden, config.o_bias),
        ("mlp/gate", hidden, inner, config.mlp_bias),
        ("mlp/up", hidden, inner, config.mlp_bias),
        ("mlp/down", inner, hidden, config.mlp_bias),
    ]
    shapes: dict[str, tuple[int, ...]] = {"attention_norm/scale": (hidden,), "mlp_norm/scale": (hidden,)}
    for name, rows, columns, bias in linears:
        shapes[f"{name}/kernel"] = (rows, columns)
        if bias:
            shapes[f"{name}/bias"] = (columns,)
    if config.qk_norm:
        shapes |= {"attention/q_norm/scale": (dim,), "attention/k_norm/scale": (dim,)}
    return shapes
