"""Every error a user of mips_topk can see."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..validation import FLOAT_DTYPES, check_tensor, describe

OP = "mips_topk"


def shards_of(table: object) -> list[Tensor]:
    """The row shards of what the caller passed as table: a ShardedTable's, or the tensor itself."""
    if isinstance(table, DTensor):
        raise TypeError(
            f"{OP}: table must be a Tensor or a ShardedTable, got a DTensor, which no backend serves yet"
        )
    if isinstance(table, Tensor):
        return [table]
    shards = getattr(table, "shards", None)
    if shards is None:
        raise TypeError(f"{OP}: table must be a Tensor [N, D] or a ShardedTable, got {describe(table)}")
    return list(shards)


def check(
    queries: Tensor, table: object, k: int, exclude: Tensor | None, row_mask: Tensor | None
) -> list[Tensor]:
    """Raise TypeError or ValueError for arguments the op does not take; return the table's shards."""
    check_tensor(OP, "queries", queries, "[B, D]", (None, None), FLOAT_DTYPES)
    batch, dim = queries.shape
    if dim < 1:
        raise ValueError(f"{OP}: queries must be [B, D] with D >= 1, got {describe(queries)}")
    shards = shards_of(table)
    for shard in shards:
        check_tensor(OP, "table", shard, "[N, D]", (None, dim), FLOAT_DTYPES, queries.device)
    if not isinstance(table, Tensor) and any(shard.requires_grad for shard in shards):
        raise ValueError(
            f"{OP}: table must be a plain Tensor to receive a gradient, got a ShardedTable that requires one"
        )
    num_rows = sum(shard.shape[0] for shard in shards)
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"{OP}: k must be an int, got {describe(k)}")
    if not 1 <= k <= num_rows:
        raise ValueError(f"{OP}: k must be in [1, N={num_rows}], got {k}")
    if exclude is not None:
        check_tensor(OP, "exclude", exclude, "[B, E]", (batch, None), (torch.int64,), queries.device)
    if row_mask is not None:
        check_tensor(OP, "row_mask", row_mask, "[N]", (num_rows,), (torch.bool,), queries.device)
    return shards


def check_values(num_rows: int, exclude: Tensor | None) -> None:
    """Raise ValueError for ids no row has. On the CPU only: elsewhere looking costs a synchronisation."""
    if exclude is None or exclude.numel() == 0 or exclude.device.type != "cpu":
        return
    low, high = int(exclude.min()), int(exclude.max())
    if low < -1 or high >= num_rows:
        raise ValueError(
            f"{OP}: exclude must hold row ids in [0, N={num_rows}) or -1, got ids from {low} to {high}"
        )
