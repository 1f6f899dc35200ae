"""The error of this room, and the one sentence about optional packages."""

import importlib
from types import ModuleType

from jquant.core.errors import JQuantError


class ModelError(JQuantError):
    """A model that can't be read, built or run; the message names the file or tensor, what is wrong, what to do."""


def require(name: str) -> ModuleType:
    """Imports an optional package of the extra `models`. ModelError that says what to install when it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            f'the package `{name}` is needed to read this model and is missing: pip install "jquant[models]"'
        ) from error
