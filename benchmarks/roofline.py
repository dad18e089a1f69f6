"""What this machine can do, measured: bandwidth, a library's matrix product, multiply-adds alone."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from realm_kernels import native

from .gpu.timing import time_calls

# A buffer no cache holds, and a product large enough for the library's peak.
BANDWIDTH_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
HOST_BYTES = 1 << 30
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
# Some processors multiply bfloat16 a hundred times slower: grow the product only while it is quick.
FIRST_SIZE, QUICK_SECONDS = 256, 0.02
REPEATS = 7
# Steps of the loop of multiply-adds: some ten milliseconds.
CEILING_STEPS = 2_000_000


def seconds(function: Callable[[], object], device: str) -> float:
    """The shortest of several calls: on a shared machine the minimum is what the hardware allows.

    On a GPU the median: clocks fall in the course of a run, and a limit must be one that can be held.
    """
    if device == "cuda":
        function()
        return time_calls(function).median
    times = []
    for _ in range(REPEATS + 1):  # the first warms up
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@functools.cache
def measure_bandwidth(device: str = "cpu") -> float:
    """Bytes per second that a sum over a large buffer reads; on a GPU, that a copy reads and writes."""
    size = BANDWIDTH_BYTES[device]
    buffer = torch.ones(size // 4, device=device)
    if device == "cuda":
        target = torch.empty_like(buffer)
        return 2 * size / seconds(lambda: target.copy_(buffer), device)
    return size / seconds(buffer.sum, device)


@functools.cache
def measure_host_bandwidth() -> float:
    """Bytes per second from pinned memory of the host to the GPU."""
    source = torch.ones(HOST_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty(HOST_BYTES, dtype=torch.uint8, device="cuda")
    return HOST_BYTES / seconds(lambda: target.copy_(source, non_blocking=True), "cuda")


@functools.cache
def measure_matrix_rate(dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """Flops per second of a square matrix product, on random values, in the library torch uses."""
    size = FIRST_SIZE if device == "cpu" else MATRIX_SIZE[device]
    while True:
        a = torch.randn(size, size, device=device)
        b = torch.randn(size, size, device=device)
        if dtype == torch.int8:
            # The library wants the second operand by columns.
            a, b, product = (40 * a).to(dtype), (40 * b).to(dtype).t(), torch._int_mm
        else:
            a, b, product = a.to(dtype), b.to(dtype), torch.matmul
        took = seconds(lambda a=a, b=b, product=product: product(a, b), device)
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
