"""What the harness reads from PTX, ptxas and XLA's dumps: on texts, without a compiler."""

import pytest

from pallas_kernels import gpus, harness, ptx, shapes

PTX = """
.version 8.8
.target sm_90a
.visible .entry scale(
	.param .u64 .ptr .global .align 16 scale_param_0,
	.param .u64 .ptr .global .align 16 scale_param_1
)
.reqntid 128
{
	.reg .pred 	%p<2>;
	ld.param.b64 	%rd1, [scale_param_0];
	ld.param::entry.b64 	%rd2, [scale_param_1];
	cvta.to.global.u64 	%rd3, %rd1;
	add.s64 	%rd4, %rd3, %rd9;
	@%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd4 + 0 ], 0x10, %r2;
$L__BB0_1:
	add.s64 	%rd5, %rd4, 64;
	@%p1 cp.async.ca.shared.global [ %r1 + 0 ], [ %rd5 + 0 ], 8, %r2;
	mov.u16 %rs1, 0x0; @%p1 ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd2 + 0 ];
	wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r1}, {%r2}, %rd69, 0, 1, 1, 0;
	@%p1 bra 	$L__BB0_1;
	cp.async.commit_group;
	ret;
}
"""


def test_instructions_and_loads_are_counted():
    [kernel] = ptx.kernels(PTX)
    assert (kernel.name, kernel.threads) == ("scale", 128)
    assert kernel.counts["wgmma.mma_async"] == kernel.counts["cp.async.cg"] == kernel.counts["ld.global"] == 1
    assert kernel.loads == (
        ptx.Load("cp.async", 16, 0, None), ptx.Load("cp.async", 8, 0, 0), ptx.Load("ld.global", 16, 1, 0),
    )  # fmt: skip


def test_ptxas_is_read():
    log = """ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas info    : Function properties for f
    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 93 registers, used 1 barriers, 1024 bytes smem"""
    assert harness.parse_ptxas(log) == {"f": {"registers": 93, "spills": 20, "shared": 1024}}


def test_launches_are_read():
    line = "002: kCustomKernel [prev=001 | sink] f_1 grid: [64, 4, 1] threads: [128, 1, 1]  shared_memory: 36864 bytes"
    assert harness.parse_launches(line) == {"f_1": harness.Launch((64, 4, 1), 128, 36864)}


def test_occupancy_is_limited_by_registers_and_by_shared_memory():
    [k] = ptx.kernels(PTX)
    kernel = lambda registers, shared: harness.Kernel("f", registers, 0, shared, 128, (1,), k)
    assert kernel(32, 0).occupancy("h100") == 1.0
    assert kernel(128, 0).occupancy("h100") == 0.25
    assert kernel(32, 100 << 10).occupancy("h100") == 2 * 4 / 64


def test_bytes_of_a_step():
    [k] = ptx.kernels(PTX)
    kernel = harness.Kernel("f", 32, 0, 0, 128, (4, 2), k)
    assert kernel.blocks == 8
    assert kernel.bytes_of_step(0) == 128 * 8 and kernel.bytes_of_step() == 128 * 24


def test_an_unknown_gpu_is_an_error():
    with pytest.raises(ValueError, match="choose one of a100, l4, h100, h200, b200"):
        gpus.gpu("h900")
    for g in gpus.GPUS.values():
        assert f"core_count: {g.cores}" in gpus.target_config(g)


def test_shapes_are_those_of_the_models():
    """Parameters of the linear layers, against the models' published sizes."""
    layers = {"SmolLM2-135M": 30, "Llama-3.1-8B": 32, "Llama-3.1-70B": 80, "Qwen3-8B": 36, "Mixtral-8x7B": 32}
    published = {
        "SmolLM2-135M": 0.135e9,
        "Llama-3.1-8B": 8.03e9,
        "Llama-3.1-70B": 70.6e9,
        "Qwen3-8B": 8.19e9,
        "Mixtral-8x7B": 46.7e9,
    }
    for model, count in layers.items():
        found = shapes.of_model(model)
        size = lambda s: s.n * s.k * s.experts * (2 if "," in s.layer else 1)
        heads = sum(size(s) for s in found if s.layer == "head") * (1 if model.startswith("Smol") else 2)
        total = heads + count * sum(size(s) for s in found if s.layer != "head")
        assert abs(total / published[model] - 1) < 0.01, model
    with pytest.raises(ValueError, match="GPT-9"):
        shapes.of_model("GPT-9")
