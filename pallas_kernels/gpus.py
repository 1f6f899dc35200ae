"""The GPUs that kernels are compiled for here, as numbers: what a tiling is chosen by, and what XLA is told.

Sources: NVIDIA's data sheets and the tables of the CUDA C++ Programming Guide ("Compute Capabilities").
"""

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """One model of GPU.

    Attributes:
      kind: what `jax.Device.device_kind` says.
      capability: the CUDA compute capability.
      ptx_target: the architecture ptxas is told.
      cores: streaming multiprocessors.
      bandwidth: bytes per second of the memory, of the data sheet.
      bf16_flops, int8_ops: dense, of the data sheet; fp8 runs at the rate of int8 where there is fp8.
      shared_per_core, shared_per_block: bytes of shared memory, the second as far as a kernel may ask for it.
      l2, memory: bytes.
      clock_ghz: boost clock.
      registers: 32-bit registers of a core.
    """

    kind: str
    capability: tuple[int, int]
    ptx_target: str
    cores: int
    bandwidth: float
    bf16_flops: float
    int8_ops: float
    shared_per_core: int
    shared_per_block: int
    l2: int
    memory: int
    clock_ghz: float
    registers: int = 65536

    @property
    def arch(self) -> int:
        """80, 89, 90, 100."""
        return 10 * self.capability[0] + self.capability[1]


GPUS: dict[str, Gpu] = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), "sm_80", 108, 2.039e12, 312e12, 624e12,
        167936, 166912, 40 << 20, 80 << 30, 1.41,
    ),
    "l4": Gpu(
        "NVIDIA L4", (8, 9), "sm_89", 58, 0.3e12, 121e12, 242e12,
        102400, 101376, 48 << 20, 24 << 30, 2.04,
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), "sm_90a", 132, 3.35e12, 989e12, 1979e12,
        233472, 232448, 50 << 20, 80 << 30, 1.98,
    ),
    "h200": Gpu(
        "NVIDIA H200", (9, 0), "sm_90a", 132, 4.8e12, 989e12, 1979e12,
        233472, 232448, 60 << 20, 141 << 30, 1.98,
    ),
    "b200": Gpu(
        "NVIDIA B200", (10, 0), "sm_100a", 148, 8.0e12, 2250e12, 4500e12,
        233472, 232448, 126 << 20, 180 << 30, 1.965,
    ),
}  # fmt: skip


# Where the GPU is not known: the blocks of an H100, in the least shared memory and with the instructions of any.
ANY = GPUS["h100"]._replace(capability=(8, 0), shared_per_core=102400, shared_per_block=101376)


def gpu(device: "str | Gpu") -> Gpu:
    """The `Gpu` of a name ("h100"), `ANY` of "any"; itself, if it is one.

    Raises:
      ValueError: there is no such name.
    """
    if isinstance(device, Gpu):
        return device
    if device == "any":
        return ANY
    if device not in GPUS:
        raise ValueError(f"device {device!r} is not known; choose one of {', '.join(GPUS)}, or give a Gpu")
    return GPUS[device]


def target_config(g: Gpu) -> str:
    """XLA's GpuTargetConfig in text form: with it XLA compiles for a GPU that is not there."""
    major, minor = g.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: {g.shared_per_core}
  shared_memory_per_block_optin: {g.shared_per_block}
  threads_per_core_limit: 2048  core_count: {g.cores}  fpus_per_core: {64 if major == 8 else 128}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {int(g.bandwidth)}  l2_cache_size: {g.l2}  clock_rate_ghz: {g.clock_ghz}
  device_memory_size: {g.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: {g.registers}  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{g.kind}"
"""


def named(kind: str) -> str | None:
    """The name here of the GPU whose `jax.Device.device_kind` is `kind`; None for others.

    A Grace Hopper or Grace Blackwell is its GPU.
    """
    return next((name for name in GPUS if re.search(rf"\bG?{name}\b", kind, re.I)), None)
