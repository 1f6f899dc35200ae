"""One decoder family in Flax (Llama, Mistral, Qwen2, Qwen3), its loaders and text generation."""

from jquant.models.cache import init_cache, key_settings, static_scales
from jquant.models.config import Config, Rope, param_shapes
from jquant.models.decoder import build, init
from jquant.models.errors import ModelError
from jquant.models.generate import Generation, State, generate
from jquant.models.load import Model, load, load_config
from jquant.models.saved import save
from jquant.models.state import load_state, save_state
from jquant.models.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Config",
    "Generation",
    "Model",
    "ModelError",
    "Rope",
    "State",
    "Tokenizer",
    "build",
    "generate",
    "init",
    "init_cache",
    "key_settings",
    "load",
    "load_config",
    "load_state",
    "load_tokenizer",
    "param_shapes",
    "save",
    "save_state",
    "static_scales",
]
