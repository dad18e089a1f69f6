"""Rows of host memory on a GPU, a window at a time: while one is searched the next is copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

WINDOW_BYTES = 64 << 20  # of each of two buffers: a millisecond of PCIe, longer than a window's launches take
BUFFERS = 2


def spans(shards: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of every shard."""
    first = 0
    for shard in shards:
        yield first, shard
        first += shard.shape[0]


def is_pinned(shards: Sequence[Tensor]) -> bool:
    """Whether a GPU can read all these rows where they are, in page-locked memory."""
    return all(shard.numel() == 0 or shard.is_pinned() for shard in shards)


def refuse_capture() -> None:
    """Raise RuntimeError during the capture of a CUDA graph: the host has no part in a replay."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "mips_topk: rows in pageable or mapped host memory are read by the host, which cannot be "
            "captured in a CUDA graph: use table.pin_memory() or table.to(device)"
        )


def windows(rows: Iterable[tuple[int, Tensor]], device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows on `device`) of parts of WINDOW_BYTES at most; the next but one overwrites it.

    rows: (first row, rows on the CPU), all of one width and dtype. Work that the caller launches on the
    current stream between two windows is waited for before the first of them is overwritten. The copy of the
    next window runs on a stream of its own meanwhile: pinned rows are copied by the GPU alone, and can be
    captured in a CUDA graph; others pass through two pinned buffers, which the host fills.
    """
    number = 0
    buffers: _Buffers | None = None
    for first, window in rows:
        part_rows = max(1, WINDOW_BYTES // max(1, window.shape[1] * window.element_size()))
        for part in window.split(part_rows):
            if part.shape[0] > 0:
                if buffers is None:
                    buffers = _Buffers(part_rows, part, device)
                yield first, buffers.fill(number % BUFFERS, part)
                buffers.release(number % BUFFERS)
                number += 1
                first += part.shape[0]


class _Buffers:
    """Two buffers of rows on a device, and what orders the copies into them; on the CPU nothing need."""

    def __init__(self, part_rows: int, like: Tensor, device: torch.device) -> None:
        shape = (BUFFERS, part_rows, like.shape[1])
        self._rows = torch.empty(shape, dtype=like.dtype, device=device)
        self._on_gpu = device.type == "cuda"
        if not self._on_gpu:
            return
        if not like.is_pinned():
            refuse_capture()
        self._search = torch.cuda.current_stream(device)
        self._copies = torch.cuda.Stream(device)
        self._copies.wait_stream(self._search)  # for what had this memory before
        self._copied = [torch.cuda.Event() for _ in range(BUFFERS)]
        self._searched = [torch.cuda.Event() for _ in range(BUFFERS)]
        self._is_used = [False] * BUFFERS
        self._staging: Tensor | None = None

    def fill(self, which: int, part: Tensor) -> Tensor:
        """The part, on the device for whatever the current stream does next."""
        target = self._rows[which, : part.shape[0]]
        if not self._on_gpu:
            return target.copy_(part)
        if not part.is_pinned():
            part = self._staged(which, part)
        with torch.cuda.stream(self._copies):
            if self._is_used[which]:
                self._copies.wait_event(self._searched[which])
            target.copy_(part, non_blocking=True)
            self._copied[which].record(self._copies)
        self._search.wait_event(self._copied[which])
        return target

    def release(self, which: int) -> None:
        """What was launched so far is all that reads this buffer."""
        if self._on_gpu:
            self._searched[which].record(self._search)
            self._is_used[which] = True

    def _staged(self, which: int, part: Tensor) -> Tensor:
        if self._staging is None:
            self._staging = torch.empty(self._rows.shape, dtype=self._rows.dtype, pin_memory=True)
        if self._is_used[which]:
            self._copied[which].synchronize()  # the copy out of this half is over
        return self._staging[which, : part.shape[0]].copy_(part)
