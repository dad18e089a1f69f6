"""rk.ShardedTable: the rows of an index as a list of shards, in memory or mapped from a table directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from ..validation import FLOAT_DTYPES, check_tensor, describe, device_named, dtype_name
from . import manifest, quantized, shard_file
from .row_ids import RowIds
from .writer import SHARD_ROWS, TableWriter

OP = "ShardedTable"


class ShardedTable:
    """N rows of width D in S shards; row ids run through the shards in order.

    Made by `from_tensors` or `open`, and taken by rk.mips_topk in the place of a tensor. Results do not
    depend on how the rows are split.

    num_rows: N. dim: D. dtype: of every shard. device: of every shard.
    shards: tuple of tensors [n, D]; empty ones are allowed. A refresh writes into these same tensors.
    codes: what quantize() added, or None.
    version: number of the commit these rows came from; 0 for rows that never came from a directory. A
        TableRefresher raises it with every swap.
    row_mask: bool [N], False for tombstones, None where there are none. mips_topk never returns a tombstone,
        whose row is NaN; given this mask it spends less time on them.

    >>> import torch, realm_kernels as rk
    >>> table = rk.ShardedTable.from_tensors([torch.randn(600, 128), torch.randn(400, 128)])
    >>> top = rk.mips_topk(torch.randn(4, 128), table, 8)
    """

    def __init__(
        self,
        shards: Sequence[Tensor],
        version: int,
        row_ids: RowIds | None = None,
        hold: manifest.Hold | None = None,
        codes: quantized.Int8Codes | None = None,
    ) -> None:
        self.shards = tuple(shards)
        self.version = version
        self.row_ids = row_ids  # None: row i has id i
        self.hold = hold  # keeps the files in their places while they are mapped
        self.codes = codes
        self.num_rows = sum(shard.shape[0] for shard in self.shards)
        mask = None if row_ids is None else row_ids.mask()
        self.row_mask = None if mask is None else mask.to(self.device)

    @staticmethod
    def from_tensors(shards: Sequence[Tensor]) -> ShardedTable:
        """A table over tensors [n, D] of one dtype on one device. It shares their storage; nothing is copied.

        Raises TypeError or ValueError for no shard, for tensors that differ in D, dtype or device, and for
        one that requires a gradient (a table receives none: give mips_topk a plain tensor for that).
        """
        if isinstance(shards, Tensor) or not isinstance(shards, Sequence):
            raise TypeError(f"{OP}: shards must be a sequence of tensors [n, D], got {describe(shards)}")
        if len(shards) == 0:
            raise ValueError(f"{OP}: shards must hold at least one tensor [n, D], got none")
        for number, shard in enumerate(shards):
            first = shards[0] if number > 0 else None
            check_tensor(
                OP,
                f"shards[{number}]",
                shard,
                "[n, D]",
                (None, first.shape[1] if first is not None else None),
                FLOAT_DTYPES if first is None else (first.dtype,),
                None if first is None else first.device,
            )
            if shard.requires_grad:
                raise ValueError(f"{OP}: shards[{number}] must not require a gradient: pass shard.detach()")
        if shards[0].shape[1] < 1:
            raise ValueError(f"{OP}: shards must be [n, D] with D >= 1, got {describe(shards[0])}")
        return ShardedTable(shards, version=0)

    @staticmethod
    def open(
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        mmap: bool = True,
        verify: bool = False,
    ) -> ShardedTable:
        """The table committed at `path`.

        device: where the shards go; ValueError where there is none such.
        mmap: map the files instead of reading them (on the CPU: opening takes no time and no memory, and
            pages come from the disk as they are used). The mapping is copy-on-write: writing into a shard
            changes this process's memory only, never the file. It stays valid when a writer commits a newer
            version.
        verify: compare every shard with its SHA-256 as well; sizes and headers are always checked.

        Raises FileNotFoundError where there is no table or a shard is missing, ValueError naming the file
        where one is damaged, OSError where one cannot be read. Nothing is unpickled; nothing outside `path`
        is read.
        """
        place = device_named(f"{OP}.open", device)
        directory = Path(path)
        current, hold = manifest.read_and_hold(directory)
        while True:
            try:
                shards = [
                    shard_file.read(directory, shard, current.dim, current.dtype, mmap=mmap, verify=verify)
                    for shard in current.shards
                ]
                row_ids = RowIds.read(directory, current)
                break
            except FileNotFoundError:
                # Where the system has no locks a writer may remove the shards between our look at the
                # manifest and at them.
                newer, hold = manifest.read_and_hold(directory)
                if newer == current:
                    raise
                current = newer
        if not shards:
            shards = [torch.empty(0, current.dim, dtype=current.dtype)]
        moved = [shard.to(place) for shard in shards]
        is_mapped = mmap and any(shard is there for shard, there in zip(shards, moved, strict=True))
        return ShardedTable(moved, current.version, row_ids, hold if is_mapped else None)

    def save(self, path: str | os.PathLike[str], *, shard_rows: int = SHARD_ROWS) -> int:
        """Commit the rows to a table directory, whole or not at all; returns the version it got there.

        The split on disk follows `shard_rows`, not the shards in memory; ids and tombstones go along. Errors
        as TableWriter's.
        """
        with TableWriter(path, dim=self.dim, dtype=self.dtype, shard_rows=shard_rows) as writer:
            for number, shard in enumerate(self.shards):
                writer.append(shard, None if self.row_ids is None else self.row_ids.stored(number))
        return writer.version

    @property
    def dim(self) -> int:
        return self.shards[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.shards[0].dtype

    @property
    def device(self) -> torch.device:
        return self.shards[0].device

    def to(self, device: str | torch.device) -> ShardedTable:
        """The table with its shards on `device`; shards that are there already are shared, not copied.

        Codes stay with a table that stays where it is; elsewhere rows are scanned themselves. Raises
        ValueError for a device that is not there.
        """
        place = device_named(f"{OP}.to", device)
        shards = [shard.to(place) for shard in self.shards]
        codes = self.codes if shards[0].device == self.device else None
        return ShardedTable(shards, self.version, self.row_ids, self.hold, codes)

    def quantize(self, scheme: str = "int8", *, device: str | torch.device | None = None) -> ShardedTable:
        """The same rows, shared and not copied, with int8 codes that a search scans instead.

        device: where searches run, and the codes are kept: the table's own unless told. Codes on a GPU of a
            table in host memory make a table searchable there that is larger than the GPU: only the few rows
            that the codes cannot exclude are read from the host. With `pin_memory()` kernels read them where
            they are; from pageable or mapped memory the host gathers them, so that every search waits for
            the GPU and none can be captured in a graph.

        Results are those of the rows themselves, bit for bit: the scan admits what the bound of its error
        cannot exclude, and what it admits is scored from the rows. A bound that excludes little costs time
        only. The codes take one byte an element, a quarter of float32 rows. When rows are written to, by a
        TableRefresher or in place, the next search encodes them anew; in a compiled graph, which cannot, it
        scans the rows instead, and in a CUDA graph that is being captured it is an error. Writes that torch
        does not count go unseen: through numpy, DLPack or `.data`, by replays of a CUDA graph, and by other
        processes. Call quantize again after these. A TableRefresher that is given the quantised table
        encodes with every swap.

        Raises ValueError for another scheme, a device other than the CPU and CUDA or that is not there, for
        a table that is on another GPU, has D above 16384 or was made in inference mode, and on the CPU where
        the C++ module is missing.
        """
        if scheme != "int8":
            raise ValueError(f'{OP}.quantize: scheme must be "int8", got {describe(scheme)}')
        where = self.device if device is None else torch.device(device)
        if where.type == "cuda" and where.index is None and torch.cuda.is_available():
            where = torch.device("cuda", torch.cuda.current_device())
        reason = quantized.refuses(self.shards, where)
        if reason is not None:
            raise ValueError(f"{OP}.quantize: {reason}")
        codes = quantized.Int8Codes.of(self.shards, where)
        return ShardedTable(self.shards, self.version, self.row_ids, self.hold, codes)

    def pin_memory(self) -> ShardedTable:
        """The table with its rows copied to page-locked host memory, which a GPU reads by itself.

        Shards that are pinned already are shared. Raises ValueError for a table on a GPU or where torch
        finds none.
        """
        if self.device.type != "cpu" or not torch.cuda.is_available():
            there = "" if torch.cuda.is_available() else "; torch finds no GPU"
            raise ValueError(f"{OP}.pin_memory: the table must be on cpu, it is on {self.device}{there}")
        shards = [shard if shard.is_pinned() else shard.pin_memory() for shard in self.shards]
        return ShardedTable(shards, self.version, self.row_ids)

    def part(self, first: int, after: int) -> ShardedTable:
        """The rows from `first` to `after` as a table of their own, which shares their storage."""
        pieces = []
        start = 0
        for number, shard in enumerate(self.shards):
            low, high = max(first - start, 0), min(after - start, shard.shape[0])
            if low < high:
                pieces.append((number, low, high))
            start += shard.shape[0]
        pieces = pieces or [(0, 0, 0)]
        row_ids = None if first == 0 and self.row_ids is None else self._row_ids().slice(pieces)
        shards = [self.shards[number][low:high] for number, low, high in pieces]
        return ShardedTable(shards, self.version, row_ids, self.hold)

    def ids(self, indices: Tensor) -> Tensor:
        """The ids of these rows: what names a row in every version of its table. int64 [...] -> int64 [...].

        A search returns row numbers of this version. They are the ids too until a compaction drops
        tombstones, which moves rows up and leaves their ids as they were. -1 stays -1. On the CPU.
        """
        return self._row_ids().of(indices.cpu())

    def rows(self, indices: Tensor) -> Tensor:
        """The rows with these numbers: zeros for -1, NaN for a tombstone. [...] int64 -> [..., D].

        Raises TypeError or ValueError for indices that are not int64 on the table's device and, on the CPU,
        for an id outside [-1, N). On CUDA, where the look would cost a synchronisation, such an id gives a
        row of NaN.
        """
        if not isinstance(indices, Tensor):
            raise TypeError(f"{OP}.rows: indices must be a Tensor, got {describe(indices)}")
        if indices.dtype != torch.int64 or indices.device != self.device:
            raise ValueError(f"{OP}.rows: indices must be int64 on {self.device}, got {describe(indices)}")
        if indices.device.type != "cpu":
            return gather_without_sync(self.shards, indices)
        if indices.numel() > 0:
            low, high = int(indices.min()), int(indices.max())
            if low < -1 or high >= self.num_rows:
                raise ValueError(
                    f"{OP}.rows: indices must be in [0, N={self.num_rows}) or -1, got {low} to {high}"
                )
        return gather(self.shards, indices)

    def _row_ids(self) -> RowIds:
        if self.row_ids is not None:
            return self.row_ids
        sizes = [shard.shape[0] for shard in self.shards]
        return RowIds([after - size for after, size in zip(accumulate(sizes), sizes, strict=True)], sizes)

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        return (
            f"ShardedTable(num_rows={self.num_rows}, dim={self.dim}, dtype={dtype_name(self.dtype)}, "
            f"shards={len(self.shards)}, device={self.device}, version={self.version}"
            f"{'' if self.codes is None else ', codes=int8'})"
        )


def gather(shards: Sequence[Tensor], indices: Tensor) -> Tensor:
    """Rows by global id, zeros for -1; touches only the shards that hold one. Ids must be in range."""
    flat = indices.flatten()
    rows = shards[0].new_zeros(flat.shape[0], shards[0].shape[1])
    first = 0
    for shard in shards:
        where = ((flat >= first) & (flat < first + shard.shape[0])).nonzero().flatten()
        if where.numel() > 0:
            rows[where] = shard[flat[where] - first]
        first += shard.shape[0]
    return rows.view(*indices.shape, shards[0].shape[1])


def gather_without_sync(shards: Sequence[Tensor], indices: Tensor) -> Tensor:
    """The same with shapes that do not depend on values, for CUDA graphs; NaN for an id out of range."""
    rows = torch.where(indices == -1, 0.0, torch.nan).to(shards[0].dtype)[..., None]  # [..., 1]
    rows = rows.expand(*indices.shape, shards[0].shape[1])
    first = 0
    for shard in shards:
        if shard.shape[0] > 0:
            local = indices - first
            inside = (local >= 0) & (local < shard.shape[0])
            found = shard[local.clamp(0, shard.shape[0] - 1)]  # [..., D]
            rows = torch.where(inside[..., None], found, rows)
        first += shard.shape[0]
    return rows
