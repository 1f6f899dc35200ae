"""Products whose two operands are rounded: codes times codes, the scales applied to the sums.

With codes a, u, zero points z, y and scales r (of a row of the input), s (of a block g of a row of the weight):

    out = r  sum_g s_g  sum_{k in g} (a_k - z) (u_k - y_g)

and the inner sum is, exactly, in int32:  sum a u  -  y sum a  -  z sum u  +  |g| z y.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jquant.core.activation import Activation, encode_input
from jquant.core.formats import ELEMENTS, BlockParams, Format, decode
from jquant.core.qtensor import QTensor
from jquant.ops import gpu, gpu_codes
from jquant.ops.choice import PROVEN, How, pick, words
from jquant.ops.dot import apart, beside, fits, takes
from jquant.ops.dot import dot as float_dot
from jquant.ops.operands import Side, floats8, integers

_INT32_MAX = 2**31 - 1
_FULL = lax.Precision.HIGHEST


def dot(
    x: jax.Array, q: QTensor, *, batch: Sequence[int] = (), out_dtype: Any = jnp.float32, kernels: str = "auto"
) -> tuple[jax.Array, How]:
    """Rounds `x` as `q.activation` says and contracts its last axis with the contracted axes of `q`.

    A side of `q` is multiplied by what the rounded `x` stands for, in the dtype of `x`; one that takes what it carries
    out of the input, by `x` itself, and rounded is what is left.

    Args:
      x: `[*batch axes, tokens, n]`, any float dtype.
      q: the weight, n elements along its contracted axes.
      batch: axes of `q` that `x` has too, in front (experts).
      out_dtype: of the result. Sums are float32.
      kernels: as for `choice.pick`.

    Returns:
      `[*batch axes, tokens, *other kept axes]`, and how it runs.
    """
    act = q.activation
    assert act is not None
    if not fits(q, batch):
        x = round_input(x.astype(jnp.float32), act, static_params(q, batch))
        out, how = float_dot(x, q.replace(dtype="float32"), batch=batch, precision=_FULL, kernels=kernels)
        return out.astype(out_dtype), how
    rest, t = apart(x, q, batch, None) if takes(q) else (x, None)
    codes, params = encode_input(rest, act, static_params(q, batch))
    if q.side is None:
        return _codes_dot(codes, params, q, batch, out_dtype, kernels)
    if t is None:
        _, t = apart(decode(codes, params, act.format).astype(x.dtype), q, batch, None)
    out, how = beside(lambda q, wide: _codes_dot(codes, params, q, batch, jnp.float32, kernels), t, q, batch, None)
    return out.astype(out_dtype), how


def _codes_dot(
    codes: jax.Array, params: BlockParams, q: QTensor, batch: Sequence[int], out_dtype: Any, kernels: str
) -> tuple[jax.Array, How]:
    """The product of a rounded input with the codes of `q`."""
    act, batch = q.activation, tuple(batch)
    assert act is not None
    kind = product_kind(act, q.format, q.row_length)

    def scaled(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def scaled_run(codes: jax.Array, params: BlockParams, q: QTensor) -> jax.Array:
            out = run(codes, params.zero_point, q)
            scale = params.scale.reshape(*params.scale.shape[:-1], *[1] * (out.ndim - codes.ndim + 1))
            return (out * scale).astype(out_dtype)

        return scaled_run

    name = _name(kind, act, q)
    if kind == "float":
        out, how = _decoded_dot(codes, params.zero_point, q, batch, kernels)
        return scaled(lambda *_: out)(codes, params, q), how._replace(text=f"{name}; {how.text}")
    of_kind = KINDS[kind]
    run = lambda how: scaled(lambda *args: how(of_kind, *args, batch))
    chosen, reason = _chosen(kind, codes, q, batch, out_dtype, kernels)
    on_gpu: dict[str, Callable[..., jax.Array]] = {
        "weights": scaled(lambda codes, zero, q: _packed(codes, zero, q, batch)),
        "codes": lambda codes, params, q: gpu_codes.dot(codes, params, q, kind, batch=batch, out_dtype=out_dtype),
    }
    # Chosen when the program is lowered, for the platform it is lowered for.
    more = {} if chosen == "xla" else {"cuda": on_gpu[chosen]}
    out = lax.platform_dependent(codes, params, q, cpu=run(_on_cpu), default=run(_native), **more)
    return out, How(f"{name}; {words(chosen, reason)}", PROVEN.get(chosen, ""), reason)


def _chosen(
    kind: str, codes: jax.Array, q: QTensor, batch: tuple[int, ...], out_dtype: Any, kernels: str
) -> tuple[str, str]:
    """What multiplies on an NVIDIA GPU, and why it is no kernel, as `choice.pick` says."""
    if q.format.blocks(q.row_length) > 1:
        row = "int8 in groups" if kind == "int" else "fp8 in groups"
    elif kind == "int":
        row = "int8 x int8" if q.format.bits == 8 else "int8 x fewer bits"
    else:
        row = "fp8"
    reasons: dict[str, Callable[[], str | None]] = {
        "weights": lambda: gpu.why_not_exact(codes, q, batch, jnp.float32),
        "codes": lambda: gpu_codes.why_not(codes, q, kind, out_dtype),
    }
    return pick(row, codes.shape[-2], kernels, lambda name: reasons[name]())


def static_params(q: QTensor, batch: Sequence[int] = ()) -> BlockParams | None:
    """Scale and zero point of a static range as the input has its axes, `[*batch, 1, 1]`; None for a dynamic one."""
    if q.activation_params is None:
        return None
    first = [q.kept.index(a) for a in batch]

    def place(a: jax.Array) -> jax.Array:
        lead = jnp.moveaxis(a, first, range(len(first)))
        return lead.reshape(*lead.shape[: len(first)], 1, 1)  # the other kept axes have one entry

    return jax.tree.map(place, q.activation_params)


def product_kind(act: Activation, fmt: Format, n: int) -> str:
    """ "int", "fp8", or "float" where no product of the two elements exists."""
    a, w = ELEMENTS[act.element], ELEMENTS[fmt.element]
    if fmt.zero_dtype != "uint8":
        return "float"  # a zero point between codes
    if a.kind == w.kind == "int":
        length = fmt.group_size or n
        return "int" if length * _largest(act.format) * _largest(fmt) <= _INT32_MAX else "float"
    if a.kind == "float" and w.kind == "float" and {a.storage, w.storage} <= _FP8:
        return "fp8"
    # Integers of up to four bits, their zero point taken away, are numbers of e4m3.
    return "fp8" if act.element == "fp8_e4m3" and w.kind == "int" and w.bits <= 4 else "float"


_FP8 = {"float8_e4m3fn", "float8_e5m2"}


def _largest(fmt: Format) -> int:
    """The largest magnitude of an integer, its zero point taken away."""
    return 2 ** (fmt.bits - 1) if fmt.symmetric else 2**fmt.bits - 1


def _name(kind: str, act: Activation, q: QTensor) -> str:
    if kind == "float":
        zero = "" if q.format.zero_dtype == "uint8" else " and its zero points between codes"
        return f"input rounded, product in float: there is none of {act.element} with {q.format.element}{zero}"
    text = {"int": "int8 x int8 -> int32", "fp8": "fp8 x fp8 -> float32"}[kind]
    if q.format.blocks(q.row_length) > 1:
        return f"{text} in groups of {q.format.group_size}; on a CPU codes decoded into a float32 product"
    return text + ("; on a CPU the same products in bfloat16" if kind == "fp8" else "")


# --- the products: (input codes, its zero point, weight, batch axes) -> float32, without the input's scale ---


class _Layout(NamedTuple):
    """Where the result `[*batch, tokens, *other kept]` has the kept axes of the weight: `first` are its batch axes."""

    first: tuple[int, ...]

    def place(self, a: jax.Array) -> jax.Array:
        """`[*kept]` -> `[*batch, 1, *other kept]`."""
        lead = len(self.first)
        return jnp.expand_dims(jnp.moveaxis(a, self.first, range(lead)), lead)

    def contract(self, a: jax.Array, u: jax.Array, dtype: Any) -> jax.Array:
        numbers = (((a.ndim - 1,), (u.ndim - 1,)), (tuple(range(len(self.first))), self.first))
        return lax.dot_general(a, u, numbers, precision=_FULL, preferred_element_type=dtype)


def _layout(q: QTensor, batch: tuple[int, ...]) -> _Layout:
    return _Layout(tuple(q.kept.index(b) for b in batch))


Total = Callable[[Side, Side, Any, _Layout], jax.Array]


class _Kind(NamedTuple):
    """How one low precision is multiplied: codes to operands, and the sums of a block, on a CPU and elsewhere."""

    side: Callable[..., Side]
    total: Total
    cpu_total: Total


def _native(kind: _Kind, codes: jax.Array, zero: Any, q: QTensor, batch: tuple[int, ...]) -> jax.Array:
    return _blocks(kind.side, kind.total, codes, zero, q, batch)


def _on_cpu(kind: _Kind, codes: jax.Array, zero: Any, q: QTensor, batch: tuple[int, ...]) -> jax.Array:
    # 512 x 4096 x 4096 in groups of 64: 80 ms decoded, 130 ms as int8 group by group (AMX, jax 0.10.2 and 0.12).
    if q.format.blocks(q.row_length) > 1:
        return _decoded(codes, zero, q, batch)
    return _blocks(kind.side, kind.cpu_total, codes, zero, q, batch)


def _blocks(side: Any, total: Total, codes: jax.Array, zero: Any, q: QTensor, batch: tuple[int, ...]) -> jax.Array:
    assert q.activation is not None
    a, u = side(codes, zero, q.activation.format), side(q.unpacked(), q.row_params()[1], q.format)
    run = _groups if q.format.blocks(q.row_length) > 1 else _one_group
    return run(a, u, q, _layout(q, batch), total)


def _one_group(a: Side, u: Side, q: QTensor, layout: _Layout, total: Total) -> jax.Array:
    sums = total(a, u, q.row_length, layout)
    return sums.astype(jnp.float32) * layout.place(q.row_params()[0][..., 0])


def _groups(a: Side, u: Side, q: QTensor, layout: _Layout, total: Total) -> jax.Array:
    """Group by group: all their sums at once would be as many times the result."""
    g, n = q.format.group_size, q.row_length
    assert g is not None
    sizes = np.minimum(g, n - g * np.arange(-(-n // g))).astype(np.int32)

    def cut(codes: jax.Array) -> jax.Array:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -n % g)])
        return jnp.moveaxis(codes.reshape(*codes.shape[:-1], -1, g), -2, 0)

    def step(acc: jax.Array, xs: Any) -> tuple[jax.Array, None]:
        a_codes, u_codes, y, s, size = xs
        sums = total(Side(a_codes, a.zero), Side(u_codes, None if y is None else y[..., None]), size, layout)
        return acc + sums.astype(jnp.float32) * layout.place(s), None

    zero = None if u.zero is None else jnp.moveaxis(u.zero, -1, 0)
    xs = (cut(a.codes), cut(u.codes), zero, jnp.moveaxis(q.row_params()[0], -1, 0), sizes)
    first = jax.tree.map(lambda v: v[0], xs)
    shape = jax.eval_shape(lambda xs: step(jnp.float32(0), xs)[0], first).shape
    return lax.scan(step, jnp.zeros(shape, jnp.float32), xs)[0]


def _int_total(a: Side, u: Side, size: Any, layout: _Layout) -> jax.Array:
    """The inner sum of the module's formula, int32 `[*batch, tokens, *other kept]`."""
    sums = layout.contract(a.codes, u.codes, jnp.int32)
    beside = lambda v: v.reshape(*v.shape, *[1] * (sums.ndim - v.ndim))
    if u.zero is not None:
        sums = sums - layout.place(u.zero[..., 0]) * beside(jnp.sum(a.codes, axis=-1, dtype=jnp.int32))
    if a.zero is not None:
        left = layout.place(jnp.sum(u.codes, axis=-1, dtype=jnp.int32))
        if u.zero is not None:
            left = left - size * layout.place(u.zero[..., 0])
        sums = sums - beside(a.zero[..., 0]) * left
    return sums


def _int_total_cpu(a: Side, u: Side, size: Any, layout: _Layout) -> jax.Array:
    # XLA:CPU has fast int8 products from two rows on; one row takes thirty times as long.
    if a.codes.shape[-2] != 1:
        return _int_total(a, u, size, layout)
    wide = jnp.pad(a.codes, [(0, 0)] * (a.codes.ndim - 2) + [(0, 3), (0, 0)])
    sums = _int_total(Side(wide, a.zero), u, size, layout)
    return lax.slice_in_dim(sums, 0, 1, axis=a.codes.ndim - 2)


def _fp8_total(a: Side, u: Side, size: Any, layout: _Layout) -> jax.Array:
    return layout.contract(a.codes, u.codes, jnp.float32)


def _fp8_total_cpu(a: Side, u: Side, size: Any, layout: _Layout) -> jax.Array:
    # Numbers of 8 bits are numbers of bfloat16, and their products are exact in float32.
    return layout.contract(a.codes.astype(jnp.bfloat16), u.codes.astype(jnp.bfloat16), jnp.float32)


def _packed(codes: jax.Array, zero: Any, q: QTensor, batch: tuple[int, ...], interpret: bool = False) -> jax.Array:
    """The weight-only kernel on the input's codes, which are numbers of bfloat16."""
    a = _numbers(codes, zero, q).astype(jnp.bfloat16)
    return gpu.dot(a, q, batch=batch, out_dtype=jnp.float32, exact=True, interpret=interpret)


def _decoded(codes: jax.Array, zero: Any, q: QTensor, batch: tuple[int, ...]) -> jax.Array:
    """The input's codes as floats times the decoded weight: the same numbers, added in float32."""
    return _decoded_dot(codes, zero, q, batch, "never")[0]


def _decoded_dot(
    codes: jax.Array, zero: Any, q: QTensor, batch: tuple[int, ...], kernels: str
) -> tuple[jax.Array, How]:
    q = q.replace(side=None, dtype="float32")  # decoded numbers are not rounded
    a = _numbers(codes, zero, q)
    return float_dot(a, q, batch=batch, precision=_FULL, preferred=jnp.float32, kernels=kernels)


def _numbers(codes: jax.Array, zero: Any, q: QTensor) -> jax.Array:
    """The input's codes, their zero point taken away, float32."""
    assert q.activation is not None
    ones = jnp.ones((*codes.shape[:-1], 1), jnp.float32)
    return decode(codes, BlockParams(ones, zero), q.activation.format)


KINDS = {
    "int": _Kind(integers, _int_total, _int_total_cpu),
    "fp8": _Kind(floats8, _fp8_total, _fp8_total_cpu),
}
# --- rounding with a derivative ---


@jax.custom_jvp
def straight_through(value: jax.Array, soft: jax.Array) -> jax.Array:
    """`value`, with the derivative of `soft`."""
    return value


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> Any:
    return primals[0], tangents[1]


def inside(x: jax.Array, params: BlockParams, fmt: Format) -> jax.Array:
    """Which of `x` `[..., n]` the codes reach, to a step: bool. `params` broadcast against `x`.

    The largest number of a block lies half a step beyond the last code, and a little more where its scale was rounded.
    """
    if fmt.element == "ternary":  # its outer codes stand for all that is beyond the mean, which nobody calls clipped
        return jnp.ones(x.shape, bool)
    scale, x = params.scale.astype(jnp.float32), x.astype(jnp.float32)
    element = ELEMENTS[fmt.element]
    low: Any = -element.top * (1 + 1 / 16)
    high: Any = element.top * (1 + 1 / 16)
    if element.kind == "int":
        zero = 2 ** (fmt.bits - 1) if params.zero_point is None else params.zero_point.astype(jnp.float32)
        low, high = -1 - zero, 2**fmt.bits - zero
    return (x >= low * scale) & (x <= high * scale)


def round_input(x: jax.Array, act: Activation, static: BlockParams | None = None, clip: bool = True) -> jax.Array:
    """The values that the codes of `x` stand for, with a straight-through derivative.

    Args:
      x: `[*batch, tokens, n]`, a float dtype; so is the result.
      act: how it is rounded.
      static: as `encode_input` takes it.
      clip: no derivative where `x` is beyond the range of the codes.
    """
    fixed = lax.stop_gradient(x)
    codes, params = encode_input(fixed, act, static)
    value = decode(codes, params, act.format).astype(x.dtype)
    soft = jnp.where(inside(fixed, params, act.format), x, fixed) if clip else x
    return straight_through(value, soft)
