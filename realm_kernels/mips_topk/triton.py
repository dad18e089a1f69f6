"""The Triton backend of mips_topk: what it serves. The search itself is in triton_search.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, native
from ..table import quantized


def refuses(
    queries: Tensor,
    shards: list[Tensor],
    k: int,
    exclude: Tensor | None,
    row_mask: Tensor | None,
    codes: Sequence[Tensor] = (),
) -> str | None:
    missing = native.triton_missing()
    if missing:
        return missing
    if queries.device.type == "cuda":
        if torch.version.hip is not None or torch.cuda.get_device_capability(queries.device) < (8, 0):
            return "it needs an NVIDIA GPU of compute capability 8.0 or higher"
        return None
    if queries.device.type == "cpu" and backends.forced_backend() == "triton":
        from .triton_scan import INTERPRETED

        if INTERPRETED:
            return None
    return f"it serves CUDA tensors, got {queries.device} (CPU tensors with TRITON_INTERPRET=1, when forced)"


def forward(
    queries: Tensor,
    shards: list[Tensor],
    k: int,
    exclude: Tensor | None,
    row_mask: Tensor | None,
    codes: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    from .triton_search import search  # imports triton

    if codes and not (codes[0].device == queries.device and quantized.are_of(codes, shards)):
        codes = ()
    return search(queries, shards, k, exclude, row_mask, codes)


def repairs(device: torch.device | str) -> int:
    """How many queries of this process had to be repaired on `device`. Waits for the device."""
    from .triton_launch import repair_counter

    return int(repair_counter(torch.device(device)))


BACKEND = backends.Backend(name="triton", refuses=refuses, forward=forward)
