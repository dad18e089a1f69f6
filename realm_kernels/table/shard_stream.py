"""Rows as a stream into shard files of a set size, each durable as soon as it is full."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from . import files, shard_file
from .manifest import Shard
from .transaction import Transaction

PIECE_BYTES = 16 << 20  # of a large append, converted and written at a time


class ShardStream:
    """Writes rows with their ids, in order, as the shards of a transaction; one piece is in memory."""

    def __init__(self, transaction: Transaction, dim: int, dtype: torch.dtype, shard_rows: int) -> None:
        self.transaction, self.dim, self.dtype, self.shard_rows = transaction, dim, dtype, shard_rows
        self._file: OpenShard | None = None
        self._shards: list[Shard] = []

    def append(self, rows: Tensor, ids: Tensor) -> None:
        """rows [n, dim] of any float dtype and device; ids int64 [n] on the CPU, -1 - id for a tombstone."""
        step = max(1, PIECE_BYTES // (4 * self.dim))
        for piece, piece_ids in zip(rows.detach().split(step), ids.split(step), strict=True):
            self._write(piece.to("cpu", self.dtype).contiguous(), piece_ids)

    def finish(self) -> list[Shard]:
        """The shards since the last finish(), all durable; first_row is the table's to say."""
        if self._file is not None:
            self._finish_file()
        shards, self._shards = self._shards, []
        return shards

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, piece: Tensor, ids: Tensor) -> None:
        while piece.shape[0] > 0:
            if self._file is None:
                path = self.transaction.new_shard()
                self._file = OpenShard(path, self.shard_rows, self.dim, self.dtype)
            taken = self.shard_rows - self._file.rows
            self._file.append(piece[:taken], ids[:taken])
            piece, ids = piece[taken:], ids[taken:]
            if self._file.rows == self.shard_rows:
                self._finish_file()

    def _finish_file(self) -> None:
        assert self._file is not None
        self._shards.append(self._file.finish())
        self._file = None


class OpenShard:
    """A shard being written. Header and checksum are right from the start for `capacity` plain rows."""

    def __init__(self, path: Path, capacity: int, dim: int, dtype: torch.dtype) -> None:
        self.path, self.capacity, self.dim, self.dtype = path, capacity, dim, dtype
        self.rows = 0
        self._ids: list[Tensor] = []
        self._digest = hashlib.sha256()
        self._descriptor = files.create(path)
        try:
            self._write(memoryview(shard_file.header(capacity, dim, dtype)))
        except BaseException:
            self.close()
            files.remove(path)
            raise

    def append(self, rows: Tensor, ids: Tensor) -> None:
        self._write(shard_file.raw_bytes(rows))
        self._ids.append(ids)
        self.rows += rows.shape[0]

    def finish(self) -> Shard:
        """Write the ids where they are not plain, correct the header, flush, close."""
        ids = torch.cat(self._ids)
        tombstones = int((ids < 0).sum())
        first, last = (int(torch.where(end < 0, -1 - end, end)) for end in (ids[0], ids[-1]))
        shard = Shard(self.path.name, 0, self.rows, 0, "", first, last + 1, tombstones)
        if shard.holds_ids:
            self._write(shard_file.raw_bytes(ids.contiguous()))
        checksum = self._digest.hexdigest()
        if self.rows < self.capacity or shard.holds_ids:
            head = shard_file.header(self.rows, self.dim, self.dtype, shard.holds_ids)
            files.write_at(self._descriptor, head, 0, self.path)
            checksum = shard_file.file_checksum(self._descriptor)
        files.flush(self._descriptor, self.path)
        self.close()
        return shard_file.sealed(shard, self.dim, self.dtype, checksum)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, data: memoryview) -> None:
        files.write(self._descriptor, data, self.path)
        self._digest.update(data)
