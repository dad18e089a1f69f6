"""What this machine can do, measured: read bandwidth, a library's matrix product, multiply-adds alone."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from realm_kernels import native

# A buffer no cache holds, and a product large enough for the library's peak.
BANDWIDTH_BYTES = 1 << 30
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
# Some processors multiply bfloat16 a hundred times slower: grow the product only while it is quick.
FIRST_SIZE, QUICK_SECONDS = 256, 0.02
REPEATS = 7
# Steps of the loop of multiply-adds: some ten milliseconds.
CEILING_STEPS = 2_000_000


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


@functools.cache
def measure_multiply_adds(kind: str) -> float:
    """Operations per second of multiply-adds between registers on all threads, nothing loaded or stored.

    kind: "float32", "bfloat16" or "int8". 0 where this processor has no instruction for it, or the compiled
    module does not offer the loop.
    """
    loop = getattr(native.cpu, "fma_ceiling", None)
    threads = torch.get_num_threads()
    if loop is None or loop(kind, 1, threads) == 0:
        return 0.0
    took = seconds(lambda: loop(kind, CEILING_STEPS, threads), "cpu")
    return loop(kind, 1, threads) * CEILING_STEPS / took


def scan_rate(dtype: str) -> float:
    """The most operations per second of a scan over rows of that dtype, or of int8 codes: multiply-adds alone
    in the precision that the processor has for it, or torch's float32 product where that was not measured.
    """
    return (
        measure_multiply_adds(dtype) or measure_multiply_adds("float32") or measure_matrix_rate(torch.float32)
    )


def scan_limit_seconds(bytes_moved: int, flops: int, dtype: str) -> float:
    """The least time of a scan: bytes over the bandwidth or operations over the rate of multiply-adds."""
    return max(bytes_moved / measure_bandwidth(), flops / scan_rate(dtype))


def limit_seconds(bytes_moved: int, flops: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """The least time: the larger of the bytes over the bandwidth and the flops over the matrix rate."""
    return max(bytes_moved / measure_bandwidth(device), flops / measure_matrix_rate(dtype, device))
