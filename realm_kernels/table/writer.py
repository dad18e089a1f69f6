"""rk.TableWriter: stream rows into a table directory; they appear all at once, or not at all."""

from __future__ import annotations

import os
from types import TracebackType

import torch
from torch import Tensor

from ..validation import FLOAT_DTYPES, check_tensor, dtype_name
from . import manifest
from .manifest import Manifest
from .shard_stream import ShardStream
from .transaction import Transaction

OP = "TableWriter"
SHARD_ROWS = 1 << 20  # 512 MiB of float32 at D = 128: few files, each checked in about a second


class TableWriter:
    """Write a table directory as a stream of rows, committed whole when the `with` block ends.

    path: directory of the table; created with its parents where it is missing. A table that is there already
        is replaced, as its next version; TableEditor changes one instead.
    dim: D, columns of every row.
    dtype: torch.float32, bfloat16 or float16, of the rows on disk.
    shard_rows: rows per file. At most one piece of 16 MiB is held in memory, however many rows come.

    Until the block ends readers see the table as it was, after it the new one: the commit is one rename of
    manifest.json. If the block ends by an exception, or the process dies at any instant, the old table stays.
    One writer at a time: a second one raises BlockingIOError. `version` is the number the commit gets, one
    more than that of the table it replaces.

    Raises TypeError or ValueError for bad arguments or rows, ValueError where a damaged table is in the way,
    OSError naming the path where the disk is full or the folder cannot be written.

    >>> import tempfile, torch, realm_kernels as rk
    >>> with rk.TableWriter(tempfile.mkdtemp(), dim=128, dtype=torch.bfloat16) as writer:
    ...     for _ in range(3):
    ...         writer.append(torch.randn(1000, 128))
    """

    def __init__(
        self, path: str | os.PathLike[str], *, dim: int, dtype: torch.dtype, shard_rows: int = SHARD_ROWS
    ) -> None:
        check_count(OP, "dim", dim)
        check_count(OP, "shard_rows", shard_rows)
        if dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{OP}: dtype must be one of {', '.join(map(dtype_name, FLOAT_DTYPES))}, got {dtype!r}"
            )
        self.dim, self.dtype = dim, dtype
        self.rows = 0
        self._transaction = Transaction(path)
        self._stream = ShardStream(self._transaction, dim, dtype, shard_rows)
        self._next_id = 0
        self._broken = False

    @property
    def version(self) -> int:
        return self._transaction.version

    def __enter__(self) -> TableWriter:
        if self._transaction.begun:
            raise RuntimeError(f"{OP}: a writer writes once: make a new one for {self._transaction.path}")
        self._transaction.begin(create=True)
        return self

    def at_least(self, version: int) -> None:
        """Give the commit no smaller number than this; before the first append."""
        self._transaction.version = max(self._transaction.version, version)

    def append(self, rows: Tensor, ids: Tensor | None = None) -> None:
        """Add rows [n, dim] of a float dtype, from any device; they are converted to the table's dtype.

        ids: int64 [n], growing, for a copy of a table whose rows have names already (`table.ids`, as its rows
            are appended); None counts on. -1 - i is the tombstone of row i.
        """
        if not self._transaction.is_open:
            raise RuntimeError(f"{OP}: append works inside the `with` block only")
        check_tensor(OP, "rows", rows, "[n, dim]", (None, self.dim), FLOAT_DTYPES)
        if ids is None:
            ids = torch.arange(self._next_id, self._next_id + rows.shape[0])
        else:
            ids = self._checked(ids, rows.shape[0])
        if rows.shape[0] == 0:
            return
        self._broken = True  # until all of the rows are written: a part of them must never be committed
        self._stream.append(rows, ids)
        self._broken = False
        self.rows += rows.shape[0]
        self._next_id = int(torch.where(ids[-1] < 0, -1 - ids[-1], ids[-1])) + 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        whole = False
        try:
            if kind is None:
                if self._broken:
                    raise RuntimeError(
                        f"{OP}: an append failed, so nothing is committed to {self._transaction.path}"
                    )
                shards = self._stream.finish()
                self._transaction.commit(
                    manifest.assemble(self.version, self.dim, self.dtype, shards, self._next_id)
                )
                whole = True
        finally:
            self._stream.close()
            self._transaction.end(whole)

    def committed(self) -> Manifest:
        """The manifest that was committed. RuntimeError before that."""
        if self._transaction.new is None or self._transaction.is_open:
            path = self._transaction.path
            raise RuntimeError(f"{OP}: nothing is committed to {path} by this writer yet")
        return self._transaction.new

    def _checked(self, ids: Tensor, rows: int) -> Tensor:
        check_tensor(OP, "ids", ids, "[n]", (rows,), (torch.int64,))
        ids = ids.cpu()
        whole = torch.where(ids < 0, -1 - ids, ids)
        before = torch.cat([torch.tensor([self._next_id - 1]), whole[:-1]]) if rows > 0 else whole
        if not bool((whole > before).all()):
            raise ValueError(f"{OP}: ids must grow, from {self._next_id} on, got {ids.tolist()[:5]} ...")
        return ids


def check_count(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")
