"""GGUF files by the gguf package: every tensor type, the order of rotated rows, metadata, tokenizers, errors."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from jquant.models import Config, ModelError, Rope, load, load_tokenizer
from jquant.models.config import param_shapes
from tests.models.cases import make_tokens
from tests.models.reference import forward

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
Type = gguf.GGMLQuantizationType

SMALL = Config(
    vocab_size=40,
    hidden_size=256,  # k-quants come in blocks of 256
    intermediate_size=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
)
NAMES = {
    "embed/embedding": "token_embd.weight",
    "norm/scale": "output_norm.weight",
    "lm_head/kernel": "output.weight",
    "attention/q": "attn_q",
    "attention/k": "attn_k",
    "attention/v": "attn_v",
    "attention/o": "attn_output",
    "attention/q_norm": "attn_q_norm",
    "attention/k_norm": "attn_k_norm",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
}


def gguf_name(path):
    if path in NAMES:
        return NAMES[path]
    _, layer, rest = path.split("/", 2)
    module, leaf = rest.rsplit("/", 1)
    return f"blk.{layer}.{NAMES[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def permute(rows, heads):
    """What llama.cpp's convert_hf_to_gguf.py does to q and k of Llama models."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def weights(config, seed=0):
    """By our paths, in the file's order [out, in] for matrices."""
    rng = np.random.default_rng(seed)
    shapes = {p: s[::-1] if p.endswith("kernel") else s for p, s in param_shapes(config).items()}
    return {p: (rng.normal(size=s) * (0.1 if len(s) == 2 else 1)).astype(np.float32) for p, s in shapes.items()}


def write(path, config=SMALL, kind=Type.F32, arch="llama", tensors=None, meta=(), raw=None, drop=()):
    """A file as llama.cpp writes it; `raw` gives the bytes of a matrix for types that gguf does not quantize to."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    for add in meta:
        add(writer)
    for name, array in (tensors or weights(config)).items():
        if name in drop:
            continue
        if arch == "llama" and name.split("/")[-2] in ("q", "k"):
            array = permute(array, config.num_heads if "/q/" in name else config.num_kv_heads)
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), array)
        elif raw is not None:
            writer.add_tensor(gguf_name(name), raw(array.shape), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def leaves(tree, prefix=""):
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}{key}/") if isinstance(value, dict) else [(prefix + key, np.asarray(value))]


FAMILIES = {
    "llama": (SMALL, "llama"),
    "llama-tied-biases": (dataclasses.replace(SMALL, tied=True, qkv_bias=True, o_bias=True, mlp_bias=True), "llama"),
    "qwen2": (dataclasses.replace(SMALL, family="qwen2", qkv_bias=True), "qwen2"),
    "qwen3": (dataclasses.replace(SMALL, family="qwen3", qk_norm=True), "qwen3"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_written_weights_come_back_and_the_forward_is_right(name, tmp_path):
    config, arch = FAMILIES[name]
    tensors = weights(config)
    model = load(write(tmp_path / "m.gguf", config, arch=arch, tensors=tensors))
    assert dataclasses.replace(model.config, rms_norm_eps=1e-5) == config
    found = dict(leaves(model.params))
    assert found.keys() == tensors.keys()
    for path, array in tensors.items():
        np.testing.assert_array_equal(found[path], array.T if path.endswith("kernel") else array, err_msg=path)
    tokens = make_tokens(config, 8)
    expected = forward(config, model.params, tokens)
    got = jax.jit(model.apply)(model.params, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


# Largest error as a share of the block's largest value: half a step of the grid, and the rounding of the scale.
BOUNDS = {"Q8_0": 0.51 / 127, "Q4_0": 1.01 / 8, "Q4_1": 0.51 * 2 / 15, "Q5_0": 1.01 / 16, "Q5_1": 0.51 * 2 / 31}


@pytest.mark.parametrize("kind", BOUNDS)
def test_block_types(kind, tmp_path):
    tensors = weights(SMALL)
    params = dict(leaves(load(write(tmp_path / "m.gguf", kind=Type[kind], tensors=tensors)).params))
    for path, array in tensors.items():
        if array.ndim == 1:
            continue
        found = params[path].T if path.endswith("kernel") else params[path]
        blocks = lambda x: x.reshape(-1, 32)  # along the inputs, so the order of the rows of q and k does not matter
        largest = np.abs(blocks(array)).max(1, keepdims=True)
        assert (np.abs(blocks(found) - blocks(array)) <= (BOUNDS[kind] + 1e-3) * largest).all(), path
        assert (found != array).any()


@pytest.mark.parametrize("kind, dtype", [("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_half_types(kind, dtype, tmp_path):
    tensors = weights(SMALL)
    params = dict(leaves(load(write(tmp_path / "m.gguf", kind=Type[kind], tensors=tensors), "bfloat16").params))
    expected = tensors["layers/0/attention/q/kernel"].astype(dtype).T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(params["layers/0/attention/q/kernel"], expected)


def q4_k(block):
    """One block of 144 bytes, by ggml's description: d, dmin, 8 scales and minimums of 6 bits, 256 codes of 4 bits."""
    d, dmin = (float(x) for x in block[:4].view(np.float16))
    packed, codes, out = [int(x) for x in block[4:16]], block[16:].reshape(4, 32), []
    for j in range(8):
        if j < 4:
            scale, minimum = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4)
            minimum = (packed[j + 4] >> 4) | (packed[j] >> 6 << 4)
        nibbles = codes[j // 2] >> 4 if j % 2 else codes[j // 2] & 15
        out += [d * scale * int(q) - dmin * minimum for q in nibbles]
    return out


def q6_k(block):
    """One block of 210 bytes: low 4 bits, high 2 bits, 16 int8 scales, d."""
    low, high = [int(x) for x in block[:128]], [int(x) for x in block[128:192]]
    scales, d = block[192:208].view(np.int8), float(block[208:].view(np.float16)[0])
    out = np.zeros(256)
    for half in range(2):
        for i in range(32):
            for part in range(4):
                byte = low[64 * half + 32 * (part % 2) + i]
                code = (byte >> 4 if part >= 2 else byte & 15) | ((high[32 * half + i] >> 2 * part & 3) << 4)
                where = 128 * half + 32 * part + i
                out[where] = d * int(scales[where // 16]) * (code - 32)
    return list(out)


@pytest.mark.parametrize("kind, size, floats, decode", [("Q4_K", 144, (0, 4), q4_k), ("Q6_K", 210, (208, 210), q6_k)])
def test_k_quants(kind, size, floats, decode, tmp_path):
    rng, written = np.random.default_rng(0), {}

    def raw(shape):
        blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 256, size), dtype=np.uint8)
        scales = rng.uniform(0.01, 0.02, (*blocks.shape[:-1], (floats[1] - floats[0]) // 2)).astype(np.float16)
        blocks[..., floats[0] : floats[1]] = scales.view(np.uint8)
        written[shape] = blocks
        return blocks.reshape(*shape[:-1], -1)

    params = dict(leaves(load(write(tmp_path / "m.gguf", kind=Type[kind], raw=raw)).params))
    expected = np.array([decode(block) for block in written[(40, 256)].reshape(-1, size)]).reshape(40, 256)
    np.testing.assert_allclose(params["lm_head/kernel"].T, expected, rtol=1e-5, atol=1e-5)


def test_rope_freqs_tensor_is_the_llama3_scaling(tmp_path):
    rope = Rope("llama3", 100.0, 8.0, original_max_position_embeddings=32)
    base = 100.0 ** (-np.arange(0, 128, 2) / 128)
    turns = 32 * base / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)  # as convert_hf_to_gguf.py computes them
    config = dataclasses.replace(SMALL, rope=rope)
    model = load(write(tmp_path / "m.gguf", config, meta=[lambda w: w.add_tensor("rope_freqs.weight", factors)]))
    assert model.config.rope.type == "freq_factors"
    tokens = make_tokens(SMALL, 40)
    expected = forward(config, model.params, tokens)
    got = jax.jit(model.apply)(model.params, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "meta, rope",
    [
        ([lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), lambda w: w.add_rope_scaling_factor(4.0)],
         Rope("linear", 10000.0, 4.0)),
        ([lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), lambda w: w.add_rope_scaling_factor(4.0),
          lambda w: w.add_rope_scaling_orig_ctx_len(16)],
         Rope("yarn", 10000.0, 4.0, 16, attention_factor=0.1 * np.log(4.0) + 1)),
    ],
)  # fmt: skip
def test_rope_metadata(meta, rope, tmp_path):
    found = load(write(tmp_path / "m.gguf", meta=meta)).config.rope
    assert found == dataclasses.replace(rope, attention_factor=found.attention_factor)
    assert found.attention_factor == pytest.approx(rope.attention_factor)


# --- tokenizers


def byte_level_meta(pre, tokens, merges, kinds=None):
    return [
        lambda w: w.add_tokenizer_model("gpt2"),
        lambda w: w.add_tokenizer_pre(pre),
        lambda w: w.add_token_list(tokens),
        lambda w: w.add_token_types(kinds or [1] * len(tokens)),
        lambda w: w.add_token_merges(merges),
        lambda w: w.add_eos_token_id(0),
    ]


BYTES = ["<eos>", *"abc123'sX!", "Ġ", "Ċ", "12", "123", "ab", "Ġab", "abc", "Ã", "©", "Ã©", "e", "Ì", "ģ"]
MERGES = ["1 2", "12 3", "a b", "Ġ ab", "Ã ©"]


@pytest.mark.parametrize(
    "pre, text, pieces",
    [
        ("gpt-2", "ab 123", ["ab", "Ġ", "123"]),
        ("smollm", "ab 123", ["ab", "Ġ", "1", "2", "3"]),
        ("llama-bpe", "123123", ["123", "123"]),
        ("llama-bpe", "1231", ["123", "1"]),
        ("qwen2", "123 ab", ["1", "2", "3", "Ġab"]),
        ("llama-bpe", "abc", ["abc"]),  # a whole piece that is a token, though no merge leads to it
        ("qwen2", "abc", ["ab", "c"]),
        ("qwen2", "e\u0301", ["Ã©"]),  # composed first
        ("llama-bpe", "e\u0301", ["e", "Ì", "ģ"]),
        ("tekken", "12", ["1", "2"]),
        ("tekken", "abX", ["ab", "X"]),
        ("llama-bpe", "a!\n\nb", ["a", "!", "Ċ", "Ċ", "b"]),
        ("gpt-2", "ab<eos>ab", ["ab", "<eos>", "ab"]),
    ],
)
def test_byte_level_pre_tokenizers(pre, text, pieces, tmp_path):
    meta = byte_level_meta(pre, BYTES, MERGES, [3] + [1] * (len(BYTES) - 1))
    tokenizer = load(write(tmp_path / "m.gguf", meta=meta)).tokenizer
    ids = tokenizer.encode(text)
    assert [BYTES[i] for i in ids] == pieces
    assert tokenizer.decode(ids) == text.replace("<eos>", "").replace("e\u0301", "é" if pre == "qwen2" else "e\u0301")
    assert tokenizer.eos_ids == (0,) and tokenizer.vocab_size == len(BYTES)


def spm_meta(tokens, scores, kinds):
    return [
        lambda w: w.add_tokenizer_model("llama"),
        lambda w: w.add_token_list(tokens),
        lambda w: w.add_token_scores(scores),
        lambda w: w.add_token_types(kinds),
        lambda w: w.add_unk_token_id(0),
    ]


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path):
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    words = ["▁", "a", "b", "c", "bc", "ab", "▁a", "▁ab", "abc"]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *words]
    # "bc" is better than "ab": "abc" is a + bc, then whole.
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0, -4.0, -5.0]
    meta = spm_meta(tokens, scores, [2, 3, 3] + [6] * 256 + [1] * len(words))
    tokenizer = load(write(tmp_path / "m.gguf", meta=meta)).tokenizer
    spell = lambda text: [tokens[i] for i in tokenizer.encode(text)]
    assert spell("ab") == ["▁ab"]
    assert spell("c abc") == ["▁", "c", "▁a", "bc"]
    assert spell("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab é abc")) == "ab é abc"


def test_saved_tokenizer_gives_the_same_ids(tmp_path):
    meta = byte_level_meta("llama-bpe", BYTES, MERGES, [3] + [1] * (len(BYTES) - 1))
    tokenizer = load(write(tmp_path / "m.gguf", meta=meta)).tokenizer
    tokenizer.save(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out", tokenizer.eos_ids)
    text = "abc 123<eos> a!\n"
    assert again.encode(text) == tokenizer.encode(text) and again.eos_ids == (0,)
    with pytest.raises(ModelError, match="tokenizer.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer.json is damaged"):
        load_tokenizer(tmp_path)


def test_a_file_without_tokenizer_has_none(tmp_path):
    assert load(write(tmp_path / "m.gguf")).tokenizer is None


@pytest.mark.parametrize(
    "meta, message",
    [
        (byte_level_meta("klingon", BYTES, MERGES), "pre-tokenizer 'klingon' is not supported"),
        ([lambda w: w.add_tokenizer_model("bert")], "tokenizer 'bert' is not supported"),
        ([lambda w: w.add_tokenizer_model("llama")], "'tokenizer.ggml.tokens' is missing"),
    ],
)
def test_unsupported_tokenizers_say_how_to_go_on(meta, message, tmp_path):
    path = write(tmp_path / "m.gguf", meta=meta)
    with pytest.raises(ModelError, match=f"{message}.*tokenizer=False"):
        load(path)
    assert load(path, tokenizer=False).tokenizer is None


# --- errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(arch="gemma2"), "architecture 'gemma2' is not supported; supported: llama, qwen2, qwen3"),
        (dict(drop=["layers/0/mlp/up/kernel"]), r"missing 1 tensor \(blk.0.ffn_up.weight\)"),
        (dict(meta=[lambda w: w.add_tensor("blk.0.extra.weight", np.ones(3, np.float32))]), "blk.0.extra.weight.*not"),
        (dict(meta=[lambda w: w.add_rope_dimension_count(64)]), "rope.dimension_count"),
        (dict(meta=[lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)]), "rope.scaling.type 'longrope'"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message, tmp_path):
    with pytest.raises(ModelError, match=message) as error:
        load(write(tmp_path / "m.gguf", **arguments))
    assert str(tmp_path / "m.gguf") in str(error.value)


def test_shape_mismatch_names_tensor_and_both_shapes(tmp_path):
    tensors = weights(SMALL) | {"layers/0/mlp/up/kernel": np.zeros((250, 256), np.float32)}
    with pytest.raises(ModelError, match=r"blk.0.ffn_up.weight .* has shape \(250, 256\), its config .* \(256, 256\)"):
        load(write(tmp_path / "m.gguf", tensors=tensors))


def test_files_that_are_no_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ModelError, match="damaged or no GGUF file"):
        load(tmp_path / "m.gguf")
    whole = write(tmp_path / "w.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="damaged or no GGUF file"):
        load(tmp_path / "m.gguf")
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="is no .gguf file"):
        load(tmp_path / "m.bin")


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModelError, match=r'pip install "jquant\[models\]"'):
        load(path)
