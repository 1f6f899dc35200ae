"""What is given to `decode_attention`: the arrays of a cache, and how they are to be read.

B sequences (or pages of a pool), K kv heads, T positions, D head_dim.
"""

from typing import NamedTuple

import jax

from pallas_kernels.quantized_matmul.elements import Element, plane_widths


class Coded(NamedTuple):
    """Keys or values.

    Attributes:
      codes: uint8 `[B, K, T, bytes]`, the planes of `quantized_matmul.reference.pack` along the channels; or one array
        of floats `[B, K, T, D]`.
      scale: `[B, K, T, groups]`, or with blocks of N tokens `[B, K, T / N, D]`; any float dtype, float8_e8m0fnu and
        float8_e4m3fn included; or None.
      zero_point: like `scale`, or None.
      static: float32 `[K]`, one more scale, or None.
    """

    codes: tuple[jax.Array, ...]
    scale: jax.Array | None = None
    zero_point: jax.Array | None = None
    static: jax.Array | None = None


class Layout(NamedTuple):
    """What the codes stand for.

    Attributes:
      element: of the codes; None for floats.
      group: channels of a token that share a scale; 0 where all do, or none has one.
      tokens: N > 1: every channel has a scale for N consecutive tokens (KIVI's keys, arXiv 2402.02750).
    """

    element: Element | None = None
    group: int = 0
    tokens: int = 1


class State(NamedTuple):
    """A softmax under way, float32: the largest score, the sum of exp(score - largest), and the values weighted by
    these: `[B, K, R]`, `[B, K, R]`, `[B, K, R, D]`. Minus infinity, 0 and 0 for a query that sees nothing.
    """

    top: jax.Array
    total: jax.Array
    out: jax.Array


class Rules(NamedTuple):
    """Which positions a query sees, and how scores are made; static.

    Attributes:
      scale: what products are multiplied with.
      window: a query sees itself and the `window - 1` positions before it; None, all before it.
      sink_tokens: so many first positions are seen from everywhere.
      soft_cap: scores are `cap * tanh(score / cap)`; None leaves them.
      first: positions before it are not read (they are kept elsewhere).
      ring: position p lies in slot p modulo the number of slots.
      page_size: slots of a page where there is a table of pages; 0 without.
    """

    scale: float
    window: int | None = None
    sink_tokens: int = 0
    soft_cap: float | None = None
    first: int = 0
    ring: bool = False
    page_size: int = 0


def code_bytes(element: Element, dim: int) -> list[int]:
    """Bytes of the planes of one vector."""
    return [-(-dim * w // 8) for w in plane_widths(element.bits)]
