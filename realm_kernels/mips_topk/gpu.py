"""What the GPU backends of mips_topk share: whom they serve, sizes of a search, the counter of repairs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WORKSPACE_BYTES = 256 << 20
PIECE_ROWS = 1 << 30  # a shard is searched in pieces of so many rows: row numbers fit 32 bits

Capability = tuple[int, int]


def refuses(
    queries: Tensor, unusable: str, needed: str, is_served: Callable[[Capability], bool]
) -> str | None:
    """Why a backend cannot serve queries that lie where these do.

    unusable: why it runs nowhere on this machine, or empty. needed: the compute capabilities that
    `is_served` accepts, in words.
    """
    if unusable:
        return unusable
    if queries.device.type != "cuda":
        return f"it serves CUDA tensors, got {queries.device}"
    if torch.version.hip is not None:
        return "it serves NVIDIA GPUs only"
    capability = torch.cuda.get_device_capability(queries.device)
    if not is_served(capability):
        return f"it needs a GPU of compute capability {needed}, got {capability[0]}.{capability[1]}"
    return None


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device's current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


_repairs: dict[torch.device, Tensor] = {}


def repair_counter(device: torch.device) -> Tensor:
    """[1] int64 on `device`, counted on by the kernels of either backend."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _repairs:
        _repairs[device] = torch.zeros(1, dtype=torch.int64, device=device)
    return _repairs[device]


def repairs(device: torch.device | str) -> int:
    """How many queries of this process had to be repaired on `device`. Waits for the device."""
    return int(repair_counter(torch.device(device)))
