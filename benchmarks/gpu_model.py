"""A GPU by its rates, and stages of an op by what they do: what benchmarks.time_model adds up."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """Rates per second. Which were measured on such a machine, and which are assumed, DOCS says."""

    name: str
    memory_bytes: float
    l2_bytes: float
    products: dict[torch.dtype, float]  # flops in the tensor cores
    ops: float  # float32 maxima or 32-bit integer instructions, half the rate of a multiply-add
    float64_flops: float
    launch_seconds: float  # of a kernel behind another: its start and its end


# Memory and bfloat16 were measured on an H200; 8 bit is twice bfloat16 and tf32 half of it, as the datasheet
# has them. 132 multiprocessors at 1.755 GHz: 64 maxima, 64 float64 multiply-adds a clock each.
H200 = Gpu(
    name="H200",
    memory_bytes=4.3e12,
    l2_bytes=5.5e12,
    products={torch.bfloat16: 790e12, torch.float32: 395e12, torch.int8: 1580e12},
    ops=132 * 64 * 1.755e9,
    float64_flops=2 * 132 * 64 * 1.755e9,
    launch_seconds=2.5e-6,
)


@dataclass(frozen=True)
class Stage:
    """What a stage does in a call."""

    name: str
    bytes: float = 0.0  # of device memory
    l2_bytes: float = 0.0
    flops: float = 0.0  # in the tensor cores
    dtype: torch.dtype = torch.bfloat16
    ops: float = 0.0
    float64_flops: float = 0.0
    launches: float = 1.0
    waiting: float = 0.0  # seconds that nothing hides

    def busy(self, gpu: Gpu) -> dict[str, float]:
        return {
            "memory": self.bytes / gpu.memory_bytes,
            "L2": self.l2_bytes / gpu.l2_bytes,
            "matrix": self.flops / gpu.products[self.dtype],
            "instructions": self.ops / gpu.ops,
            "float64": self.float64_flops / gpu.float64_flops,
        }

    def seconds(self, gpu: Gpu) -> float:
        return max(self.busy(gpu).values()) + self.waiting + self.launches * gpu.launch_seconds

    def bound(self, gpu: Gpu) -> str:
        """What takes the most of it; empty where that is the launches."""
        busy = self.busy(gpu)
        most = max(busy, key=lambda name: busy[name])
        return most if busy[most] > self.waiting + self.launches * gpu.launch_seconds else ""
