"""The kernels in programs lowered for a GPU by a host that has none, inside every transformation."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.quantized_matmul import quantized_matmul

TARGET = "__gpu$xla.gpu.triton"


def dot(x, planes, scale):
    """The kernel on an NVIDIA GPU, XLA elsewhere: chosen when the program is lowered."""
    run = lambda how: lambda *args: quantized_matmul(*args, element="int4", group_size=32, implementation=how)
    return jax.lax.platform_dependent(x, planes, scale, cuda=run("triton"), default=run("xla"))


def scanned(x, planes, scale):
    return jax.lax.scan(jax.checkpoint(lambda h, w: (dot(h, *w), None)), x, (planes, scale))[0]


def arguments(layers=()):
    shape = jax.ShapeDtypeStruct
    return shape((64, 64), jnp.bfloat16), (shape((*layers, 64, 32), jnp.uint8),), shape((*layers, 64, 2), jnp.bfloat16)


def loss(f):
    return lambda *args: jnp.sum(f(*args).astype(jnp.float32) ** 2)


def mapped(f):
    return lambda x, *w: jax.vmap(f)(jnp.stack([x, x]), *w)


@pytest.mark.parametrize(
    "f, layers",
    [
        (dot, ()),
        (jax.value_and_grad(loss(dot)), ()),
        (scanned, (3,)),
        (jax.value_and_grad(loss(scanned)), (3,)),
        (mapped(dot), (2,)),
        (lambda x, *w: jax.vmap(lambda x: scanned(x, *w))(jnp.stack([x, x])), (3,)),
    ],
    ids=["jit", "grad", "scan", "grad of scan with remat", "experts", "vmap of scan"],
)
def test_the_kernel_is_in_the_program_of_a_gpu_and_only_there(f, layers):
    args = arguments(layers)
    text = lambda platform: jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    assert TARGET in text("cuda")
    assert TARGET not in text("cpu")


def test_the_program_is_one_kernel_and_no_dequantized_weight():
    program = jax.jit(dot).trace(*arguments()).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count(TARGET) == 1
    assert "stablehlo.dot_general" not in program


def test_a_program_is_exported_for_a_gpu_and_checked():
    """Its bytes are read again where flatbuffers is installed."""
    allowed = jax.export.DisabledSafetyCheck.custom_call(TARGET)
    exported = jax.export.export(jax.jit(dot), platforms=["cuda"], disabled_checks=[allowed])(*arguments())
    assert exported.platforms == ("cuda",) and exported.mlir_module().count(TARGET) == 1
    pytest.importorskip("flatbuffers")
    again = jax.export.deserialize(exported.serialize())
    assert again.mlir_module() == exported.mlir_module() and again.in_avals == exported.in_avals
