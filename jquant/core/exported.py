"""The static data of a QTensor as bytes: `jax.export` writes it with the programs that take one."""

import dataclasses
import json
from typing import Any

from jquant.core.activation import Activation
from jquant.core.errors import JQuantError, TraceError
from jquant.core.formats import Format


def static_to_bytes(static: tuple[Any, ...]) -> bytes:
    """JSON of the second half of `QTensor.tree_flatten`."""
    fmt, *rest, activation = static
    act = None if activation is None else dataclasses.asdict(activation)
    return json.dumps([dataclasses.asdict(fmt), *rest, act]).encode()


def static_from_bytes(data: bytes) -> tuple[Any, ...]:
    """The inverse of `static_to_bytes`.

    Raises:
      TraceError: another version of jquant wrote a format that this one does not know.
    """
    fmt, contracted, inner, pad, dtype, act = json.loads(data)
    try:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fmt.items()}
        activation = None if act is None else Activation(**act)
        return (Format(**values), tuple(contracted), tuple(inner), pad, dtype, activation)
    except (TypeError, JQuantError) as e:
        raise TraceError(f"an exported program takes a QTensor that this jquant does not know, {fmt}: {e}") from e
