"""Which row of a table has which id, after some were taken out: a number where they run on, else a list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import shard_file
from .manifest import Manifest


class RowIds:
    """The ids of the rows of each shard: the first one where they run on, else int64 [n], on the CPU.

    A tombstone's id i stands as -1 - i, so that the ids still grow when their sign is left out.
    """

    def __init__(self, parts: Sequence[int | Tensor], sizes: Sequence[int]) -> None:
        self.parts, self.sizes = tuple(parts), tuple(sizes)

    @staticmethod
    def read(directory: Path, current: Manifest) -> RowIds | None:
        """The ids of a committed table; None where row i has id i. 8 bytes a row of edited shards."""
        if all(not shard.holds_ids and shard.first_id == shard.first_row for shard in current.shards):
            return None
        parts = [
            shard_file.read_ids(directory, shard, current.dim, current.dtype)
            if shard.holds_ids
            else shard.first_id
            for shard in current.shards
        ]
        return RowIds(parts, [shard.rows for shard in current.shards])

    def stored(self, number: int) -> Tensor:
        """The ids of the rows of a shard, as they are on disk."""
        part = self.parts[number]
        return torch.arange(part, part + self.sizes[number]) if isinstance(part, int) else part

    def of(self, rows: Tensor) -> Tensor:
        """The ids of these rows, int64 of any shape on the CPU; a tombstone keeps the id it had. -1 stays."""
        ids = torch.full_like(rows, -1)
        first = 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            here = (rows >= first) & (rows < first + size)
            local = rows[here] - first
            ids[here] = local + part if isinstance(part, int) else without_sign(part[local])
            first += size
        return ids

    def alive(self, number: int) -> Tensor | None:
        """bool [n] of a shard's rows, False for tombstones; None where it has none."""
        part = self.parts[number]
        if isinstance(part, int) or not bool((part < 0).any()):
            return None
        return part >= 0

    def mask(self) -> Tensor | None:
        """bool [N], False for tombstones; None where there are none."""
        parts = [self.alive(number) for number in range(len(self.parts))]
        if all(part is None for part in parts):
            return None
        return torch.cat(
            [
                torch.ones(size, dtype=torch.bool) if part is None else part
                for part, size in zip(parts, self.sizes, strict=True)
            ]
        )

    def bury(self, shards: Sequence[Tensor]) -> None:
        """Make the tombstones among these rows NaN, in place: what a search never returns."""
        for number, shard in enumerate(shards):
            alive = self.alive(number)
            if alive is not None:
                shard[(~alive).to(shard.device)] = torch.nan

    def slice(self, pieces: Sequence[tuple[int, int, int]]) -> RowIds:
        """Of the pieces (shard, first, after), as ShardedTable.pieces() gives them."""
        parts: list[int | Tensor] = []
        for number, first, after in pieces:
            part = self.parts[number]
            parts.append(part + first if isinstance(part, int) else part[first:after])
        return RowIds(parts, [after - first for _, first, after in pieces])


def without_sign(ids: Tensor) -> Tensor:
    return torch.where(ids < 0, -1 - ids, ids)
