"""Rows by id, where they lie: what a gradient needs of a table in pinned host memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gpu


@triton.jit(do_not_specialize=["num_rows", "first_row"])
def gather_kernel(
    rows,  # [N, D] of one shard
    indices,  # [M] int64 global ids
    gathered,  # [M, D]
    num_rows,
    first_row,
    stride_row,
    stride_d,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy the rows of this shard to their places; the others stay as they are. A program owns one row."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(indices + place) - first_row
    if (row < 0) | (row >= num_rows):
        return
    for start in range(0, DIM, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(rows + row * stride_row + d.to(tl.int64) * stride_d, mask=d < DIM)
        tl.store(gathered + place * DIM + d, x, mask=d < DIM)


def gather_pinned(shards: list[Tensor], indices: Tensor) -> Tensor:
    """Rows by global id, zeros for -1: [...] on a GPU -> [..., D] there, without waiting for it."""
    dim = shards[0].shape[1]
    gathered = torch.zeros(*indices.shape, dim, dtype=shards[0].dtype, device=indices.device)
    flat = indices.contiguous().view(-1)
    first = 0
    with gpu.on_device(indices.device):
        for shard in shards:
            if shard.shape[0] > 0 and flat.numel() > 0:
                gather_kernel[(flat.numel(),)](
                    rows=shard,
                    indices=flat,
                    gathered=gathered,
                    num_rows=shard.shape[0],
                    first_row=first,
                    stride_row=shard.stride(0),
                    stride_d=shard.stride(1),
                    DIM=dim,
                    BLOCK_D=min(1024, triton.next_power_of_2(dim)),
                    num_warps=1,
                )
            first += shard.shape[0]
    return gathered
