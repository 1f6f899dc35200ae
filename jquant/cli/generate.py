"""`jquant generate`."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, TextIO

import jax
import numpy as np

from jquant import kv_cache, models
from jquant.cli.common import cut_text, load_model, read_text, say
from jquant.cli.options import UsageError
from jquant.core.errors import FormatError, JQuantError
from jquant.kv_cache import CacheFormat
from jquant.models import Generation, Model, ModelError, Tokenizer
from jquant.models.generate import Sampling

# How much of --cache-text is read: see `key_settings`.
_FIT_LENGTH, _FIT_WINDOWS = 2048, 8


def run(args: Namespace) -> None:
    """The command."""
    _check_sampling(args)
    fmt = _cache_format(args.cache or args.dtype)
    content = _cache_text(args, fmt)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    model = load_model(args.model, args.dtype)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(prompt)
    if not ids:
        raise UsageError("--prompt is empty; give the first words")
    if (total := len(ids) + args.max_tokens) > model.config.max_position_embeddings:
        say(f"jquant: warning: {total} tokens are more than the {model.config.max_position_embeddings} of the training")
    stop = (*model.config.eos_ids, *(_token_id(t, model.tokenizer) for t in args.stop))
    room = len(ids) + args.max_tokens - 1
    cache = models.init_cache(model.config, 1, room, fmt, **_fitted(model, fmt, args.cache_text, content))
    writer = Writer(model.tokenizer, ids, stop)
    sys.stdout.write(prompt)
    sys.stdout.flush()
    done = models.generate(
        model.apply, model.params, ids, model.config, max_tokens=args.max_tokens, temperature=args.temperature,
        top_k=args.top_k, top_p=args.top_p, key=jax.random.key(args.seed), stop_ids=stop, on_token=writer,
        cache=cache,
    )  # fmt: skip
    writer.close()
    say(speeds(len(ids), done))


def _check_sampling(args: Namespace) -> None:
    if args.temperature == 0 and (args.top_k is not None or args.top_p is not None):
        raise UsageError("--top-k and --top-p choose among tokens only with a --temperature, such as 0.8")
    try:
        Sampling(args.temperature, args.top_k, args.top_p)
    except ModelError as error:
        raise UsageError(str(error).replace("top_", "--top-")) from error


def _cache_format(text: str) -> CacheFormat:
    try:
        return kv_cache.parse(text)
    except FormatError as error:
        raise UsageError(f"--cache: {error}") from error


def _cache_text(args: Namespace, fmt: CacheFormat) -> tuple[str, str] | None:
    """What `read_text` gives for --cache-text."""
    if args.cache_text is None:
        return None
    if not _eases(fmt) and not fmt.keys.static and not fmt.values.static:
        raise UsageError(
            f"--cache-text: {fmt} rounds no keys, or each channel for itself, and has no static scales: nothing of it "
            "is fitted to a text; name a --cache such as fine4"
        )
    return read_text(args.cache_text)


def _eases(fmt: CacheFormat) -> bool:
    """Whether its keys can be eased: a channel's own scale and zero point leave nothing to do."""
    return not fmt.keys.is_float and fmt.keys.tokens == 1


def _fitted(model: Model, fmt: CacheFormat, path: str | None, content: tuple[str, str] | None) -> dict[str, Any]:
    """The settings of a cache that were found on a text; none without one."""
    if path is None or content is None:
        return {}
    length = min(_FIT_LENGTH, model.config.max_position_embeddings)
    text = cut_text(path, content, model.tokenizer, length, _FIT_WINDOWS)
    say(f"fitting the cache to {len(text.windows)} x {length} tokens of {path}")
    params, config, cut = model.params, model.config, text.windows
    keys = models.key_settings(params, config, cut) if _eases(fmt) else {}
    return {**keys, **models.static_scales(params, config, cut, fmt, center=keys.get("center"), gain=keys.get("gain"))}


def _token_id(token: str, tokenizer: Tokenizer) -> int:
    found = tokenizer.backend.token_to_id(token)
    if found is None and len(ids := tokenizer.encode(token)) == 1:
        return ids[0]
    if found is None:
        raise JQuantError(f"--stop {token!r} is no single token of this model")
    return found


class Writer:
    """Writes the text of tokens as they come: a character of several tokens is held back until it is whole.

    Args:
      tokenizer: the model's.
      prompt: its tokens; what follows is decoded together with them, as some tokenizers drop a leading space.
      stop: tokens that are not written.
      stream: where to write; standard output by default.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[int], stream: TextIO | None = None):
        self.tokenizer, self.stop, self.stream = tokenizer, set(stop), stream or sys.stdout
        self.ids = list(prompt[-8:])
        self.text = tokenizer.decode(self.ids)

    def __call__(self, token: np.ndarray) -> None:
        if int(token[0]) not in self.stop:
            self.ids.append(int(token[0]))
            self._write(self.tokenizer.decode(self.ids))

    def _write(self, text: str, whole: bool = False) -> None:
        if whole or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.stream.write(text[len(self.text) :])
            self.stream.flush()
            self.text = text

    def close(self) -> None:
        """Writes what was held back, and ends the line."""
        self._write(self.tokenizer.decode(self.ids), whole=True)
        self.stream.write("\n")
        self.stream.flush()


def speeds(prompt: int, done: Generation) -> str:
    """What was measured, in one line."""
    new = int(done.lengths[0])
    return (
        f"prompt: {prompt} tokens, {done.prefill_tokens_per_second:.0f} tokens/s; "
        f"new: {new} tokens, {done.decode_tokens_per_second:.1f} tokens/s; compiled in {done.compile_seconds:.1f} s"
    )
