"""One product of activations with a weight on this device: float32, bfloat16, formats and policies, milliseconds.

    python benchmarks/products.py [--size 4096] [--rows 1 4 256] [--dtype bfloat16]

The floor is the bytes of the weight over the rate of a plain read of the float32 weight. Best of twelve runs of each.
--dtype is that of what is multiplied with the quantized weights, and of what these decode to.
"""

import argparse
import os

import jax
import jax.numpy as jnp
from clock import best

import jquant as jq
from jquant import ops
from jquant.core.activation import split_policy
from jquant.core.formats import compute_params
from jquant.core.qtensor import encode_array

FORMATS = ("int8", "int4-g64", "int4-g64-asym", "int3-g64", "nf4-g64", "int8+int8", "int4-g64+int8", "fp8_e4m3+fp8_e4m3")


def ms(fn, *args) -> float:
    return best(fn, *args, repeats=12) * 1e3


def weight(w: jax.Array, name: str) -> jq.QTensor:
    fmt, activation = split_policy(jq.parse_policy(name))
    return encode_array(w, compute_params(w, fmt), fmt, (-1,)).replace(activation=activation)


def product(x: jax.Array, q: jq.QTensor) -> jax.Array:
    return (ops.dot if q.activation is None else ops.low_precision.dot)(x, q)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 256])
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    w = jax.random.normal(jax.random.key(0), (args.size, args.size))
    half = w.astype(jnp.bfloat16)
    quantized = {f: weight(w, f).astype(args.dtype) for f in args.formats}
    print("| rows | float32 | bfloat16 | " + " | ".join(quantized) + " |\n|" + "---|" * (len(quantized) + 3))
    for rows in args.rows:
        x = jax.random.normal(jax.random.key(1), (rows, args.size))
        plain = [ms(lambda x, w: x @ w, x, w), ms(lambda x, w: x @ w, x.astype(jnp.bfloat16), half)]
        packed = [ms(product, x.astype(args.dtype), q) for q in quantized.values()]
        print(f"| {rows} | " + " | ".join(f"{t:.1f}" for t in [*plain, *packed]) + " |", flush=True)
    read = w.nbytes / ms(lambda w: jnp.sum(w, axis=0), w) / 1e6
    print(f"\n{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}. A plain read: {read:.1f} GB/s.")


if __name__ == "__main__":
    main()
