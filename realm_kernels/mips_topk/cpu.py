"""The C++ backend of mips_topk: a float32 scan, canonical rescoring (csrc/cpu/mips_topk*)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..backends import Backend, forced_variant
from ..validation import dtype_name


def refuses(
    queries: Tensor, shards: list[Tensor], k: int, exclude: Tensor | None, row_mask: Tensor | None
) -> str | None:
    if queries.device.type != "cpu":
        return f"the arguments are on {queries.device}"
    if native.cpu is None:
        return native.cpu_missing
    if len({shard.dtype for shard in shards}) > 1:
        return "the shards differ in dtype"
    return None


def forward(
    queries: Tensor, shards: list[Tensor], k: int, exclude: Tensor | None, row_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    assert native.cpu is not None
    batch, dim = queries.shape
    # The kernel steps from row to row by a stride, but reads a row as it lies.
    rows = [shard if shard.stride(1) == 1 or dim == 1 else shard.contiguous() for shard in shards]
    queries = queries.float().contiguous()
    if exclude is not None:
        exclude = exclude.sort(dim=1).values.contiguous()
    if row_mask is not None:
        row_mask = row_mask.contiguous()
    scores = torch.empty(batch, k, dtype=torch.float32)
    indices = torch.empty(batch, k, dtype=torch.int64)
    native.cpu.mips_topk(
        queries.data_ptr(),
        [(shard.data_ptr(), shard.shape[0], shard.stride(0)) for shard in rows],
        dtype_name(shards[0].dtype),
        batch,
        dim,
        k,
        0 if exclude is None else exclude.data_ptr(),
        0 if exclude is None else exclude.shape[1],
        0 if row_mask is None else row_mask.data_ptr(),
        scores.data_ptr(),
        indices.data_ptr(),
        torch.get_num_threads(),
        forced_variant(),
    )
    return scores, indices


BACKEND = Backend(name="cpu", refuses=refuses, forward=forward)
