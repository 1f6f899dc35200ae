"""Hugging Face folders: written here by hand, and by transformers where installed; and what is wrong with them."""

import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest

from jquant.models import ModelError, load
from jquant.models.config import param_shapes
from jquant.models.hf import config_from_hf
from tests.models.cases import make_tokens
from tests.models.reference import forward

st = pytest.importorskip("safetensors.numpy")

# Every kind as its own config.json says it. Sizes are tiny; head_dim is not hidden_size / heads where the family may.
SIZES = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
KINDS = {
    "llama": dict(model_type="llama"),
    "llama-biases-tied": dict(model_type="llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-head-dim": dict(model_type="llama", head_dim=16, rope_theta=500.0),
    "mistral": dict(model_type="mistral", sliding_window=6, head_dim=16),
    "mistral-no-window": dict(model_type="mistral", sliding_window=None),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen2-window": dict(model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2-window-off": dict(model_type="qwen2", use_sliding_window=False, sliding_window=5, max_window_layers=1),
    "qwen3": dict(model_type="qwen3", head_dim=16, attention_bias=True),
    "linear": dict(model_type="llama", rope_scaling=dict(rope_type="linear", factor=3.0)),
    "old-type-key": dict(model_type="llama", rope_scaling=dict(type="linear", factor=3.0)),
    "dynamic": dict(model_type="llama", rope_scaling=dict(rope_type="dynamic", factor=3.0)),
    "llama3": dict(
        model_type="llama",
        rope_theta=100.0,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "yarn": dict(
        model_type="qwen2",
        rope_theta=100.0,
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8),
    ),
}


def write(folder, name="llama", dtype=np.float32, shards=1, drop=(), add=(), config=None):
    """A folder as transformers writes it, with random weights; returns the weights by name."""
    values = {**SIZES, **KINDS[name], "eos_token_id": [7, 9], **(config or {})}
    (folder / "config.json").write_text(json.dumps(values))
    rng = np.random.default_rng(0)
    tensors = {}
    for path, shape in param_shapes(config_from_hf(values)).items():
        array = rng.normal(size=shape[::-1] if path.endswith("kernel") else shape) * (0.3 if len(shape) == 2 else 1)
        tensors[_hf_name(path)] = array.astype(dtype)
    tensors = {n: t for n, t in tensors.items() if n not in drop} | {n: np.zeros(3, np.float32) for n in add}
    if shards == 1:
        st.save_file(tensors, folder / "model.safetensors")
        return tensors
    files = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(tensors)}
    for file in set(files.values()):
        st.save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return tensors


def _hf_name(path):
    words = {
        "kernel": "weight",
        "scale": "weight",
        "embedding": "weight",
        "embed": "model.embed_tokens",
        "layers": "model.layers",
        "norm": "model.norm",
        "attention": "self_attn",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        **{x: f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")},
    }
    return ".".join(words.get(part, part) for part in path.split("/"))


@pytest.mark.parametrize("name", KINDS)
def test_folder_equals_float64_reference(name, tmp_path):
    tensors = write(tmp_path, name)
    model = load(tmp_path)
    kernel = model.params["layers"]["1"]["attention"]["k"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["model.layers.1.self_attn.k_proj.weight"].T)
    tokens = make_tokens(model.config, 36)
    expected = forward(model.config, model.params, tokens)
    np.testing.assert_allclose(jax.jit(model.apply)(model.params, tokens), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.peers
@pytest.mark.parametrize("shard", ["one file", "shards"])
@pytest.mark.parametrize("name", KINDS)
def test_folder_equals_transformers(name, shard, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    values = {**SIZES, **KINDS[name]}
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    peer = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    peer.save_pretrained(tmp_path, max_shard_size="20KB" if shard == "shards" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "shards")
    model = load(tmp_path)
    tokens = make_tokens(model.config, 40, batch=1)
    with torch.no_grad():
        expected = peer(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(jax.jit(model.apply)(model.params, tokens), expected, atol=1e-4)


def test_shards_equal_one_file(tmp_path):
    (tmp_path / "one").mkdir(), (tmp_path / "three").mkdir()
    write(tmp_path / "one")
    write(tmp_path / "three", shards=3)
    assert len(list((tmp_path / "three").glob("*.safetensors"))) == 3
    a, b = load(tmp_path / "one"), load(tmp_path / "three")
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert a.config == b.config and a.config.eos_ids == (7, 9) and a.tokenizer is None


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtypes(stored, wanted, tmp_path):
    tensors = write(tmp_path, dtype=stored)
    leaf = load(tmp_path, wanted).params["layers"]["0"]["mlp"]["up"]["kernel"]
    assert leaf.dtype == wanted
    np.testing.assert_array_equal(leaf, tensors["model.layers.0.mlp.up_proj.weight"].T.astype(wanted))


def test_params_do_not_look_into_the_file(tmp_path):
    write(tmp_path)
    params = load(tmp_path).params
    before = jax.tree.map(np.array, params)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as f:
        f.write(bytes(file.stat().st_size))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_generation_config_adds_stop_tokens(tmp_path):
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 11]}))
    assert load(tmp_path).config.eos_ids == (7, 9, 11)


def test_a_stored_copy_of_the_tied_head_is_left_out(tmp_path):
    write(tmp_path, "qwen2", add=["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"])
    assert "lm_head" not in load(tmp_path).params


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(config=dict(rope_scaling=dict(rope_type="longrope"))), "config.json: rope type 'longrope' is not supp"),
        (dict(config=dict(rope_scaling=dict(rope_type="linear"))), "config.json: rope type 'linear' needs a factor"),
        (dict(config=dict(partial_rotary_factor=0.5)), "partial_rotary_factor"),
        (dict(config=dict(model_type="gpt2")), "'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3"),
        (dict(config=dict(hidden_act="gelu")), "hidden_act 'gelu'"),
        (dict(config=dict(quantization_config=dict(quant_method="gptq"))), r"stored quantized \(gptq\)"),
        (dict(drop=["model.norm.weight"]), r"missing 1 tensor \(model.norm.weight\); is the file complete"),
        (dict(add=["model.layers.0.self_attn.sinks"]), r"1 tensor \(model.layers.0.self_attn.sinks\) not part"),
    ],
)
def test_errors_name_what_is_wrong(change, message, tmp_path):
    config = change.pop("config", {})
    write(tmp_path, **change)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ModelError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_shape_mismatch_names_tensor_and_both_shapes(tmp_path):
    tensors = write(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    st.save_file({**tensors, name: np.zeros((32, 41), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name} .* has shape \(32, 41\), its config asks for \(32, 40\)"):
        load(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(ModelError, match='nowhere does not exist; give "demo"'):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="config.json does not exist"):
        load(tmp_path)
    write(tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="names model-00002-of-00002.safetensors, which does not exist"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no safetensors file"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ModelError, match="model.safetensors is damaged"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json is not JSON"):
        load(tmp_path)


def test_a_missing_key_is_named(tmp_path):
    write(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["intermediate_size"]
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="config.json: the key 'intermediate_size' is missing"):
        load(tmp_path)


def test_yarn_factor_comes_from_the_lengths_when_not_given():
    scaling = dict(rope_type="yarn", original_max_position_embeddings=8)
    config = config_from_hf({**SIZES, "model_type": "llama", "rope_scaling": scaling})
    assert math.isclose(config.rope.factor, 4.0)
