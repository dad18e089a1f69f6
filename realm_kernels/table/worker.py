"""One refresh in the background: a thread encodes a snapshot into the second buffer and commits it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ranks import LostRankError
from ..validation import FLOAT_DTYPES, check_tensor
from .encoders import Encoder
from .sharded import ShardedTable
from .writer import TableWriter

OP = "TableRefresher"
logger = logging.getLogger("realm_kernels.table")


class Cancelled(Exception):
    """The refresh is no longer wanted: the refresher was closed, or the program ends."""


@dataclass
class Refresh:
    """A refresh under way. The worker writes every field but `step` and `snapshot`, and sets `done` last."""

    step: int  # of the snapshot
    snapshot: Any
    done: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None  # why it is given up; None where the buffer is whole
    failures: int = 0  # attempts that failed, commits included
    seconds: float = 0.0  # of the last attempt's encoding
    version: int = 0  # of the commit; 0 where nothing was committed
    checksums: list[str] = field(default_factory=list)  # of the commit's shards


class Worker:
    """Runs one Refresh at a time in a thread of its own, on CUDA in a stream of its own."""

    def __init__(
        self,
        table: ShardedTable,
        encode: Callable[[Any], Iterable[Tensor]],
        path: str | os.PathLike[str] | None,
        attempts: int,
    ) -> None:
        self.shards, self.row_ids, self.num_rows = table.shards, table.row_ids, table.num_rows
        self.encode, self.path, self.attempts = encode, path, attempts
        self.buffer: list[Tensor] = []
        self._thread: threading.Thread | None = None
        self._stream = torch.cuda.Stream(table.device) if table.device.type == "cuda" else None

    def start(self, refresh: Refresh, version: int) -> None:
        """Begin; `version` is the least the commit may get. Every earlier refresh must be done."""
        ready = None
        if self._stream is not None:
            # The trainer's stream may still be copying the snapshot, or the last buffer into the table.
            ready = torch.cuda.current_stream(self.shards[0].device).record_event()
        # Not a daemon: torch must not be torn down under it. At the program's end it stops at the next chunk.
        self._thread = threading.Thread(
            target=self._run, args=(refresh, version, ready), name="table-refresh"
        )
        self._thread.start()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def stop(self, refresh: Refresh) -> None:
        """End it at its next chunk, or at once where its encoder can, and wait for that."""
        refresh.cancelled.set()
        if isinstance(self.encode, Encoder):
            self.encode.interrupt()
        self.join()

    def close(self) -> None:
        if isinstance(self.encode, Encoder):
            self.encode.close()

    def _run(self, refresh: Refresh, version: int, ready: torch.cuda.Event | None) -> None:
        try:
            with torch.cuda.stream(self._stream), torch.no_grad():
                if self._stream is not None and ready is not None:
                    self._stream.wait_event(ready)
                self._attempt(refresh)
                self._commit(refresh, version)
        except BaseException as error:  # nobody above this frame could tell the trainer
            refresh.error = error
        finally:
            refresh.done.set()

    def _attempt(self, refresh: Refresh) -> None:
        """Fill the buffer, in `attempts` attempts at most."""
        for attempt in range(1, self.attempts + 1):
            started = time.monotonic()
            try:
                self._fill(refresh)
                if self._stream is not None:
                    self._stream.synchronize()
                refresh.seconds = time.monotonic() - started
                return
            except Cancelled:
                raise
            except LostRankError:  # it will not come back
                refresh.failures += 1
                raise
            except Exception as error:
                if refresh.cancelled.is_set():
                    raise Cancelled(f"{OP}: the refresh of step {refresh.step} was cancelled") from error
                refresh.failures += 1
                logger.warning(
                    "refresh of step %d failed (attempt %d of %d), the table stays as it is: %s: %s",
                    refresh.step, attempt, self.attempts, type(error).__name__, error,
                )  # fmt: skip
                if attempt == self.attempts:
                    raise

    def _fill(self, refresh: Refresh) -> None:
        if not self.buffer:
            self.buffer = [torch.empty_like(shard) for shard in self.shards]
        target = RowCursor(self.buffer)
        chunks = self.encode(refresh.snapshot)
        try:
            for chunk in chunks:
                self._stop_if_unwanted(refresh)
                check_tensor(
                    OP, "a chunk of encode", chunk, "[n, D]", (None, self.buffer[0].shape[1]), FLOAT_DTYPES
                )
                # A search never returns NaN: a broken encoder would empty the index without a word.
                if not bool(chunk.isfinite().all()):
                    after = target.rows + chunk.shape[0]
                    raise ValueError(
                        f"{OP}: encode must yield finite numbers, got NaN or infinity in rows "
                        f"[{target.rows}, {after})"
                    )
                target.write(chunk)
        finally:
            if isinstance(chunks, Generator):
                chunks.close()
        if target.rows != self.num_rows:
            raise ValueError(f"{OP}: encode must yield N={self.num_rows} rows in all, got {target.rows}")
        if self.row_ids is not None:
            self.row_ids.bury(self.buffer)

    def _commit(self, refresh: Refresh, version: int) -> None:
        """Write the buffer to `path`. Failing costs durability only: the rows are good, and are used."""
        if self.path is None:
            return
        try:
            first = self.buffer[0]
            with TableWriter(self.path, dim=first.shape[1], dtype=first.dtype) as writer:
                writer.at_least(version)
                for number, shard in enumerate(self.buffer):
                    self._stop_if_unwanted(refresh)
                    writer.append(shard, None if self.row_ids is None else self.row_ids.stored(number))
            refresh.version, refresh.checksums = writer.version, writer.committed().checksums
        except Cancelled:
            raise
        except Exception as error:
            refresh.failures += 1
            logger.warning(
                "refresh of step %d is not on disk: %s: %s", refresh.step, type(error).__name__, error
            )

    def _stop_if_unwanted(self, refresh: Refresh) -> None:
        if refresh.cancelled.is_set() or not threading.main_thread().is_alive():
            raise Cancelled(f"{OP}: the refresh of step {refresh.step} was cancelled")


class RowCursor:
    """Copies chunks of rows, one after another, into the same storage of a list of shards."""

    def __init__(self, shards: Sequence[Tensor]) -> None:
        self.rest = [shard for shard in shards if shard.shape[0] > 0]
        self.rows = 0

    @torch.no_grad()
    def write(self, chunk: Tensor) -> None:
        while chunk.shape[0] > 0:
            if not self.rest:
                raise ValueError(f"{OP}: encode must yield N={self.rows} rows in all, got more")
            taken = min(chunk.shape[0], self.rest[0].shape[0])
            self.rest[0][:taken].copy_(chunk[:taken])
            self.rows += taken
            chunk, self.rest[0] = chunk[taken:], self.rest[0][taken:]
            if self.rest[0].shape[0] == 0:
                del self.rest[0]
