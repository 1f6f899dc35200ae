"""What the commands share: models, texts, messages."""

import hashlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jquant
from jquant import checkpoint, models
from jquant.cli.options import UsageError
from jquant.core.errors import JQuantError
from jquant.evaluate import windows
from jquant.models import Model, Tokenizer


def say(text: str) -> None:
    """Tells how things go, on standard error."""
    print(text, file=sys.stderr, flush=True)


def is_saved(source: str) -> bool:
    """Whether a MODEL argument is a folder that was saved by jquant (the name `demo` never is)."""
    return source != "demo" and Path(source).exists() and checkpoint.is_checkpoint(source)


def load_model(source: str, dtype: str, *, text: bool = True) -> Model:
    """The model of a MODEL argument.

    Raises:
      JQuantError: it can't be loaded, or has no tokenizer though `text` is to be read or written.
    """
    say(f"loading {source}")
    model = models.load(source, dtype)
    if text and model.tokenizer is None:
        raise JQuantError(f"{source} has no tokenizer; put its tokenizer.json into the folder")
    return model


class Text(NamedTuple):
    """A text as windows of tokens: `windows`, int32 `[1, length]` each, and where it is from."""

    path: Path
    sha256: str
    windows: list[np.ndarray]


def default_text(source: str, name: str) -> str | None:
    """The project's own text for the demo model, where jquant runs from its repository."""
    path = Path(jquant.__file__).parent.parent / "data" / name
    return str(path) if source == "demo" and path.exists() else None


def read_text(path: str) -> tuple[str, str]:
    """A file's text and the SHA-256 of its bytes.

    Raises:
      OSError: it can't be read.
      JQuantError: it is no text in UTF-8.
    """
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8"), hashlib.sha256(content).hexdigest()
    except UnicodeDecodeError as error:
        raise JQuantError(f"{path}: not a text in UTF-8 (byte {error.start}); convert it first") from error


def cut_text(path: str, content: tuple[str, str], tokenizer: Any, length: int, count: int) -> Text:
    """The first `count` windows of a text that `read_text` gave; says so where there are fewer."""
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode(content[0])
    try:
        cut = windows(ids, length, count)
    except JQuantError as error:
        raise JQuantError(f"{path}: {error} (--length)") from error
    if len(cut) < count:
        say(f"{path} holds {len(cut)} windows of {length} tokens; all are used")
    return Text(Path(path), content[1], cut)


def check_length(model: Model, length: int) -> None:
    """Refuses windows that are longer than the model's own limit."""
    if length > model.config.max_position_embeddings:
        raise UsageError(f"--length {length}: the model was trained on {model.config.max_position_embeddings} tokens")
