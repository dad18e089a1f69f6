"""Which ScanConfig a search uses: the plan's, one that is pinned, or the fastest of a few, measured once."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from .triton_plan import SCAN_CHOICES, Plan, ScanConfig

RUNS = 3  # of each candidate, after one that compiles it


class _Choice(threading.local):
    config: ScanConfig | str = "planned"


_choice = _Choice()
_measured: dict[tuple[Any, ...], ScanConfig] = {}


@contextmanager
def use_scan_config(config: ScanConfig | str) -> Iterator[None]:
    """Choose how rk.mips_topk scans on a GPU, for the calls of this thread inside the `with` block.

    config: "planned", the default, is a table by shape with the reason for each entry. "measured" times a few
        configurations at the first search of each kind (GPU, dtypes, width, queries and rows by powers of
        two), which waits for the GPU and compiles several kernels, and keeps the fastest for the life of the
        process; while a CUDA graph is captured it measures nothing. A ScanConfig pins that one. No choice
        changes a result.

    Raises ValueError for anything else. A pinned configuration that does not fit the GPU fails at its launch.

    >>> import realm_kernels as rk
    >>> with rk.use_scan_config(rk.ScanConfig(block_b=64, warps=4, stages=4, programs_per_sm=2)):
    ...     pass
    """
    if not isinstance(config, ScanConfig) and config not in ("planned", "measured"):
        raise ValueError(
            f'use_scan_config: config must be "planned", "measured" or a ScanConfig, got {config!r}'
        )
    previous, _choice.config = _choice.config, config
    try:
        yield
    finally:
        _choice.config = previous


def configured(
    plan: Plan, device: torch.device, shape: tuple[int, int], scan: Callable[[Plan], None]
) -> Plan:
    """The plan with the configuration that is wanted; scan(plan) runs the scan of a block, to be timed.

    shape: rows of the piece, width.
    """
    if isinstance(_choice.config, ScanConfig):
        return replace(plan, scan=_choice.config)
    if _choice.config == "planned":
        return plan
    rows, width = shape
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    key = (name, plan.scan_dtype, plan.scan.block_b, plan.batch.bit_length(), rows.bit_length(), width)
    if key not in _measured and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        times = {
            config: _seconds(replace(plan, scan=config), device, scan) for config in candidates(plan.scan)
        }
        _measured[key] = min(times, key=times.__getitem__)
    return replace(plan, scan=_measured.get(key, plan.scan))


def candidates(planned: ScanConfig) -> list[ScanConfig]:
    """The planned configuration and its neighbours: at most seven."""
    changes = [
        dict(stages=planned.stages + 1),  # more tiles in flight, where memory is the limit
        dict(stages=planned.stages - 1),  # fewer, so that more programs fit
        dict(programs_per_sm=planned.programs_per_sm + 1),
        dict(programs_per_sm=planned.programs_per_sm - 1),
        dict(warps=12 - planned.warps),  # 4 or 8
        dict(block_b=planned.block_b // 2),  # smaller tiles, read more often from the L2 cache
    ]
    found = [planned]
    for change in changes:
        if all(value in SCAN_CHOICES[name] for name, value in change.items()):
            found.append(replace(planned, **change))
    return found


def _seconds(plan: Plan, device: torch.device, scan: Callable[[Plan], None]) -> float:
    """The median time of a scan; infinite for a configuration that does not fit the GPU."""
    from triton.runtime.errors import OutOfResources

    try:
        scan(plan)
    except OutOfResources:
        return float("inf")
    times = []
    for _ in range(RUNS):
        _wait(device)
        start = time.perf_counter()
        scan(plan)
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
