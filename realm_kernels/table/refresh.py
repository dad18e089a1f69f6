"""rk.TableRefresher: re-encode a table in the background while a trainer uses it; swap at a step boundary."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ..validation import check_choice, describe
from . import manifest, quantized
from .distributed import DistributedTable
from .sharded import ShardedTable
from .worker import OP, Refresh, RowCursor, Worker

logger = logging.getLogger("realm_kernels.table")

MODES = ("async", "fixed_lag")


@dataclass(frozen=True)
class RefreshMetrics:
    """How the refresher does; counts are since the start of the run, resumed runs included."""

    age: int  # steps since the snapshot that the current table was encoded from
    refreshes: int  # swaps
    failures: int  # attempts to encode or to commit that failed
    late: int  # async: snapshots that had to wait for a running refresh; fixed_lag: swaps waited for
    rows_per_second: float  # of the last refresh that was swapped in; 0.0 before the first
    version: int  # of the current table


class TableRefresher:
    """Keep a table fresh: every `every` steps a snapshot of the encoder re-encodes the corpus in background.

    table: ShardedTable in contiguous memory, or the DistributedTable that holds one on each rank. A swap
        copies the new rows into these same tensors, at a step boundary and in stream order, so captured
        graphs and compiled code stay valid. Across ranks step(), build() and load_state_dict() are
        collective: all swap at one boundary, or none does.
    encode: called in the thread, without gradients, with a snapshot; yields row chunks [n, D] of a float
        dtype, in the order of the row ids, N rows in all. It must use a model of its own, in eval mode, and
        draw no random numbers: torch's CPU generator is shared by all threads. N are the rows of this rank.
        A ProcessEncoder or a RanksEncoder runs it elsewhere.
    mode: "async": a finished refresh is swapped in at the next boundary; the trainer never waits, and the
        step of the swap depends on the clock. "fixed_lag": the swap comes exactly `lag` steps after the
        snapshot; the trainer waits if it must, and a resumed run has the losses of an undisturbed one.
    every: steps between snapshots, counted from the first step() or from build(). A refresh that is still
        running postpones the next one.
    lag: in [1, every]; for "fixed_lag" only.
    path: directory to which every refreshed table is committed before it is swapped in.
    attempts: how often the encoding of one snapshot is tried.

    A refresh that fails leaves the current table in use; it is counted, logged (logger "realm_kernels.table")
    and tried again, with the same snapshot up to `attempts` times, then with the next one. A commit that
    fails is counted and logged, and the rows are used all the same. Close it, or use it as a context manager:
    that joins the thread. Not for use from several threads.

    Rows that are not finite are a failure too. What one rank gives up, all do.

    Raises TypeError or ValueError for bad arguments; step(), build() and load_state_dict() raise
    LostRankError where another rank is lost.

    >>> import torch, realm_kernels as rk
    >>> table = rk.ShardedTable.from_tensors([torch.zeros(100, 8)])
    >>> encode = lambda snapshot: (torch.full((50, 8), snapshot["w"].item()) for _ in range(2))
    >>> with rk.TableRefresher(table, encode, mode="fixed_lag", every=4, lag=2) as refresher:
    ...     for step in range(10):
    ...         swapped = refresher.step(step, lambda: {"w": torch.tensor(float(step))})
    >>> table.shards[0][0, 0], refresher.metrics.age
    (tensor(4.), 5)
    """

    def __init__(
        self,
        table: ShardedTable | DistributedTable,
        encode: Callable[[Any], Iterable[Tensor]],
        *,
        mode: str,
        every: int,
        lag: int | None = None,
        path: str | os.PathLike[str] | None = None,
        attempts: int = 2,
    ) -> None:
        self._local = _local_part(table)
        _check_arguments(self._local, encode, mode, every, lag, attempts)
        self._ranks = table.ranks.serving(OP) if isinstance(table, DistributedTable) else None
        self.table, self.mode, self.every, self.lag = table, mode, every, lag
        self.path = None if path is None else Path(path)
        self._worker = Worker(self._local, encode, path, attempts)
        self._pending: Refresh | None = None
        self._current: Any = None  # snapshot that the table was encoded from; None: it came from elsewhere
        self._checksums: list[str] = []  # of the current table's commit
        self._step: int | None = None  # the last boundary
        self._snapshot_step: int | None = None  # of the last snapshot: `every` is counted from it
        self._table_step: int | None = None  # of the current table's snapshot
        self._pending_is_late = False  # the pending refresh is counted as late
        self._refreshes = self._failures = self._late = 0
        self._rows_per_second = 0.0
        self._closed = False

    def step(self, step: int, snapshot: Callable[[], Any]) -> bool:
        """Call at each step boundary, before the work of `step`. Returns whether the table was swapped.

        step: grows from call to call; in mode "fixed_lag" by one.
        snapshot: called only where a snapshot is due; returns what `encode` takes, as `encoder.state_dict`
            does. It may return live tensors: the refresher keeps a deep copy.
        """
        self._check_step(step)
        self._step = step
        if self._snapshot_step is None:
            self._snapshot_step = self._table_step = step
        swapped = self._collect(step)
        if step - self._snapshot_step >= self.every:
            if self._pending is None:
                self._begin(step, copy.deepcopy(snapshot()))
            elif not self._pending_is_late:
                self._count_late(f"the snapshot due at step {step} waits")
        return swapped

    def build(self, step: int, snapshot: Callable[[], Any]) -> None:
        """Encode the table now and wait for it: a run's first index, or a fresh one for an evaluation.

        A refresh under way is dropped. Raises what `encode` raised, with the table as it was.
        """
        self._check_open()
        self._drop()
        self._begin(step, copy.deepcopy(snapshot()))
        error = self._finish()
        if error is not None:
            raise error

    @property
    def metrics(self) -> RefreshMetrics:
        age = 0
        if self._step is not None and self._table_step is not None:
            age = max(0, self._step - self._table_step)
        failures = self._failures + (self._pending.failures if self._pending else 0)
        return RefreshMetrics(
            age, self._refreshes, failures, self._late, self._rows_per_second, self.table.version
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the snapshots of the current and of the pending table, and the counts.

        Take it between two calls of step(). It holds tensors, numbers and what `snapshot` returned, so
        torch.load reads it with weights_only=True where that does. The rows are not in it: they are encoded
        again, or read back from `path`.
        """
        pending = self._pending
        return {
            "step": self._step,
            "snapshot_step": self._snapshot_step,
            "table_step": self._table_step,
            "current": self._current,
            "checksums": list(self._checksums),
            "pending_step": None if pending is None else pending.step,
            "pending": None if pending is None else pending.snapshot,
            "refreshes": self._refreshes,
            "failures": self.metrics.failures,
            "late": self._late,
            "rows_per_second": self._rows_per_second,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict(): the table as it was then, and its pending refresh started again.

        The table is read back from `path` where its commit is still there, checked by content, and encoded
        from its snapshot otherwise. A table that no refresh had touched yet is left as it is: pass the same
        one as then, or make the first one with build(). Raises what `encode` raised.
        """
        self._check_open()
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"{OP}: state must be a TableRefresher's state_dict(), got the keys {sorted(state)}"
            )
        self._drop()
        checksums = list(state["checksums"])
        if state["current"] is not None:
            checksums = self._restore(state["table_step"], state["current"], checksums)
        self._current, self._checksums = state["current"], checksums
        self._step, self._table_step = state["step"], state["table_step"]
        self._refreshes, self._failures, self._late = state["refreshes"], state["failures"], state["late"]
        self._rows_per_second = state["rows_per_second"]
        if state["pending_step"] is not None:
            self._begin(state["pending_step"], state["pending"])
        self._snapshot_step = state["snapshot_step"]

    def close(self) -> None:
        """Drop a refresh under way and join its thread. The table stays; calling it twice is harmless."""
        self._drop()
        self._worker.close()
        self._closed = True

    def __enter__(self) -> TableRefresher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, step: int, snapshot: Any) -> None:
        self._pending = Refresh(step, snapshot)
        self._snapshot_step = step
        self._pending_is_late = False
        self._worker.start(self._pending, self._local.version + 1)

    def _collect(self, step: int) -> bool:
        """Swap where the pending refresh is due; True where it was."""
        pending = self._pending
        if pending is None:
            return False
        if self.mode == "async":
            return self._is_done(pending) and self._finish() is None
        assert self.lag is not None
        if step < pending.step + self.lag:
            return False
        if not pending.done.is_set():
            self._count_late(f"the swap of step {step} waits")
        return self._finish() is None

    def _finish(self) -> BaseException | None:
        """Wait for the pending refresh and swap; where it failed, the error, with the table as it was."""
        pending = self._await()
        error, version = self._agreed(pending.error, pending.version or self._local.version + 1)
        if error is not None:
            logger.error(
                "refresh of step %d is given up, the table of step %s stays in use: %s: %s",
                pending.step, self._table_step, type(error).__name__, error,
            )  # fmt: skip
            return error
        self._copy_in(self._worker.buffer, version)
        self._current, self._checksums, self._table_step = pending.snapshot, pending.checksums, pending.step
        self._refreshes += 1
        self._rows_per_second = self._local.num_rows / max(pending.seconds, 1e-9)
        logger.info("table of step %d in use, %.0f rows/s", pending.step, self._rows_per_second)
        return None

    def _await(self) -> Refresh:
        """The pending refresh, when it is done."""
        pending = self._pending
        assert pending is not None
        self._worker.join()
        self._pending = None
        self._failures += pending.failures
        return pending

    def _is_done(self, pending: Refresh) -> bool:
        """On all ranks: no rank swaps before the slowest can."""
        done = pending.done.is_set()
        if self._ranks is not None:
            done = all(flag for (flag,) in self._ranks.agree("refresh", [int(done)]))
        return done

    def _agreed(self, error: BaseException | None, version: int) -> tuple[BaseException | None, int]:
        """An error where any rank has one, and one version for all: a search compares the versions."""
        if self._ranks is None:
            return error, version
        headers = self._ranks.agree("refresh", [int(error is None), version])
        for rank, (fine, _) in enumerate(headers):
            if not fine and error is None:
                error = RuntimeError(f"{OP}: rank {rank} could not encode its rows; its own error says why")
        return error, max(version for _, version in headers)

    def _restore(self, step: int, snapshot: Any, checksums: list[str]) -> list[str]:
        """The table of a snapshot, read back where its commit is on disk and encoded again otherwise.

        Returns the checksums of its commit.
        """
        error: BaseException | None = None
        if not self._read_back(checksums):
            self._begin(step, snapshot)
            again = self._await()
            error, checksums = again.error, again.checksums
            if error is None:
                self._copy_in(self._worker.buffer, again.version or self._local.version + 1)
        error, version = self._agreed(error, self._local.version)
        if error is not None:
            raise error
        self._local.version = version
        return checksums

    def _copy_in(self, shards: Sequence[Tensor], version: int) -> None:
        target = RowCursor(self._local.shards)
        for shard in shards:
            target.write(shard)
        if self._local.codes is not None:
            quantized.refresh(self._local.shards, self._local.codes.tensors())
        self._local.version = version
        self._local.hold = None  # no row comes from the files any more that it was opened from

    def _read_back(self, checksums: list[str]) -> bool:
        """Fill the table from `path` if the very rows with these checksums are committed there."""
        if self.path is None or not checksums:
            return False
        try:
            committed = manifest.read(self.path)
            if committed.checksums != checksums:
                return False
            stored = ShardedTable.open(self.path, verify=True)
        except (OSError, ValueError) as error:
            logger.warning("the table is encoded again, it cannot be read back: %s", error)
            return False
        table = self._local
        same_kind = (stored.num_rows, stored.dim, stored.dtype) == (table.num_rows, table.dim, table.dtype)
        if stored.version != committed.version or not same_kind:
            return False
        self._copy_in(stored.shards, stored.version)
        return True

    def _drop(self) -> None:
        """End the pending refresh, if there is one, at its next chunk, and forget it."""
        if self._pending is not None:
            self._worker.stop(self._pending)
            self._failures += self._pending.failures
            self._pending = None

    def _count_late(self, what: str) -> None:
        assert self._pending is not None
        self._late += 1
        self._pending_is_late = True
        logger.info("refresh of step %d is late: %s", self._pending.step, what)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{OP}: this refresher is closed")

    def _check_step(self, step: int) -> None:
        self._check_open()
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"{OP}: step must be an int, got {describe(step)}")
        if self._step is None:
            return
        if step <= self._step:
            raise ValueError(f"{OP}: step must grow, it was {self._step}, got {step}")
        if self.mode == "fixed_lag" and step != self._step + 1:
            raise ValueError(
                f"{OP}: step must grow by one in mode 'fixed_lag', which swaps at exact steps: "
                f"it was {self._step}, got {step}"
            )


def _local_part(table: object) -> ShardedTable:
    if isinstance(table, DistributedTable):
        return table.local
    if not isinstance(table, ShardedTable):
        raise TypeError(f"{OP}: table must be a ShardedTable or a DistributedTable, got {describe(table)}")
    return table


def _check_arguments(
    table: ShardedTable, encode: object, mode: str, every: int, lag: int | None, attempts: int
) -> None:
    for number, shard in enumerate(table.shards):
        if not shard.is_contiguous():
            raise ValueError(
                f"{OP}: table must have contiguous shards to be swapped into, got shard {number} strided"
            )
    if not callable(encode):
        raise TypeError(f"{OP}: encode must be a function of a snapshot, got {describe(encode)}")
    check_choice(OP, "mode", mode, MODES)
    for name, value in (("every", every), ("attempts", attempts)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{OP}: {name} must be an int, got {describe(value)}")
        if value < 1:
            raise ValueError(f"{OP}: {name} must be at least 1, got {value}")
    if mode == "async" and lag is not None:
        raise ValueError(
            f"{OP}: lag must be None in mode 'async', which swaps when a refresh is ready, got {lag}"
        )
    if mode == "fixed_lag" and (isinstance(lag, bool) or not isinstance(lag, int) or not 1 <= lag <= every):
        raise ValueError(f"{OP}: lag must be in [1, every={every}] in mode 'fixed_lag', got {lag!r}")
