"""A shard's next version while it is edited: a copy under a new name, changed in place until it is whole."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace

import torch
from torch import Tensor

from . import files, shard_file
from .manifest import Shard
from .transaction import Transaction

_COPY_BYTES = 8 << 20


class Draft:
    """Copies a committed shard into a new file of the transaction; the old one is never touched.

    Raises ValueError where the old one is damaged: a new checksum over its rows would hide that for good.
    """

    def __init__(self, transaction: Transaction, old: Shard, dim: int, dtype: torch.dtype) -> None:
        self.dim, self.dtype = dim, dtype
        self._row_bytes = dim * dtype.itemsize
        self._path = transaction.new_shard()
        self._shard = replace(old, file=self._path.name)
        source_path = transaction.path / old.file
        with shard_file.opened(transaction.path, old, dim, dtype) as (source, start):
            self._ids_at = shard_file.DATA_OFFSET + old.rows * self._row_bytes
            descriptor = files.create(self._path)
            try:
                digest = hashlib.sha256(os.pread(source, start, 0))
                # Shards of other writers may begin elsewhere; a copy begins where ours do.
                head = shard_file.header(old.rows, dim, dtype, old.holds_ids)
                files.write(descriptor, head, self._path)
                while block := os.pread(source, _COPY_BYTES, start):
                    digest.update(block)
                    files.write(descriptor, block, self._path)
                    start += len(block)
            finally:
                os.close(descriptor)
            if digest.hexdigest() != old.checksum:
                raise ValueError(f"{source_path}: the shard is damaged: its SHA-256 is not the manifest's")

    def ids(self) -> Tensor:
        """As they are stored: int64 [n]."""
        shard = self._shard
        if not shard.holds_ids:
            return torch.arange(shard.first_id, shard.after_id)
        ids = torch.empty(shard.rows, dtype=torch.int64)
        with open(self._path, "rb") as file, files.naming(self._path, "read this file"):
            file.seek(self._ids_at)
            file.readinto(shard_file.raw_bytes(ids))
        return ids

    def replace(self, local: Tensor, rows: Tensor) -> None:
        """Overwrite the rows with these numbers, growing [m], with rows [m, D] of any float dtype."""
        self._write(local, rows)

    def tombstone(self, local: Tensor) -> None:
        """Mark the rows with these numbers as taken out, and overwrite them with NaN."""
        ids = self.ids()
        ids[local] = -1 - ids[local]
        self._shard = replace(self._shard, tombstones=self._shard.tombstones + len(local))
        self._write(local, torch.tensor(torch.nan).expand(len(local), self.dim), ids)

    def finish(self) -> Shard:
        """Make it durable; its entry in the manifest."""
        shard = self._shard
        descriptor = self._open()
        try:
            head = shard_file.header(shard.rows, self.dim, self.dtype, shard.holds_ids)
            files.write_at(descriptor, head, 0, self._path)
            checksum = shard_file.file_checksum(descriptor)
            files.flush(descriptor, self._path)
        finally:
            os.close(descriptor)
        return shard_file.sealed(shard, self.dim, self.dtype, checksum)

    def _open(self) -> int:
        with files.naming(self._path, "open this file"):
            return os.open(self._path, os.O_RDWR | os.O_CLOEXEC)

    def _write(self, local: Tensor, rows: Tensor, ids: Tensor | None = None) -> None:
        descriptor = self._open()
        try:
            # Neighbours in one write.
            ends = [*((local[1:] != local[:-1] + 1).nonzero().flatten() + 1).tolist(), len(local)]
            first = 0
            for end in ends:
                piece = rows[first:end].to("cpu", self.dtype).contiguous()
                offset = shard_file.DATA_OFFSET + int(local[first]) * self._row_bytes
                files.write_at(descriptor, shard_file.raw_bytes(piece), offset, self._path)
                first = end
            if ids is not None:
                files.write_at(descriptor, shard_file.raw_bytes(ids), self._ids_at, self._path)
        finally:
            os.close(descriptor)
