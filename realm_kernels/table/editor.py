"""rk.TableEditor: append, replace and take out rows of a table directory, as its next version."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from ..validation import FLOAT_DTYPES, check_tensor, describe
from . import manifest, shard_file
from .draft import Draft
from .manifest import Manifest, Shard
from .row_ids import without_sign
from .shard_stream import PIECE_BYTES, ShardStream
from .transaction import Transaction
from .writer import SHARD_ROWS, check_count

OP = "TableEditor"


class TableEditor:
    """Change the table at `path`; everything in the `with` block is one commit, whole or not at all.

    path: directory of a table.
    shard_rows: rows per file, of files that are written.

    A row keeps its id in every version: the first commit gives 0, 1, 2, ..., appended rows count on, and an
    id is never given twice. Shards without a changed row are shared with the version before, not written
    again; a shard with one is written anew, whole. Memory is bounded as TableWriter's, whatever is changed.
    Durability, locking and errors are TableWriter's too, and FileNotFoundError where there is no table.

    >>> import tempfile, torch, realm_kernels as rk
    >>> path = tempfile.mkdtemp()
    >>> version = rk.ShardedTable.from_tensors([torch.randn(1000, 128)]).save(path)
    >>> with rk.TableEditor(path) as editor:
    ...     new = editor.append(torch.randn(10, 128))
    ...     editor.replace([3], torch.randn(1, 128))
    ...     editor.tombstone([17, 250])
    >>> new
    range(1000, 1010)
    """

    def __init__(self, path: str | os.PathLike[str], *, shard_rows: int = SHARD_ROWS) -> None:
        check_count(OP, "shard_rows", shard_rows)
        self.shard_rows = shard_rows
        self._transaction = Transaction(path)
        self._drafts: dict[int, Draft] = {}  # by number of the shard
        self._broken = False
        self._compacts = False

    @property
    def version(self) -> int:
        """The number that the commit gets."""
        return self._transaction.version

    def __enter__(self) -> TableEditor:
        if self._transaction.begun:
            raise RuntimeError(f"{OP}: an editor commits once: make a new one for {self._transaction.path}")
        self._transaction.begin(create=False)
        assert self._transaction.old is not None
        self._old = self._transaction.old
        self._next_id = self._old.next_id
        self._stream = ShardStream(self._transaction, self._old.dim, self._old.dtype, self.shard_rows)
        return self

    def append(self, rows: Tensor) -> range:
        """Add rows [n, D] of a float dtype behind the last one; returns the ids they get."""
        self._check_open("append")
        check_tensor(OP, "rows", rows, "[n, D]", (None, self._old.dim), FLOAT_DTYPES)
        ids = range(self._next_id, self._next_id + rows.shape[0])
        if len(ids) > 0:
            self._broken = True
            self._stream.append(rows, torch.arange(ids.start, ids.stop))
            self._broken = False
            self._next_id = ids.stop
        return ids

    def replace(self, ids: Tensor | Sequence[int], rows: Tensor) -> None:
        """Give the rows with these ids, [n] of the version before this block, new values [n, D].

        Raises ValueError for an id that comes twice, or that no row has.
        """
        self._check_open("replace")
        wanted, order = self._checked(ids)
        check_tensor(OP, "rows", rows, "[n, D]", (len(wanted), self._old.dim), FLOAT_DTYPES)
        places = self._places(wanted)
        self._broken = True
        for number, local, chosen in places:
            self._draft(number).replace(local, rows.detach()[order[chosen].to(rows.device)])
        self._broken = False

    def tombstone(self, ids: Tensor | Sequence[int]) -> None:
        """Take out the rows with these ids, [n] of the version before this block: no search returns them.

        Their values are overwritten with NaN. Their places and ids stay, until compact() drops the places.
        Raises ValueError for an id that comes twice, or that no row has.
        """
        self._check_open("tombstone")
        wanted, _ = self._checked(ids)
        places = self._places(wanted)
        self._broken = True
        for number, local, _ in places:
            self._draft(number).tombstone(local)
        self._broken = False

    def compact(self) -> None:
        """Drop the places of tombstones, and join neighbours of small shards, when the block ends.

        Rows move up, in their order, and keep their ids: `table.ids` tells them. Shards of half of shard_rows
        or more in which nothing is dropped are shared.
        """
        self._check_open("compact")
        self._compacts = True

    def committed(self) -> Manifest:
        """The manifest that was committed. RuntimeError before that."""
        if self._transaction.new is None or self._transaction.is_open:
            raise RuntimeError(f"{OP}: nothing is committed to {self._transaction.path} by this editor yet")
        return self._transaction.new

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        whole = False
        try:
            if kind is None:
                self._commit()
                whole = True
        finally:
            self._stream.close()
            self._transaction.end(whole)

    def _commit(self) -> None:
        if self._broken:
            raise RuntimeError(f"{OP}: a change failed, so nothing is committed to {self._transaction.path}")
        shards = [
            self._drafts[number].finish() if number in self._drafts else shard
            for number, shard in enumerate(self._old.shards)
        ]
        shards += self._stream.finish()
        if self._compacts:
            shards = self._compacted(shards)
        self._transaction.commit(
            manifest.assemble(self.version, self._old.dim, self._old.dtype, shards, self._next_id)
        )

    def _compacted(self, shards: list[Shard]) -> list[Shard]:
        """The same live rows, in order; runs of neighbours that can shrink or join are written together."""
        result: list[Shard] = []
        run: list[Shard] = []
        for shard in shards:
            if shard.tombstones > 0 or 2 * shard.rows < self.shard_rows:
                run.append(shard)
                continue
            result += [*self._rewritten(run), shard]
            run = []
        return result + self._rewritten(run)

    def _rewritten(self, run: list[Shard]) -> list[Shard]:
        if len(run) == 1 and run[0].tombstones == 0:
            return run
        dim, dtype, directory = self._old.dim, self._old.dtype, self._transaction.path
        for shard in run:
            with shard_file.opened(directory, shard, dim, dtype) as (descriptor, _):
                # A new checksum over damaged rows would hide the damage for good.
                shard_file.check_content(descriptor, directory / shard.file, shard)
            rows = shard_file.read(directory, shard, dim, dtype, mmap=True, verify=False)
            ids = ids_of(self._transaction, shard, dim, dtype)
            step = max(1, PIECE_BYTES // (4 * dim))
            for piece, piece_ids in zip(rows.split(step), ids.split(step), strict=True):
                alive = piece_ids >= 0
                self._stream.append(piece[alive], piece_ids[alive])
        return self._stream.finish()

    def _draft(self, number: int) -> Draft:
        if number not in self._drafts:
            old = self._old
            self._drafts[number] = Draft(self._transaction, old.shards[number], old.dim, old.dtype)
        return self._drafts[number]

    def _checked(self, ids: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """(ids in their order, where each came in the argument), int64 [n] on the CPU."""
        if not isinstance(ids, Tensor):
            try:
                ids = torch.tensor(list(ids), dtype=torch.int64)
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(f"{OP}: ids must be whole numbers [n], got {describe(ids)}") from None
        check_tensor(OP, "ids", ids, "[n]", (None,), (torch.int64,))
        wanted, order = ids.cpu().sort()
        twice = wanted[1:][wanted[1:] == wanted[:-1]]
        if twice.numel() > 0:
            raise ValueError(f"{OP}: ids must name each row once, got {int(twice[0])} twice")
        return wanted, order

    def _places(self, wanted: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """(number of a shard, rows there, which of `wanted` they are) of every shard that holds some."""
        found = torch.zeros(len(wanted), dtype=torch.bool)
        places = []
        for number, shard in enumerate(self._old.shards):
            low, high = torch.searchsorted(wanted, torch.tensor([shard.first_id, shard.after_id])).tolist()
            if low == high:
                continue
            chosen = torch.arange(low, high)
            stored = (
                self._drafts[number].ids()
                if number in self._drafts
                else ids_of(self._transaction, shard, self._old.dim, self._old.dtype)
            )
            local = torch.searchsorted(without_sign(stored), wanted[chosen])
            there = stored[local.clamp(max=len(stored) - 1)] == wanted[chosen]  # a tombstone has another sign
            found[chosen[there]] = True
            if there.any():
                places.append((number, local[there], chosen[there]))
        if not bool(found.all()):
            lacking = int(wanted[~found][0])
            raise ValueError(
                f"{OP}: ids must be those of rows in version {self._old.version} of "
                f"{self._transaction.path}, got {lacking}, which "
                + ("was taken out" if 0 <= lacking < self._old.next_id else "no row ever had")
            )
        return places

    def _check_open(self, name: str) -> None:
        if not self._transaction.is_open:
            raise RuntimeError(f"{OP}: {name} works inside the `with` block only")


def ids_of(transaction: Transaction, shard: Shard, dim: int, dtype: torch.dtype) -> Tensor:
    """The ids of a shard's rows as they are stored, also where they are plain."""
    if shard.holds_ids:
        return shard_file.read_ids(transaction.path, shard, dim, dtype)
    return torch.arange(shard.first_id, shard.after_id)
