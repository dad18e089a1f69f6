"""The time and memory of a call on a GPU: CUDA events, a cold L2, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SECONDS = 0.12  # of repetitions of one call, at most, beyond the fewest
FEWEST, MOST = 5, 40
# Times the L2, written between repetitions: on an H200 a quarter of a millisecond, longer than the host takes
# to launch a search, whose first kernels the GPU would wait for otherwise.
FLUSH_L2 = 16


@dataclass(frozen=True)
class Times:
    """Seconds."""

    median: float
    least: float
    most: float
    repetitions: int


def time_calls(function: Callable[[], object]) -> Times:
    """Of calls that were made once already. The L2 is overwritten before each.

    Overwriting it gives the host the time to launch ahead, as in a training step; a call whose launches take
    longer still is measured with the gaps its user sees.
    """
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(FLUSH_L2 * cache, dtype=torch.uint8, device="cuda")
    first = _timed(function, flush)
    repetitions = max(FEWEST, min(MOST, int(SECONDS / max(first, 1e-6))))
    times = [_timed(function, flush) for _ in range(repetitions)]
    return Times(statistics.median(times), min(times), max(times), repetitions)


def _timed(function: Callable[[], object], flush: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def replay_of(function: Callable[[], object]) -> Callable[[], object]:
    """The call captured in a CUDA graph. Raises what the capture raises."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def extra_bytes(function: Callable[[], object]) -> int:
    """The most memory of torch's allocator that a call holds beside its arguments and results."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = function()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - _bytes_of(results))


def _bytes_of(results: object) -> int:
    if isinstance(results, Tensor):
        return results.untyped_storage().nbytes()
    if isinstance(results, (tuple, list)):
        return sum(_bytes_of(result) for result in results)
    return 0
