"""The second job of REALM's pre-training (section 3.3): ranks that embed all documents while others train.

Of the ranks of a torchrun job the first train and the last build. Trainer t of T holds the t-th part of the
index; builder b of R embeds the b-th part of the documents, and sends each trainer those of its rows that
fall into its own part. A trainer so hears from the builders whose parts meet its own, in the order of the
rows, and the builders have equal work for any T and R.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import realm_kernels as rk

from .inputs import Documents
from .model import Embedder, embed_all
from .ranks import TIMEOUT, Ranks, heard

BEAT = 1.0  # seconds between two signs of life, at least
UNHEARD = 16  # signs of life that may be under way
FOREVER = 10.0 * 365 * 86400  # seconds; until the next snapshot it takes as long as it takes


@dataclass(frozen=True)
class Job:
    """The ranks of a torchrun job, the last `builders` of which embed documents for the others."""

    ranks: Ranks
    builders: int

    @staticmethod
    def of(builders: int) -> Job:
        """Of this process. Raises ValueError where no rank is left to train."""
        ranks = Ranks.current()
        if not 0 <= builders < ranks.size:
            raise ValueError(
                f"refresh ranks must leave one rank of the job to train (torchrun --nproc-per-node), got "
                f"{builders} of {ranks.size} ranks"
            )
        return Job(ranks, builders)

    @property
    def trainers(self) -> int:
        return self.ranks.size - self.builders

    @property
    def builds(self) -> bool:
        """Whether this rank does."""
        return self.ranks.rank >= self.trainers

    def connect(self, documents: int, timeout: float = TIMEOUT) -> Links:
        """Collective. timeout: seconds that a rank waits for another before it counts as lost.

        Raises ValueError where there are fewer documents than ranks.
        """
        if self.builders == 0:
            return Links(self.ranks)
        if documents < self.ranks.size:
            raise ValueError(
                f"refresh ranks need a document for each rank of the job, got {documents} documents on "
                f"{self.ranks.size} ranks"
            )

        def group(members: list[int]) -> Any:
            # Every rank makes every group, in one order.
            return heard(lambda: dist.new_group(members, timeout=timedelta(seconds=timeout), backend=backend))

        backend = None  # as the job: GPUs train by NCCL
        training = group(list(range(self.trainers)))
        backend = "gloo"
        pulse = group(list(range(self.ranks.size)))
        encoder, served = None, []
        for trainer in range(self.trainers):
            shares = self.shares(documents, trainer)
            members = group([trainer, *(self.trainers + builder for builder in shares)])
            if self.ranks.rank == trainer:
                encoder = rk.table.RanksEncoder(members, timeout=timeout)
            elif self.ranks.rank - self.trainers in shares:
                served.append((shares[self.ranks.rank - self.trainers], members))
        trainers = Ranks(self.ranks.rank, self.trainers, training)
        return Links(trainers, encoder, served, Pulse(self, pulse), timeout)

    def shares(self, documents: int, trainer: int) -> dict[int, range]:
        """By builder the rows that it embeds for a trainer, where there are any."""
        mine = Ranks(trainer, self.trainers).part(documents)
        shares = {}
        for builder in range(self.builders):
            own = Ranks(builder, self.builders).part(documents)
            rows = range(max(mine.start, own.start), min(mine.stop, own.stop))
            if rows:
                shares[builder] = rows
        return shares


@dataclass(frozen=True)
class Links:
    """What a rank has to do with the others."""

    trainers: Ranks  # those that train; this one is none of them where it builds
    encoder: rk.table.RanksEncoder | None = None  # of a trainer: has the rows of its table embedded
    served: list[tuple[range, Any]] | None = None  # of a builder: rows, and the group that they go to
    pulse: Pulse | None = None
    timeout: float = TIMEOUT

    def beat(self) -> None:
        """At every step of a trainer: the builders learn that there is one. Raises LostRankError."""
        if self.pulse is not None:
            self.pulse.beat()

    def end(self) -> None:
        """The run is over: let the builders go."""
        if self.encoder is not None and self.pulse is not None:
            self.encoder.close()
            self.pulse.end()

    def drop(self) -> None:
        """The run has failed, or is over: wait for no rows that are on their way, and tell the builders."""
        if self.encoder is not None and self.pulse is not None and self.encoder.lost is None:
            self.encoder.lost = "the run has ended"
            self.pulse.fail()

    def serve(self, embedder: Embedder, documents: Documents) -> None:
        """Embed, as a builder, whenever a trainer sends a snapshot, until the run is over.

        Raises LostRankError where the trainer that leads died or hangs. One that does not lead is missed by
        the others, and they end.
        """
        assert self.served is not None and self.pulse is not None
        embedder.eval()
        turn = threading.Lock()  # of the embedder, whose weights are of one snapshot at a time
        threads = []
        for rows, group in self.served:
            encode = _encoder(embedder, documents, torch.arange(rows.start, rows.stop), turn)
            # Daemons: where a trainer is lost they wait for ever, and the process ends all the same.
            thread = threading.Thread(target=_serve, args=(encode, group), daemon=True)
            thread.start()
            threads.append(thread)
        self.pulse.follow()
        for thread in threads:
            thread.join(self.timeout)


_ALIVE, _OVER, _FAILED = range(3)


class Pulse:
    """Signs of life of the trainer that leads, rank 0, to the builders, which otherwise only wait for it."""

    def __init__(self, job: Job, group: Any) -> None:
        self.builders = range(job.trainers, job.ranks.size) if job.ranks.rank == 0 else range(0)
        self.group = group
        self.last = 0.0
        self.under_way: deque[tuple[Any, Tensor]] = deque()

    def beat(self) -> None:
        if self.builders and time.monotonic() - self.last > BEAT:
            self.last = time.monotonic()
            self._send(_ALIVE)

    def end(self) -> None:
        self._send(_OVER)
        while self.under_way:
            self._wait_for_oldest()

    def fail(self) -> None:
        """Tell who still listens."""
        with suppress(rk.LostRankError):
            self._send(_FAILED)

    def follow(self) -> None:
        """Return when the run is over. Raises LostRankError where it failed, or the trainer is not heard."""
        sign = torch.tensor([_ALIVE])
        while sign.item() == _ALIVE:
            heard(lambda: dist.recv(sign, src=0, group=self.group))
        if sign.item() == _FAILED:
            raise rk.LostRankError(
                f"rank {dist.get_rank()}: rank 0 ended the run, and its own error says why"
            )

    def _send(self, sign: int) -> None:
        message = torch.tensor([sign])
        for builder in self.builders:
            work = heard(lambda to=builder: dist.isend(message, to, group=self.group))
            # Not waited for: a builder takes it when it can. One that takes none for long is lost.
            self.under_way.append((work, message))
        while len(self.under_way) > UNHEARD * len(self.builders):
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        work, _ = self.under_way.popleft()
        heard(work.wait)


def _encoder(
    embedder: Embedder, documents: Documents, rows: Tensor, turn: threading.Lock
) -> Callable[[dict[str, Tensor]], Iterator[Tensor]]:
    def encode(snapshot: dict[str, Tensor]) -> Iterator[Tensor]:
        with turn:
            embedder.load_state_dict(snapshot)
            yield from embed_all(embedder, documents, rows)

    return encode


def _serve(encode: Callable[[dict[str, Tensor]], Iterator[Tensor]], group: Any) -> None:
    with suppress(rk.LostRankError):  # whoever is lost is missed by the trainer that leads, or is it
        rk.table.serve_encoder(encode, group, timeout=FOREVER)
