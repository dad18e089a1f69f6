"""rk.StreamedTable: search a table on disk that is larger than memory, a window of its rows at a time."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..validation import check_tensor, dtype_name
from . import device_stream, manifest, shard_file
from .row_ids import RowIds
from .writer import check_count

if TYPE_CHECKING:
    from ..mips_topk import TopK

OP = "StreamedTable"
WINDOW_BYTES = 128 << 20  # a tenth of a second of a disk of 1 GB/s: seeks and calls between windows vanish


class StreamedTable:
    """The table committed at `path`, searched from its files; at most one window of rows is in memory.

    window_bytes: of rows that are mapped at a time. While one window is searched the kernel reads the next
        ahead (madvise), and a window that was searched is unmapped, so that its pages count for nobody.

    num_rows, dim, dtype, version, row_mask, ids(): as ShardedTable's. The files of this version stay in their
    places as long as this object lives. Memory beside the window: for a table with removed rows 8 bytes for
    each row of its edited shards.

    Raises as ShardedTable.open does; sizes and headers are checked at once, checksums never.

    >>> import tempfile, torch, realm_kernels as rk
    >>> path = tempfile.mkdtemp()
    >>> version = rk.ShardedTable.from_tensors([torch.randn(1000, 128)]).save(path)
    >>> table = rk.StreamedTable(path, window_bytes=1 << 16)
    >>> scores, indices = rk.mips_topk(torch.randn(4, 128), table, 8)
    """

    def __init__(self, path: str | os.PathLike[str], *, window_bytes: int = WINDOW_BYTES) -> None:
        check_count(OP, "window_bytes", window_bytes)
        self.path = Path(path)
        self._manifest, self._hold = manifest.read_and_hold(self.path)
        self._starts: list[int] = []
        for shard in self._manifest.shards:
            with shard_file.opened(self.path, shard, self.dim, self.dtype) as (_, start):
                self._starts.append(start)
        self._window_rows = max(1, window_bytes // (self.dim * self.dtype.itemsize))
        self.row_ids = RowIds.read(self.path, self._manifest)
        self.row_mask = None if self.row_ids is None else self.row_ids.mask()

    @property
    def num_rows(self) -> int:
        return self._manifest.rows

    @property
    def dim(self) -> int:
        return self._manifest.dim

    @property
    def dtype(self) -> torch.dtype:
        return self._manifest.dtype

    @property
    def version(self) -> int:
        return self._manifest.version

    def mips_topk(
        self,
        queries: Tensor,
        k: int,
        *,
        exclude: Tensor | None = None,
        row_mask: Tensor | None = None,
    ) -> TopK:
        """rk.mips_topk over all rows: the same ids, bits, gradients to queries and errors.

        queries [B, D] on the CPU or a GPU, exclude int64 [B, E] and row_mask bool [N] there too; row_mask
        counts beside the table's own. On a GPU windows pass through two buffers of 64 MiB, and one is copied
        while another is searched; the host fills them, so this cannot be captured in a CUDA graph.
        """
        from ..mips_topk import TopK, mips_topk
        from ..mips_topk.checks import check_call, check_values

        # The rules of the whole, before any window; a tensor without storage stands for the rows.
        device = queries.device if isinstance(queries, Tensor) else torch.device("cpu")
        rows = torch.empty(1, dtype=self.dtype, device=device).expand(self.num_rows, self.dim)
        check_call(queries, [rows], k, exclude, row_mask, self.num_rows)
        check_values(self.num_rows, exclude)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"{OP}: queries must be on cpu or cuda, got {device}")
        if self.row_mask is not None:
            alive = self.row_mask.to(device)
            row_mask = alive if row_mask is None else row_mask & alive
        scores = queries.new_empty(queries.shape[0], 0, dtype=torch.float32)
        indices = torch.empty(queries.shape[0], 0, dtype=torch.int64, device=device)
        windows = self._windows()
        for first, window in windows if device.type == "cpu" else device_stream.windows(windows, device):
            after = first + window.shape[0]
            inside = None
            if exclude is not None:
                inside = torch.where((exclude >= first) & (exclude < after), exclude - first, -1)
            found = mips_topk(
                queries,
                window,
                min(k, window.shape[0]),
                exclude=inside,
                row_mask=None if row_mask is None else row_mask[first:after],
            )
            del window  # its pages are unmapped before the next one's are touched
            ids = torch.where(found.indices >= 0, found.indices + first, -1)
            scores, indices = _first_k(torch.cat([scores, found.scores], 1), torch.cat([indices, ids], 1), k)
        return TopK(scores, indices)

    def rows(self, indices: Tensor) -> Tensor:
        """The rows with these numbers: zeros for -1. [...] int64 -> [..., D]; reads only their bytes."""
        check_tensor(OP, "indices", indices.flatten(), "[...]", (None,), (torch.int64,), torch.device("cpu"))
        flat = indices.flatten()
        if flat.numel() > 0 and not -1 <= int(flat.min()) <= int(flat.max()) < self.num_rows:
            raise ValueError(
                f"{OP}.rows: indices must be in [0, N={self.num_rows}) or -1, "
                f"got {int(flat.min())} to {int(flat.max())}"
            )
        found = torch.zeros(flat.shape[0], self.dim, dtype=self.dtype)
        row_bytes = self.dim * self.dtype.itemsize
        for shard, start in zip(self._manifest.shards, self._starts, strict=True):
            where = ((flat >= shard.first_row) & (flat < shard.first_row + shard.rows)).nonzero().flatten()
            if where.numel() == 0:
                continue
            with shard_file.opened(self.path, shard, self.dim, self.dtype) as (descriptor, _):
                for place in where.tolist():
                    offset = start + (int(flat[place]) - shard.first_row) * row_bytes
                    raw = bytearray(os.pread(descriptor, row_bytes, offset))
                    found[place] = torch.frombuffer(raw, dtype=self.dtype)
        return found.view(*indices.shape, self.dim)

    def ids(self, indices: Tensor) -> Tensor:
        """As ShardedTable.ids."""
        return indices.clone() if self.row_ids is None else self.row_ids.of(indices)

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        return (
            f"StreamedTable(num_rows={self.num_rows}, dim={self.dim}, dtype={dtype_name(self.dtype)}, "
            f"shards={len(self._manifest.shards)}, version={self.version})"
        )

    def _windows(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of one window after another; the next one is being read ahead."""
        spans = [
            (number, first, min(first + self._window_rows, shard.rows))
            for number, shard in enumerate(self._manifest.shards)
            for first in range(0, shard.rows, self._window_rows)
        ]
        if not spans:
            yield 0, torch.empty(0, self.dim, dtype=self.dtype)
        ahead = [self._map(*spans[0])] if spans else []
        for place, (number, first, _) in enumerate(spans):
            mapping, offset = ahead.pop()
            if place + 1 < len(spans):
                ahead.append(self._map(*spans[place + 1]))
            rows = torch.frombuffer(mapping, dtype=torch.uint8, offset=offset)
            del mapping  # the tensor alone keeps it: it is unmapped with the tensor
            yield self._manifest.shards[number].first_row + first, rows.view(self.dtype).view(-1, self.dim)
            del rows

    def _map(self, number: int, first: int, after: int) -> tuple[mmap.mmap, int]:
        """A mapping of rows [first, after) of a shard, which the kernel begins to read, and where in it."""
        shard, row_bytes = self._manifest.shards[number], self.dim * self.dtype.itemsize
        begin = self._starts[number] + first * row_bytes
        end = self._starts[number] + after * row_bytes
        page = begin % mmap.ALLOCATIONGRANULARITY
        with shard_file.opened(self.path, shard, self.dim, self.dtype) as (descriptor, _):
            # Copy-on-write, though nobody writes: torch warns of memory that cannot be written.
            mapping = mmap.mmap(descriptor, end - begin + page, access=mmap.ACCESS_COPY, offset=begin - page)
        with suppress(OSError):  # advice that the system does not take costs speed only
            mapping.madvise(mmap.MADV_SEQUENTIAL)
            mapping.madvise(mmap.MADV_WILLNEED)
        return mapping, page


def _first_k(scores: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k first by score, then id, then nothing, of two results side by side: ids of the second are larger.

    A stable sort is enough. What is no row at all, -1, has score -inf like a row may have, and comes last.
    """
    key = scores.detach().to(torch.float64)
    # float64 has numbers between -inf and the least float32, for rows that score -inf.
    key = torch.where(key == -torch.inf, -1e300, key).masked_fill(indices < 0, -torch.inf)
    order = key.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), indices.gather(1, order)
