"""Every kernel, at the shapes of real models: checked, timed and tabled against XLA and the roofline; one command.

    python benchmarks/kernels.py [--model Llama-3.1-8B] [--rows 1 16 4096] [--formats int4-g128 int8] [--device h100]

On a GPU: the error against float32, microseconds of all kernels of the product on the GPU (CUPTI; launches and the gaps
between kernels are not in it) and of `jnp.dot` in bfloat16 by the same clock in the same run, the ratio, and the share of
the roofline: the slower of the bytes at the rate of a large copy and the operations at that of a large product, both
measured first. As many copies of a weight take turns as exceed the L2 cache; medians.

Elsewhere: what the compiler says, for `--device`: registers, spills, shared memory, occupancy, blocks, bytes of weight
that are read. No speed is claimed there.
"""

import argparse
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clock import ceilings, compiled, error_of, on_gpu

from pallas_kernels import harness, shapes
from pallas_kernels.gpus import GPUS, Gpu, gpu
from pallas_kernels.low_precision_matmul import low_precision_matmul
from pallas_kernels.low_precision_matmul.reference import low_precision_matmul as low_precision_reference
from pallas_kernels.quantized_matmul import quantized_matmul, reference, rings
from pallas_kernels.quantized_matmul.elements import element, plane_widths


class Format(NamedTuple):
    """A format of the weight: element, group, dtype of scales, whether it has zero points; `both`: activations too;
    `library`: the product of codes is XLA's, not the kernel's."""

    element: str
    group: int | None = None
    scale: str = "bfloat16"
    asymmetric: bool = False
    both: str = ""
    library: bool = False


FORMATS = {
    "int4-g128": Format("int4", 128),
    "int4-g128-asym": Format("int4", 128, asymmetric=True),
    "int4-g32": Format("int4", 32),
    "int4": Format("int4", None, "float32"),
    "int8": Format("int8", None, "float32"),
    "nf4-g64": Format("nf4", 64),
    "fp8_e4m3": Format("fp8_e4m3", None, "float32"),
    "mxfp4": Format("fp4_e2m1", 32, "float8_e8m0fnu"),
    "nvfp4": Format("fp4_e2m1", 16, "float8_e4m3fn"),
    "int3-g64": Format("int3", 64),
    "int8+int8": Format("int8", None, "float32", both="int8"),
    "fp8+fp8": Format("fp8_e4m3", None, "float32", both="float8_e4m3fn"),
    "int8+int8, XLA": Format("int8", None, "float32", both="int8", library=True),
    "fp8+fp8, XLA": Format("fp8_e4m3", None, "float32", both="float8_e4m3fn", library=True),
}


def arguments(f: Format, m: int, n: int, k: int) -> tuple:
    """The shapes of a product's arguments: activations, then the weight."""
    shape = jax.ShapeDtypeStruct
    if f.both:
        rows = lambda r: shape((r, 1), jnp.float32)
        return (shape((m, k), f.both), rows(m)), (shape((n, k), f.both), rows(n))
    blocks = 1 if f.group is None else -(-k // f.group)
    planes = tuple(shape((n, -(-k * w // 8)), jnp.uint8) for w in plane_widths(element(f.element).bits))
    zero = shape((n, blocks), jnp.uint8) if f.asymmetric else None
    return shape((m, k), jnp.bfloat16), (planes, shape((n, blocks), f.scale), zero)


def product(f: Format, device: str, right: bool = False):
    """The kernel of a format, or the definition of what is right, as a function of activations and weight."""
    if f.library and not right:
        return xla_of_codes
    if f.both:
        how = low_precision_reference if right else lambda *a: low_precision_matmul(*a, device=device)
        return lambda x, w: how(x[0], w[0], x[1], w[1])
    options = dict(element=f.element, group_size=f.group)
    if right:
        return lambda x, w: reference.quantized_matmul(x, *w, **options)
    return lambda x, w: quantized_matmul(x, *w, **options, device=device)


def xla_of_codes(x, w) -> jax.Array:
    """Codes times codes by XLA, the scales on the sums."""
    kind = jnp.int32 if x[0].dtype == jnp.int8 else jnp.float32
    sums = jax.lax.dot_general(x[0], w[0], (((1,), (1,)), ((), ())), preferred_element_type=kind)
    return (sums.astype(jnp.float32) * x[1] * w[1][:, 0]).astype(jnp.bfloat16)


def nbytes(tree) -> int:
    return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(tree))


def roofline(f: Format, m: int, n: int, k: int, g: Gpu) -> float:
    """Seconds that the product takes at least."""
    x, w = arguments(f, m, n, k)
    rate = g.int8_ops if f.both else g.bf16_flops
    return max((nbytes(x) + nbytes(w) + 2 * m * n) / g.bandwidth, 2 * m * n * k / rate)


# --- on a GPU ---


def random(tree, key):
    """Random arrays of these shapes; floats near one, codes of any bits."""

    def one(a, key):
        if a.dtype == jnp.uint8 or a.dtype == jnp.int8:
            return jax.lax.bitcast_convert_type(jax.random.bits(key, a.shape, jnp.uint8), a.dtype)
        return jax.random.uniform(key, a.shape, jnp.float32, 0.5, 1.0).astype(a.dtype)

    leaves, treedef = jax.tree.flatten(tree)
    made = treedef.unflatten([one(a, key) for a, key in zip(leaves, jax.random.split(key, len(leaves)))])
    if isinstance(tree, tuple) and len(tree) == 3 and tree[2] is not None:  # a weight: zero points are codes
        return made[0], made[1], made[2] & 15
    return made


def copies(tree, g: Gpu) -> list:
    """Random weights, as many as exceed the L2 cache."""
    count = max(2, min(64, math.ceil(3 * g.l2 / nbytes(tree))))
    return [random(tree, jax.random.key(i)) for i in range(1, count + 1)]


class Item(NamedTuple):
    """One line of the table on a GPU."""

    name: str
    layer: shapes.Linear
    m: int


def timed(items: list[Item], device: str) -> None:
    """Prints the lines."""
    copy, rate = ceilings()
    print(f"A copy moves {copy / 1e12:.2f} TB/s, a bfloat16 product runs at {rate / 1e12:.0f} TFLOP/s.\n\n{head(True)}", flush=True)
    sizes = dict.fromkeys((i.m, i.layer.n, i.layer.k) for i in items)
    half = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    dense = lambda x, w: x @ w.T
    xla = {}
    for (m, n, k), program in zip(sizes, compiled((dense, (half(m, k), half(n, k))) for m, n, k in sizes)):
        xla[m, n, k] = on_gpu(program, random(half(m, k), jax.random.key(0)), copies(half(n, k), gpu(device)))
    wanted = [(product(FORMATS[i.name], device, r), arguments(FORMATS[i.name], i.m, i.layer.n, i.layer.k))
              for i in items for r in (False, True)]  # fmt: skip
    programs = compiled(wanted)
    held: tuple[Any, list] = (None, [])
    for i, ours, right in zip(items, programs, programs):
        f, n, k = FORMATS[i.name], i.layer.n, i.layer.k
        front = f"| {i.layer.model} {i.layer.layer} | {i.m} x {n} x {k} | {i.name} |"
        x_shape, w_shape = arguments(f, i.m, n, k)
        if held[0] != (i.name, n, k):
            held = (i.name, n, k), copies(w_shape, gpu(device))
        x, weights = random(x_shape, jax.random.key(0)), held[1]
        try:
            got, want = (run_or_raise(p, x, weights[0]) for p in (ours, right))
            error = error_of(got, want)
            mine, other = on_gpu(ours, x, weights), xla[i.m, n, k]
        except Exception as failure:  # one kernel that fails must not hide the others
            print(f"{front} {type(failure).__name__}: {str(failure)[:200]} |", flush=True)
            continue
        floor = max(
            (nbytes(x_shape) + nbytes(w_shape) + 2 * i.m * n) / copy, 2 * i.m * n * k / (rate * (2 if f.both else 1))
        )
        print(f"{front} {error:.1e} | {mine * 1e6:.1f} | {other * 1e6:.1f} | {other / mine:.2f} | {floor / mine:.0%} |", flush=True)


def run_or_raise(program: Any, *args: Any) -> jax.Array:
    if isinstance(program, Exception):
        raise program
    return program(*args)


# --- without ---


def launched(kernel: harness.Kernel, f: Format, m: int, n: int, k: int, g: Gpu) -> harness.Kernel:
    """With its launch, which XLA does not write down for a kernel through Mosaic."""
    if "mosaic" not in kernel.name:
        return kernel
    p = rings.planned(f.element, rings.group_of(f.group, k), m, n, k, None, 1, g)
    return kernel._replace(shared_bytes=rings.shared_bytes(p), grid=(n // rings.HEIGHT, p.ring.split_k))


def static(name: str, layer: shapes.Linear, m: int, device: str, g: Gpu) -> str:
    f, n, k = FORMATS[name], layer.n, layer.k
    args = arguments(f, m, n, k)
    program = harness.compile_for(device, product(f, device), *args)
    [kernel] = program.named("_matmul_") or program.named("decode_")
    kernel = launched(kernel, f, m, n, k, g)
    counts = kernel.ptx.counts
    products = counts.get("wgmma.mma_async", 0) or counts.get("mma.sync", 0)
    return (
        f"| {layer.model} {layer.layer} | {m} x {n} x {k} | {name} | {kernel.registers} | {kernel.spill_bytes} "
        f"| {kernel.shared_bytes} | {kernel.occupancy(g):.0%} | {kernel.blocks} | {counts['all']} | {products} "
        f"| {nbytes(args[1]) / 1e6:.1f} | {roofline(f, m, n, k, g) * 1e6:.1f} |"
    )


HEADS = {
    True: "| layer | m x n x k | format | error | kernels, us | bf16 XLA, us | ratio | of the roofline |",
    False: "| layer | m x n x k | format | registers | spills | shared memory | occupancy | blocks | PTX instructions "
    "| tensor core products | weight, MB | roofline, us |",
}


def head(on_gpu: bool) -> str:
    return HEADS[on_gpu] + "\n|" + "---|" * (HEADS[on_gpu].count("|") - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--layers", nargs="*", help="such as q 'gate, up'; all of the model by default")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 4096])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--device", default="h100", choices=list(GPUS))
    parser.add_argument("--shapes", nargs="*", metavar="NxK", help="instead of a model's layers")
    args = parser.parse_args()
    g = gpu(args.device)
    layers = [s for s in shapes.of_model(args.model) if not args.layers or s.layer in args.layers]
    if args.shapes:
        layers = [shapes.Linear("", "", *map(int, s.split("x"))) for s in args.shapes]
    items = [Item(name, layer, m) for layer in layers for name in args.formats for m in args.rows]
    if jax.default_backend() == "gpu":
        print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
        return timed(items, args.device)
    print(f"compiled for {g.kind}, jax {jax.__version__}\n\n{head(False)}", flush=True)
    for name, layer, m in (i for i in items if not FORMATS[i.name].library):
        try:
            row = static(name, layer, m, args.device, g)
        except Exception as error:  # one kernel that fails must not hide the others
            row = f"| {layer.model} {layer.layer} | {m} x {layer.n} x {layer.k} | {name} | {type(error).__name__}: {str(error)[:200]} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
