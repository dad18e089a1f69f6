"""What this machine can do, measured: the read bandwidth and the rate of a library's matrix product."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

# A buffer no cache holds, and a product large enough for the library's peak.
BANDWIDTH_BYTES = 1 << 30
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
# Some processors multiply bfloat16 a hundred times slower: grow the product only while it is quick.
FIRST_SIZE, QUICK_SECONDS = 256, 0.02
REPEATS = 7


def seconds(function: Callable[[], object], device: str) -> float:
    """The shortest of several calls: on a shared machine the minimum is what the hardware allows."""
    times = []
    for _ in range(REPEATS + 1):  # the first warms up
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@functools.cache
def measure_bandwidth(device: str = "cpu") -> float:
    """Bytes per second that a sum over a large buffer reads."""
    buffer = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    return BANDWIDTH_BYTES / seconds(buffer.sum, device)


@functools.cache
def measure_matrix_rate(dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """Flops per second of a square matrix product in the library torch uses."""
    size = FIRST_SIZE
    while True:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        took = seconds(lambda a=a, b=b: a @ b, device)
        if size == MATRIX_SIZE[device] or took > QUICK_SECONDS:
            return 2 * size**3 / took
        size *= 2


def limit_seconds(bytes_moved: int, flops: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """The least time: the larger of the bytes over the bandwidth and the flops over the matrix rate."""
    return max(bytes_moved / measure_bandwidth(device), flops / measure_matrix_rate(dtype, device))
