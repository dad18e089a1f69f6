"""Every error a user of mips_topk can see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..table.distributed import DistributedTable
from ..table.quantized import Int8Codes, refresh
from ..validation import FLOAT_DTYPES, check_tensor, describe

# A torch built without distributed has no DTensor, and then none can come.
DTENSOR: tuple[type, ...] = ()
if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor

    DTENSOR = (DTensor,)

OP = "mips_topk"


def is_across_ranks(table: object) -> bool:
    """Whether the rows of `table` are spread over ranks: then the call is collective (distributed.py)."""
    return isinstance(table, (DistributedTable, *DTENSOR))


def shards_of(table: object) -> list[Tensor]:
    """The row shards of what the caller passed as table: a ShardedTable's, or the tensor itself."""
    if isinstance(table, Tensor):
        return [table]
    shards = getattr(table, "shards", None)
    if shards is None:
        raise TypeError(
            f"{OP}: table must be a Tensor [N, D], ShardedTable or DistributedTable, got {describe(table)}"
        )
    return list(shards)


def codes_of(table: Any) -> Int8Codes | None:
    """The codes of a quantised ShardedTable, of its rows as they are.

    In a graph that is being compiled they are taken as they are: there, codes that rows have left behind are
    not read, and the rows are scanned themselves.
    """
    codes = None if isinstance(table, Tensor) else getattr(table, "codes", None)
    if codes is not None and not torch.compiler.is_compiling():
        refresh(table.shards, codes.tensors())
    return codes


def check(
    queries: Tensor, table: object, k: int, exclude: Tensor | None, row_mask: Tensor | None
) -> list[Tensor]:
    """Raise TypeError or ValueError for arguments the op does not take; return the table's shards."""
    shards = shards_of(table)
    num_rows = sum(shard.shape[0] for shard in shards if isinstance(shard, Tensor) and shard.dim() > 0)
    # A table, not a tensor, may stay in host memory while it is searched on a GPU.
    may_differ = not isinstance(table, Tensor) and all(shard.device.type == "cpu" for shard in shards)
    check_call(queries, shards, k, exclude, row_mask, num_rows, on_host=may_differ)
    if not isinstance(table, Tensor) and any(shard.requires_grad for shard in shards):
        raise ValueError(
            f"{OP}: table must be a plain Tensor to receive a gradient, got a ShardedTable that requires one"
        )
    return shards


def check_call(
    queries: Tensor,
    shards: Sequence[Tensor],
    k: int,
    exclude: Tensor | None,
    row_mask: Tensor | None,
    num_rows: int,
    mask_legend: str = "[N]",
    on_host: bool = False,
) -> None:
    """The rules that one process and many share: `shards` are those here, `num_rows` counts all rows.

    on_host: the rows are in host memory, and queries on a GPU may search them there.
    """
    check_tensor(OP, "queries", queries, "[B, D]", (None, None), FLOAT_DTYPES)
    if isinstance(queries, DTENSOR):
        raise TypeError(f"{OP}: queries must be a plain Tensor, each rank's own, got a DTensor")
    batch, dim = queries.shape
    if dim < 1:
        raise ValueError(f"{OP}: queries must be [B, D] with D >= 1, got {describe(queries)}")
    where = None if on_host and queries.device.type == "cuda" else queries.device
    for shard in shards:
        check_tensor(OP, "table", shard, "[N, D]", (None, dim), FLOAT_DTYPES, where)
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"{OP}: k must be an int, got {describe(k)}")
    if not 1 <= k <= num_rows:
        raise ValueError(f"{OP}: k must be in [1, N={num_rows}], got {k}")
    if exclude is not None:
        check_tensor(OP, "exclude", exclude, "[B, E]", (batch, None), (torch.int64,), queries.device)
    if row_mask is not None:
        rows_here = sum(shard.shape[0] for shard in shards)
        check_tensor(OP, "row_mask", row_mask, mask_legend, (rows_here,), (torch.bool,), queries.device)


def check_values(num_rows: int, exclude: Tensor | None) -> None:
    """Raise ValueError for ids no row has. On the CPU only: elsewhere looking costs a synchronisation."""
    if exclude is None or exclude.numel() == 0 or exclude.device.type != "cpu":
        return
    low, high = int(exclude.min()), int(exclude.max())
    if low < -1 or high >= num_rows:
        raise ValueError(
            f"{OP}: exclude must hold row ids in [0, N={num_rows}) or -1, got ids from {low} to {high}"
        )
