"""rk.DistributedTable: one index whose rows are spread over the ranks of a process group."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ranks import Ranks
from ..validation import FLOAT_DTYPES, describe, dtype_name
from .sharded import ShardedTable, gather

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "DistributedTable"


class DistributedTable:
    """N rows of width D over the ranks of a process group; row ids run through the ranks in order.

    Made by `from_local` or `open`, and taken by rk.mips_topk in the place of a tensor. Making one, searching
    it and `rows` are collective: every rank of the group makes the same calls in the same order.

    num_rows: N, of all ranks. dim: D. dtype, device: of this rank's rows; one dtype on all ranks.
    local: this rank's rows, a ShardedTable; it may be empty. Its ids begin at `first_row` of the whole.
    rank_rows: rows of every rank. rank, world_size: of this process in the group.
    version: of `local`. A search raises where the versions of the ranks differ: no result mixes two indexes.

    >>> table = rk.DistributedTable.from_local(torch.randn(1000, 128))              # doctest: +SKIP
    >>> top = rk.mips_topk(my_queries, table, 8)                                    # doctest: +SKIP
    """

    def __init__(self, local: ShardedTable, ranks: Ranks, rank_rows: Sequence[int]) -> None:
        self.local = local
        self.ranks = ranks
        self.rank_rows = tuple(rank_rows)
        self.num_rows = sum(rank_rows)
        self.first_row = sum(rank_rows[: ranks.rank])

    @staticmethod
    def from_local(local: Tensor | ShardedTable, group: ProcessGroup | None = None) -> DistributedTable:
        """The table of which this rank holds `local`: a tensor [n, D] or a ShardedTable; n may be 0.

        Nothing is copied: a TableRefresher over `local` refreshes this rank's part.
        group: the ranks it is spread over; None is the default group.

        Raises TypeError or ValueError for `local` as ShardedTable.from_tensors does, for a group that is not
        initialised or cannot move tensors of this device, and for D or dtypes that differ between ranks;
        RuntimeError where another rank raised, or was lost.
        """
        device = local.device if isinstance(local, (Tensor, ShardedTable)) else torch.device("cpu")
        ranks = Ranks(OP, group, device)
        return _agreed(ranks, lambda: _as_table(local))

    @staticmethod
    def open(
        path: str | os.PathLike[str],
        group: ProcessGroup | None = None,
        *,
        device: str | torch.device = "cpu",
        mmap: bool = True,
    ) -> DistributedTable:
        """The table committed at `path`, which every rank can read; each takes an equal share of its rows.

        Rank r of W holds the rows from N r / W to N (r + 1) / W, rounded down. device, mmap and errors as
        ShardedTable.open's, and ValueError where a writer committed another version between two ranks.
        """
        ranks = Ranks(OP, group, torch.device(device))

        def share() -> ShardedTable:
            table = ShardedTable.open(path, mmap=mmap)
            first = table.num_rows * ranks.rank // ranks.size
            after = table.num_rows * (ranks.rank + 1) // ranks.size
            return table.part(first, after).to(device)

        return _agreed(ranks, share)

    @property
    def dim(self) -> int:
        return self.local.dim

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        return self.local.device

    @property
    def version(self) -> int:
        return self.local.version

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        return self.ranks.size

    def rows(self, indices: Tensor) -> Tensor:
        """The rows with these global ids, whoever holds them: zeros for -1. [...] int64 -> [..., D].

        Collective: every rank brings indices of its own, of any shape, also none. Raises TypeError or
        ValueError for indices that are not int64 on the table's device, or outside [-1, N).
        """
        problem = _problem_with(indices, self)
        ranks = self.ranks.serving(f"{OP}.rows")
        headers = ranks.agree("rows", [0 if problem else indices.numel()], problem)
        flat = indices.flatten()[:, None]
        counts = [count for (count,) in headers]
        wanted = ranks.gather(flat, counts, "the ids of the rows").flatten()
        rows = fetch_rows(ranks, self.local.shards, self.rank_rows, flat.flatten(), wanted, counts)
        return rows.view(*indices.shape, self.dim)

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        return (
            f"DistributedTable(num_rows={self.num_rows}, dim={self.dim}, dtype={dtype_name(self.dtype)}, "
            f"rank={self.rank} of {self.world_size} with {self.local.num_rows} rows, device={self.device}, "
            f"version={self.version})"
        )


def fetch_rows(
    ranks: Ranks,
    shards: Sequence[Tensor],
    rank_rows: Sequence[int],
    indices: Tensor,
    wanted: Tensor,
    counts: Sequence[int],
) -> Tensor:
    """The rows with ids `indices` [n] -> [n, D], zeros for -1; `wanted` are the ids of all ranks, gathered.

    Each rank sends each other the rows that it holds and the other wants, in the order of the other's ids: so
    both know what comes, and every row travels once.
    """
    owners = torch.bucketize(indices, _ends(rank_rows, indices), right=True)
    owners = torch.where(indices < 0, ranks.size, owners)  # [n]
    received = torch.bincount(owners, minlength=ranks.size + 1)[: ranks.size].tolist()
    first = sum(rank_rows[: ranks.rank])
    mine = (wanted >= first) & (wanted < first + rank_rows[ranks.rank])
    sent = torch.stack([piece.sum() for piece in mine.split(list(counts))]).tolist()
    found = gather(shards, wanted[mine] - first)  # [sum(sent), D]
    # Bytes travel, whatever the dtype: not every backend moves bfloat16.
    arrived = ranks.exchange(found.view(torch.uint8), sent, received, "rows").view(found.dtype)
    rows = found.new_zeros(indices.shape[0], found.shape[1])
    rows[owners.argsort(stable=True)[: sum(received)]] = arrived
    return rows


def _agreed(ranks: Ranks, make: Callable[[], ShardedTable]) -> DistributedTable:
    """The table of what `make` returns on each rank, after all have seen that it fits together."""
    header, local, problem = [0, 0, 0, 0], None, None
    try:
        local = make()
        header = [local.num_rows, local.dim, FLOAT_DTYPES.index(local.dtype), local.version]
    except (TypeError, ValueError, OSError) as error:
        problem = error
    headers = ranks.agree("from_local", header, problem)
    assert local is not None
    kinds = [
        f"D={dim}, {dtype_name(FLOAT_DTYPES[dtype])}, version {version}" for _, dim, dtype, version in headers
    ]
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"{OP}: local must have one D, dtype and version on all ranks, got {kinds[0]} on rank 0 and "
                f"{kind} on rank {rank}"
            )
    return DistributedTable(local, ranks, [rows for rows, *_ in headers])


def _ends(rank_rows: Sequence[int], like: Tensor) -> Tensor:
    """The id behind the last row of each rank; an id belongs to the first rank whose end is above it."""
    return torch.tensor(list(accumulate(rank_rows)), dtype=torch.int64, device=like.device)


def _as_table(local: object) -> ShardedTable:
    if isinstance(local, ShardedTable):
        return local
    if not isinstance(local, Tensor):
        raise TypeError(f"{OP}: local must be a Tensor [n, D] or a ShardedTable, got {describe(local)}")
    try:
        return ShardedTable.from_tensors([local])
    except (TypeError, ValueError) as error:
        rule = str(error).partition(": ")[2].replace("shards[0]", "local")
        raise type(error)(f"{OP}: {rule}") from None


def _problem_with(indices: object, table: DistributedTable) -> Exception | None:
    what = f"{OP}.rows: indices must be"
    if not isinstance(indices, Tensor):
        return TypeError(f"{what} a Tensor, got {describe(indices)}")
    if indices.dtype != torch.int64 or indices.device != table.device:
        return ValueError(f"{what} int64 on {table.device}, got {describe(indices)}")
    if indices.numel() > 0:
        low, high = int(indices.min()), int(indices.max())
        if low < -1 or high >= table.num_rows:
            return ValueError(f"{what} in [0, N={table.num_rows}) or -1, got {low} to {high}")
    return None
