"""The product through Pallas' Triton backend: the codes are all of the weight that is read from memory.

The weight is the left operand of the tensor core, upcast in registers on the way from shared memory; a row of
activations is a column of the right one. So few rows cost little, and no upcast weight is written anywhere. A word of
codes holds several elements that lie side by side in a row (four of 4 bits in 16). They are not put in a row again: the
activations are parted instead, once, into the elements of the first lane, of the second, and so on, and the products of
the lanes are added:

    sum_k w_k x_k  =  sum_l sum_j w_(j L + l) x_(j L + l)

Groups of at least 16 elements a lane have sums of their own, which the scale multiplies, in float32; a step of the loop
takes a part of a group, or several. In smaller groups (16 and 32) it multiplies the upcast elements, as if the weight
had been dequantized in the dtype of the activations.

float32 activations are parted into three bfloat16 numbers that add up to them, as three times the rows: codes are exact
in bfloat16, so the product is one of float32.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import compat
from pallas_kernels.blocks import indices, load, mask, program
from pallas_kernels.gpus import gpu
from pallas_kernels.quantized_matmul import packed as two_at_a_time
from pallas_kernels.quantized_matmul import upcast
from pallas_kernels.quantized_matmul.elements import Element, element, plane_widths
from pallas_kernels.quantized_matmul.rings import group_of
from pallas_kernels.quantized_matmul.tilings import MIN_LANE_K, Problem, Tiling, choose


class Weight(NamedTuple):
    """What is known of the weight before the program runs.

    Attributes:
      name: of the element.
      group: elements that share a scale; 0 where a row does.
      k: elements of a row.
      word_bytes: bytes of a word of the narrowest plane.
    """

    name: str
    group: int
    k: int
    word_bytes: int = 1

    @property
    def element(self) -> Element:
        return element(self.name)

    @property
    def lanes(self) -> int:
        return upcast.lanes(self.element.bits, self.word_bytes)


def word_bytes(name: str, group: int, k: int, block_k: int | None, dtype: Any) -> int:
    """Words of 2 bytes are loaded 16 bytes at a time and upcast two by two; 1 where groups or blocks are too small."""
    bits, least = element(name).bits, MIN_LANE_K * upcast.lanes(element(name).bits, 2)
    if bits not in (2, 4, 8) or k * bits % 16 or (block_k is not None and block_k < least):
        return 1
    part = group & -group
    # In float32 a step must lie within a group.
    return 2 if group == 0 or part >= least or (part == group and dtype != jnp.float32) else 1


def parts_of(weight: Weight, t: Tiling) -> int:
    """Groups of a step whose sums are apart, so that a scale multiplies each; 1 where a step is in a group."""
    group = weight.group
    apart = group > 0 and group % (MIN_LANE_K * weight.lanes) == 0 and group & -group == group
    return t.block_k // group if apart and t.block_k > group and t.block_k % group == 0 else 1


def weight_of(name: str, group_size: int | None, k: int, block_k: int | None, dtype: Any) -> Weight:
    """How a kernel whose steps are `block_k` elements (None: any) reads a weight for products in `dtype`."""
    group = group_of(group_size, k)
    return Weight(name, group, k, word_bytes(name, group, k, block_k, dtype))


def small_groups(w: Weight) -> bool:
    """Whether scales multiply elements: a tensor core contracts no less than a step that spans several groups."""
    return 0 < (w.group & -w.group) < MIN_LANE_K * w.lanes


def as_read(
    planes: tuple[jax.Array, ...], scale: jax.Array, zero_point: jax.Array | None, w: Weight
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Codes as words of every plane; scales, and zero points if there are any, of each row, without the axis of one."""
    rows = (*planes[0].shape[:-1], scale.shape[-1])
    scales = [upcast.stored_scale(jnp.broadcast_to(scale, rows))]
    if zero_point is not None:
        scales.append(upcast.stored_zero(jnp.broadcast_to(zero_point, rows)))
    scales = scales if w.group else [jnp.squeeze(s, -1) for s in scales]
    return upcast.as_words(planes, w.element.bits, w.lanes), scales


def why_not(name: str, group_size: int | None, k: int, n: int, dtype: Any) -> str | None:
    """Why this kernel can't do a product; None where it can."""
    e = element(name)
    weight = weight_of(name, group_size, k, None, dtype)
    group, lanes = weight.group, weight.lanes
    if jnp.dtype(dtype).name not in ("bfloat16", "float16", "float32"):
        return f"activations are {jnp.dtype(dtype).name}, not bfloat16, float16 or float32"
    if 0 in (k, n):
        return "an empty weight"
    if len(plane_widths(e.bits)) > 1 and k % 32:
        return f"codes of {e.bits} bits lie in planes, whose words need a row of a multiple of 32 elements, not {k}"
    if group:
        if small_groups(weight) and group & -group != group:
            return f"groups of {group} are cut at no power of two of {MIN_LANE_K * lanes} elements"
        if group % lanes:
            return f"groups of {group} end within a word of {lanes} codes"
        if e.kind == "table" and dtype == jnp.float32 and small_groups(weight):
            return "a table of float32 values in small groups"
    return None


def quantized_matmul(
    x: jax.Array,
    planes: tuple[jax.Array, ...],
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    element: str,
    group_size: int | None = None,
    out_dtype: Any = None,
    device: str | None = None,
    tiling: Tiling | None = None,
    packed: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """`x` times the transposed weight, as `reference.quantized_matmul` says.

    Args:
      x: `[M, K]` or `[B, M, K]`; bfloat16, float16 or float32.
      planes: the codes, uint8 `[N, bytes]` for each plane (`reference.pack`), or `[B, N, bytes]` where x has a B.
      scale: `[N (or 1), blocks]` behind the same B; float32, bfloat16, float16, float8_e8m0fnu or float8_e4m3fn.
      zero_point: the shape of `scale`, uint8 or float, or None.
      element, group_size: how the weight is stored.
      out_dtype: of the result; that of x by default.
      device: the GPU that tilings are chosen for; by default as `compat.device_of` says.
      tiling: to choose it oneself.
      packed: upcast elements two and four at a time (see `packed`), where that can be and no interpreter runs.
      interpret: run on the CPU, slowly, to see that the numbers are right; without `packed`.

    Returns:
      `[M, N]` or `[B, M, N]`.

    Raises:
      ValueError: `why_not` has a reason.
    """
    k, n, device = x.shape[-1], planes[0].shape[-2], compat.device_of(device)
    reason = why_not(element, group_size, k, n, x.dtype)
    if reason is not None:
        raise ValueError(f"quantized_matmul: no Triton kernel for {element} x {x.dtype}: {reason}")
    weight = weight_of(element, group_size, k, tiling.block_k if tiling else None, x.dtype)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    run = partial(
        _run, planes=planes, scale=scale, zero_point=zero_point, device=device, tiling=tiling,
        packed=packed and not interpret, interpret=interpret,
    )  # fmt: skip
    if 0 in x.shape[:-1]:
        return jnp.zeros((*x.shape[:-1], n), out_dtype)
    if x.dtype != jnp.float32:
        return run(x, weight=weight, out_dtype=out_dtype)
    parts = _three_parts(x)
    total = _sum_parts(run(parts, weight=weight, out_dtype=jnp.dtype("float32")), x.shape[-2])
    if weight.element.kind == "table":  # its values are no bfloat16 numbers: the rest of each is one more product
        rest = run(parts, weight=weight, out_dtype=jnp.dtype("float32"), rest=True)
        total = total + _sum_parts(rest, x.shape[-2])
    return total.astype(out_dtype)


def _three_parts(x: jax.Array) -> jax.Array:
    """float32 `[..., M, K]` as bfloat16 `[..., 3 M, K]`, three rows that add up to one."""

    # By bits: XLA may take x - x.astype(bfloat16).astype(float32) for nothing.
    def top(x: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFF0000)
        return lax.bitcast_convert_type(bits, jnp.float32)

    first = top(x)
    second = top(x - first)
    third = x - first - second
    return jnp.concatenate([p.astype(jnp.bfloat16) for p in (first, second, third)], axis=-2)


def _sum_parts(out: jax.Array, m: int) -> jax.Array:
    first, second, third = (lax.slice_in_dim(out, i * m, (i + 1) * m, axis=-2) for i in range(3))
    return third + second + first


def _run(
    x: jax.Array,
    planes: tuple[jax.Array, ...],
    scale: jax.Array,
    zero_point: jax.Array | None,
    weight: Weight,
    out_dtype: Any,
    device: str,
    tiling: Tiling | None,
    packed: bool,
    interpret: bool,
    rest: bool = False,
) -> jax.Array:
    """The product of 16-bit activations."""
    batched = x.ndim == 3
    m, n, e = x.shape[-2], planes[0].shape[-2], weight.element
    p = Problem(x.shape[0] if batched else 1, m, n, weight.k, e.bits, weight.lanes, weight.group or weight.k)
    t = tiling or choose(p, device, gpu(device))
    words, scales = as_read(planes, scale, zero_point, weight)
    parted = _part(x, weight, words[0].shape[-1])
    how = dict(weight=weight, t=t, scale_dtype=scale.dtype.name, rest=rest, packed=packed)
    call = partial(_call, how=how, interpret=interpret)
    dtype = jnp.dtype("float32") if t.split_k > 1 else out_dtype
    one = lambda x, words, scales: call(x, words, scales, out_dtype=dtype)
    with compat.lowering_for(gpu(device).kind):
        out = (jax.vmap(one) if batched else one)(parted, words, scales)
    return jnp.sum(out, axis=-3).astype(out_dtype) if t.split_k > 1 else jnp.squeeze(out, -3)


def _part(x: jax.Array, w: Weight, words: int) -> jax.Array:
    """`[..., M, K]` as `[..., lanes M, words]`: the elements of the first lane, then those of the second, and so on."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, words * w.lanes - x.shape[-1])])
    lanes = jnp.moveaxis(x.reshape(*x.shape[:-1], words, w.lanes), -1, -3)
    return lanes.reshape(*x.shape[:-2], w.lanes * x.shape[-2], words)


def _call(
    x: jax.Array,
    words: list[jax.Array],
    scales: list[jax.Array],
    *,
    how: dict[str, Any],
    out_dtype: Any,
    interpret: bool,
) -> jax.Array:
    """`[lanes M, words]` -> `[split_k, M, N]`."""
    weight, t = how["weight"], how["t"]
    m, n = x.shape[0] // weight.lanes, words[0].shape[0]
    kernel = partial(_kernel, planes=len(words), **how)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((t.split_k, m, n), out_dtype),
        grid=(pl.cdiv(m, t.block_m) * pl.cdiv(n, t.block_n), t.split_k),
        compiler_params=compat.CompilerParams(num_warps=t.warps, num_stages=t.stages),
        interpret=interpret,
        name=f"quantized_matmul_{weight.name}",
    )(x, *words, *scales)


# --- the kernel ---


def _kernel(
    x_ref: Any, *refs: Any, planes: int, weight: Weight, t: Tiling, scale_dtype: str, rest: bool, packed: bool
) -> None:
    *ins, out_ref = refs
    word_refs, scale_ref, zero_ref = ins[:planes], ins[planes], (ins[planes + 1] if len(ins) > planes + 1 else None)
    lanes, words = weight.lanes, x_ref.shape[1]
    m = x_ref.shape[0] // lanes
    n = word_refs[0].shape[0]
    dtype = x_ref.dtype
    row, col = program(m, n, t.block_m, t.block_n)
    rows_m, rows_n = pl.ds(row * t.block_m, t.block_m), pl.ds(col * t.block_n, t.block_n)
    parts = parts_of(weight, t)
    width = t.block_k // lanes // parts
    steps = pl.cdiv(words, width * parts)
    part = pl.cdiv(steps, t.split_k)
    first = pl.program_id(1) * part
    count = part if steps % part == 0 and steps // part == t.split_k else jnp.minimum(part, steps - first)
    scaler = Scaler(scale_ref, zero_ref, weight, t.block_k // parts, scale_dtype, rows_n, n, t.inside)

    def one(acc: jax.Array, at: Any, stored: tuple[Any, Any]) -> jax.Array:
        columns = pl.ds(at * width, width)
        code_mask, x_mask = (mask(r, (columns, words), parts) for r in ((rows_n, n), (rows_m, m)))
        loaded = tuple(load(r, (rows_n, columns), code_mask) for r in word_refs)
        scale, zero = scaler.numbers(stored, dtype)
        sums = None if scaler.on_sums else acc  # what a tensor core adds to
        for lane, w in enumerate(elements(loaded, zero, weight, dtype, rest, packed)):
            x = load(x_ref, (pl.ds(rows_m.start + lane * m, t.block_m), columns), x_mask)
            if scaler.inside:
                w = upcast.times(w, scale, dtype)
            product = compat.dot(w, x.T)
            sums = product if sums is None else sums + product
        assert sums is not None
        return acc + sums * scale if scaler.on_sums else sums

    def read(at: Any) -> tuple[tuple[Any, Any], ...]:
        return tuple(scaler.read(at * parts + p) for p in range(parts))

    def step(i: Any, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        acc, early = carry
        at = first + i
        # Triton hides the latency of what a tensor core multiplies, not of these: they are read a step before.
        now, later = (early, read(jnp.minimum(at + 1, steps - 1))) if scaler.early else (read(at), ())
        for p in range(parts):
            acc = one(acc, at * parts + p, now[p])
        return acc, later

    start = jnp.zeros((t.block_n, t.block_m), jnp.float32)
    acc, _ = lax.fori_loop(0, count, step, (start, read(first) if scaler.early else ()))
    acc = acc * scaler.last()
    where = (pl.program_id(1), rows_m, rows_n)
    plt.store(out_ref.at[where], acc.T.astype(out_ref.dtype), mask=mask((rows_m, m), (rows_n, n)))


def elements(
    words: tuple[jax.Array, ...], zero: Any, w: Weight, dtype: Any, rest: bool, packed: bool
) -> Sequence[jax.Array]:
    """The elements of every lane, without their scale; of floats up to `upcast.small_float_unit`."""
    e = w.element
    if e.kind == "table":
        near = np.asarray(e.table, np.float32).astype(dtype).astype(np.float32)
        e = e._replace(table=tuple(np.asarray(e.table, np.float32) - near) if rest else tuple(near))
    if packed and two_at_a_time.can(words, e, [zero], dtype):
        return two_at_a_time.values(words[0], e, [zero] * w.lanes, dtype)
    codes = [upcast.lane_codes(words, e.bits, lane) for lane in range(w.lanes)]
    if e.kind == "int":
        return [upcast.integers(c, e.bits, zero, dtype) for c in codes]
    if e.kind == "float":
        return [upcast.small_floats(c, e, dtype) for c in codes]
    return [upcast.table(c, e.table, dtype) for c in codes]


class Scaler(NamedTuple):
    """Reads scales and zero points for parts of `size` elements; they multiply `elements`, or the sums of a part."""

    scale_ref: Any
    zero_ref: Any
    weight: Weight
    size: int
    scale_dtype: str
    rows: Any
    n: int
    elements: bool = False

    @property
    def spread(self) -> bool:
        """A part has several groups: their scales are spread over its elements."""
        return 0 < self.weight.group < self.size

    @property
    def inside(self) -> bool:
        """Scales multiply the elements."""
        return self.spread or (self.elements and self.weight.group > 0)

    @property
    def on_sums(self) -> bool:
        """Scales multiply the sums of a part."""
        return self.weight.group > 0 and not self.inside

    @property
    def early(self) -> bool:
        """A part lies in a group: a scale for each row."""
        return self.weight.group >= self.size

    def read(self, at: Any) -> tuple[Any, Any]:
        """Scales and zero points of part `at` as they are stored, broadcasting against sums or elements; or None."""
        if self.spread:
            return self._spread(self.scale_ref, at), None if self.zero_ref is None else self._spread(self.zero_ref, at)
        block = at * self.size // self.weight.group if self.weight.group else 0
        if self.early:  # the last step may have parts beyond the end
            block = jnp.minimum(block, self.scale_ref.shape[1] - 1)
        scale = self._column(self.scale_ref, block) if self.weight.group else None
        return scale, None if self.zero_ref is None else self._column(self.zero_ref, block)

    def numbers(self, stored: tuple[Any, Any], dtype: Any) -> tuple[Any, Any]:
        """What `read` gave, as numbers."""
        scale, zero = stored
        if scale is not None:
            scale = upcast.scale_numbers(scale, self.scale_dtype, *([dtype] if self.inside else []))
        if zero is not None:
            zero = zero.astype(jnp.float32 if zero.dtype == jnp.float32 else dtype)
        return scale, zero

    def last(self) -> jax.Array | float:
        """What multiplies the sums at the end: the scale of the row, and the unit of small floats."""
        e = self.weight.element
        unit = 1 / upcast.small_float_unit(e) if e.kind == "float" else 1.0
        if self.weight.group:
            return unit
        return upcast.scale_numbers(self._column(self.scale_ref, 0), self.scale_dtype) * unit

    def _column(self, ref: Any, block: Any) -> jax.Array:
        ends = None if self.n % self.rows.size == 0 else (indices(self.rows) < self.n)
        return load(ref, (self.rows, block) if self.weight.group else (self.rows,), ends)[:, None]

    def _spread(self, ref: Any, at: Any) -> jax.Array:
        """`[block_n, size / lanes]`: that of each element of a lane."""
        count, lanes = self.size // self.weight.group, self.weight.lanes
        where = pl.ds(at * count, count)
        per_block = load(ref, (self.rows, where), mask((self.rows, self.n), (where, ref.shape[1])))
        whole = (self.rows.size, count, self.weight.group // lanes)
        return jnp.broadcast_to(per_block[:, :, None], whole).reshape(self.rows.size, -1)
