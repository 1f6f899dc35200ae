"""Tokenizers, as `tokenizers` objects: from a tokenizer.json, or built from the metadata of a GGUF file."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jquant.models.errors import ModelError, require


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      eos_ids: tokens that end a text.
    """

    backend: Any
    eos_ids: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; adds no token of its own. Special tokens written out in the text become their ids."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`, without special tokens unless asked for."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def save(self, folder: str | Path) -> None:
        """Writes `folder`/tokenizer.json, which `load_tokenizer` and Hugging Face's tools read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.backend.save(str(Path(folder) / "tokenizer.json"))


def load_tokenizer(folder: str | Path, eos_ids: Sequence[int] = ()) -> Tokenizer:
    """Reads `folder`/tokenizer.json. ModelError when it is missing or damaged."""
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise ModelError(f"{path} does not exist; save the tokenizer beside the model (Tokenizer.save)")
    try:
        return Tokenizer(require("tokenizers").Tokenizer.from_file(str(path)), tuple(eos_ids))
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{path} is damaged or no tokenizer: {error}") from error


def tokenizer_from_gguf(meta: dict[str, Any], eos_ids: Sequence[int], path: Path) -> Tokenizer | None:
    """The tokenizer in a GGUF file's metadata, None if it holds none. ModelError for a kind that is not supported."""
    kind = meta.get("tokenizer.ggml.model")
    if kind is None or kind == "none":
        return None
    if kind not in _KINDS:
        supported = ", ".join(_KINDS)
        raise ModelError(f"{path}: tokenizer {kind!r} is not supported ({supported}); load with tokenizer=False")
    try:
        backend = _KINDS[kind](meta)
    except KeyError as error:
        raise ModelError(f"{path}: the metadata key {error} is missing; load with tokenizer=False") from error
    except ModelError as error:
        raise ModelError(f"{path}: {error}; load with tokenizer=False") from error
    backend.add_special_tokens(_added(meta, 3, special=True))  # 3: control tokens, 4: defined by the user
    backend.add_tokens(_added(meta, 4, special=False))
    return Tokenizer(backend, tuple(eos_ids))


def _added(meta: dict[str, Any], kind: int, special: bool) -> list[Any]:
    added = require("tokenizers").AddedToken
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta.get("tokenizer.ggml.token_type", [])
    return [added(t, normalized=False, special=special) for t, k in zip(tokens, kinds) if k == kind]


def _byte_level(meta: dict[str, Any]) -> Any:
    """BPE over bytes, as GPT-2; what comes before the merges differs by model and is named in the file."""
    tk = require("tokenizers")
    name = meta.get("tokenizer.ggml.pre", "")
    if name not in _SPLITS:
        raise ModelError(f"pre-tokenizer {name!r} is not supported; supported: {', '.join(_SPLITS)}")
    vocab = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    backend = tk.Tokenizer(tk.models.BPE(vocab, merges, ignore_merges=name in _WHOLE_WORDS_FIRST))
    pattern, normalizer = _SPLITS[name]
    if normalizer:
        backend.normalizer = getattr(tk.normalizers, normalizer)()
    backend.pre_tokenizer = _splitter(tk.pre_tokenizers, pattern)
    backend.decoder = tk.decoders.ByteLevel()
    return backend


def _splitter(pre: Any, pattern: str) -> Any:
    gpt2 = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    if pattern == "gpt2":
        return gpt2
    if pattern == "digits":
        return pre.Sequence([pre.Digits(individual_digits=True), gpt2])
    split = pre.Split(require("tokenizers").Regex(pattern), behavior="isolated")
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name of a pre-tokenizer -> (pattern of the pieces, normalizer), as the models' own tokenizer.json say.
_SPLITS: dict[str, tuple[str, str | None]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), ("gpt2", None)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), ("digits", None)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), (_LLAMA3, None)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2, "NFC")),
    "tekken": (_TEKKEN, None),
}
# A piece that is a token as a whole becomes it, whatever the merges say.
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")


def _sentencepiece(meta: dict[str, Any]) -> Any:
    """SentencePiece BPE (Llama 2, Mistral): spaces are "▁", unknown characters fall back to bytes."""
    tk = require("tokenizers")
    tokens, scores = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges(vocab, scores)
    backend = tk.Tokenizer(tk.models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    steps = [tk.normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = tk.normalizers.Sequence([*steps, tk.normalizers.Replace(" ", "▁")])
    strip = [tk.decoders.Strip(" ", 1, 0)] if prefix else []
    decoders = [tk.decoders.Replace("▁", " "), tk.decoders.ByteFallback(), tk.decoders.Fuse(), *strip]
    backend.decoder = tk.decoders.Sequence(decoders)
    return backend


def _merges(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges whichever neighbours make the token of the highest score: the scores order the merges."""
    pairs = []
    for token, i in vocab.items():
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs += [(-scores[i], i, left, right) for left, right in splits if left in vocab and right in vocab]
    return [(left, right) for _, _, left, right in sorted(pairs)]


_KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {"gpt2": _byte_level, "llama": _sentencepiece}
