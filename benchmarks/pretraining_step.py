"""A pre-training step of realm_model beside the same step in plain torch: time, and peak memory.

Two copies of one model take the same batches by turns, one with this library, one with chunks of the table
through matmul and topk, all logits, log_softmax and logsumexp. A step is all of it: queries embedded,
candidates found in a stale table, embedded afresh and read, loss, backward, clip and AdamW. The losses of
every step are compared. Of what differs, the search and the loss, the time is taken alone too.
"""

from __future__ import annotations

import copy
import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor

import realm_kernels as rk
from realm_model.config import ModelConfig, RealmConfig, StageConfig
from realm_model.inputs import CLS, MASK, SEP, SPECIAL, Documents
from realm_model.model import Realm
from realm_model.objectives import fresh_scores, realm_loss
from realm_model.optimizer import StageOptimizer
from realm_model.ragged import Ragged

from . import marginal_loss_peers as peers
from .memory import peak_of
from .peers import chunked_torch_topk

TITLE = 4  # wordpieces of a document's title
CLOSE = 1e-4  # relative, of the losses of both copies at one step


class Size(NamedTuple):
    rows: int
    vocabulary: int
    hidden: int
    layers: int
    batch: int
    candidates: int
    targets: int
    query: int
    document: int


class Batch(NamedTuple):
    ids: Tensor  # [B, L]
    positions: Tensor  # [B, M]
    targets: Tensor  # [B, M]
    exclude: Tensor  # [B, 1]


class Setting:
    """What both copies share: documents of random wordpieces, and a table of as many random embeddings."""

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        self.size = size
        config = ModelConfig(
            vocab_size=size.vocabulary,
            hidden=size.hidden,
            layers=size.layers,
            heads=max(1, size.hidden // 64),
            projection=128,
            query_length=size.query,
            document_length=size.document,
            initializer_range=0.02,
        )
        body = size.document - TITLE - 3
        self.documents = Documents(self._texts(TITLE), self._texts(body), size.document)
        self.rows = torch.nn.functional.layer_norm(torch.randn(size.rows, 128), (128,))
        self.table = rk.ShardedTable.from_tensors([self.rows])
        self.model = Realm(config, size.vocabulary)

    def _texts(self, length: int) -> Ragged:
        count = self.size.rows * length
        pieces = torch.randint(len(SPECIAL), self.size.vocabulary, (count,), dtype=torch.int32)
        return Ragged(pieces.numpy(), np.arange(1, self.size.rows + 1) * length)

    def batch(self) -> Batch:
        size = self.size
        ids = torch.randint(len(SPECIAL), size.vocabulary, (size.batch, size.query))
        ids[:, 0], ids[:, -1] = CLS, SEP
        positions = torch.rand(size.batch, size.query - 2).argsort(1)[:, : size.targets] + 1
        targets = ids.gather(1, positions)
        return Batch(
            ids.scatter(1, positions, MASK), positions, targets, torch.randint(size.rows, (size.batch, 1))
        )


def our_search(setting: Setting, queries: Tensor, exclude: Tensor) -> Tensor:
    return rk.mips_topk(queries, setting.table, setting.size.candidates - 1, exclude=exclude).indices


def plain_search(setting: Setting, queries: Tensor, exclude: Tensor) -> Tensor:
    scores, indices = chunked_torch_topk(queries, setting.rows, setting.size.candidates)
    kept = scores.masked_fill(indices == exclude, -torch.inf).topk(setting.size.candidates - 1)
    return indices.gather(1, kept.indices)


def our_loss(scores: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    return rk.linear_marginal_loss(scores, hidden, weight, targets, bias=bias)


def our_step_loss(setting: Setting, model: Realm, batch: Batch) -> Tensor:
    config = RealmConfig(candidates=setting.size.candidates)
    return realm_loss(model, setting.documents, setting.table, batch[:3], batch.exclude, config)[0]


def plain_step_loss(setting: Setting, model: Realm, batch: Batch) -> Tensor:
    """realm_model.objectives.realm_loss without this library."""
    queries = model.retriever.queries(batch.ids)
    found = plain_search(setting, queries.detach(), batch.exclude)
    rows = torch.cat([torch.full_like(found[:, :1], setting.documents.null), found], dim=1)
    scores = fresh_scores(model, setting.documents, queries, rows)
    hidden = model.read(batch.ids, batch.positions, setting.documents.read(rows))
    return peers.eager(scores, hidden, model.reader.weight, model.reader.bias, batch.targets)


class Way(NamedTuple):
    step_loss: Callable[[Setting, Realm, Batch], Tensor]
    search: Callable[[Setting, Tensor, Tensor], Tensor]
    loss: Callable[..., Tensor]


WAYS = {
    "ours": Way(our_step_loss, our_search, our_loss),
    "plain": Way(plain_step_loss, plain_search, peers.eager),
}
PARTS = ("step", "search", "loss")


class Run:
    """A copy of the model, trained one way."""

    def __init__(self, setting: Setting, way: Way) -> None:
        self.setting, self.way, self.model = setting, way, copy.deepcopy(setting.model)
        stage = StageConfig(
            steps=10_000, batch=setting.size.batch, retriever_lr=3e-5, reader_lr=3e-5, warmup=0.0
        )
        self.optimizer, self.done = StageOptimizer(self.model, stage), 0

    def step(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        loss = self.way.step_loss(self.setting, self.model, batch)
        loss.backward()
        self.optimizer.step(self.done)
        self.done += 1
        return loss.item()

    def search(self, batch: Batch, queries: Tensor) -> None:
        self.way.search(self.setting, queries, batch.exclude)

    def loss(self, batch: Batch, tensors: list[Tensor]) -> None:
        """Forward and backward, to the gradients of all that is trained."""
        for tensor in tensors:
            tensor.grad = None
        self.way.loss(*tensors, batch.targets).backward()


class Spent(NamedTuple):
    """Seconds on the wall, and of processor time in all threads: without waiting for the work of others."""

    wall: float
    processor: float

    @staticmethod
    def so_far() -> Spent:
        return Spent(time.perf_counter(), time.process_time())

    def until(self, end: Spent) -> Spent:
        return Spent(end.wall - self.wall, end.processor - self.processor)


def times(setting: Setting, seconds: float) -> None:
    size = setting.size
    runs = {name: Run(setting, way) for name, way in WAYS.items()}
    reader = setting.model.reader
    queries = torch.nn.functional.layer_norm(torch.randn(size.batch, 128), (128,))
    shape = (size.batch, size.candidates, size.targets, size.hidden)
    tensors = [torch.randn(shape[:2]), torch.randn(shape), reader.weight.detach(), reader.bias.detach()]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    taken: dict[tuple[str, str], list[Spent]] = {(name, part): [] for name in runs for part in PARTS}
    turns, apart, end = 0, 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or turns < 3:
        batch, losses = setting.batch(), []
        for name, run in runs.items() if turns % 2 else reversed(runs.items()):
            for part, arguments in (("step", ()), ("search", (queries,)), ("loss", (tensors,))):
                start = Spent.so_far()
                result = getattr(run, part)(batch, *arguments)
                taken[name, part].append(start.until(Spent.so_far()))
                losses += [result] if part == "step" else []
        apart = max(apart, abs(losses[0] / losses[1] - 1))
        turns += 1
    if not apart < CLOSE:
        raise SystemExit(f"losses of one step may differ by {CLOSE:g} of their size, got {apart:.1e}")
    print(f"{turns - 1} turns after one to warm up; losses differ by {apart:.1e} of their size at most")
    print("| | ours, ms | plain torch, ms | x plain torch | processor: ours, ms | plain torch, ms | x |")
    print("| --- " * 7 + "|")
    for part in PARTS:
        cells = []
        for ours, plain in zip(*(zip(*taken[name, part][1:], strict=True) for name in WAYS), strict=True):
            ratio = statistics.median(theirs / mine for mine, theirs in zip(ours, plain, strict=True))
            cells += [f"{1e3 * statistics.median(spent):.1f}" for spent in (ours, plain)] + [f"{ratio:.2f}"]
        print(f"| {part} | {' | '.join(cells)} |", flush=True)


def peak(setting: Setting, name: str) -> int:
    """Bytes of the third step of this process above what was resident before it, gradients included."""
    run = Run(setting, WAYS[name])
    for _ in range(2):  # moments of AdamW, code
        run.step(setting.batch())
    run.optimizer.zero_grad()
    batch = setting.batch()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept of the last step is not this one's
    return peak_of(lambda: run.step(batch))[1]


def main(
    rows: Annotated[int, typer.Option(help="of the table, 128 float32 each")] = 500_000,
    vocabulary: Annotated[int, typer.Option(help="V")] = 30522,
    hidden: Annotated[int, typer.Option(help="H of both networks, a multiple of 64")] = 256,
    layers: Annotated[int, typer.Option(help="of both networks")] = 4,
    batch: Annotated[int, typer.Option(help="B, statements")] = 8,
    candidates: Annotated[int, typer.Option(help="K, the null document among them")] = 8,
    targets: Annotated[int, typer.Option(help="M, masked wordpieces of a statement")] = 10,
    query: Annotated[int, typer.Option(help="wordpieces of a statement")] = 64,
    document: Annotated[int, typer.Option(help="wordpieces of a document")] = 160,
    threads: Annotated[int, typer.Option(help="of torch and of the ops")] = 2,
    seconds: Annotated[float, typer.Option(help="to take times for; 0: none are taken")] = 80.0,
    memory: Annotated[bool, typer.Option(help="take peak memory, each way in a process of its own")] = True,
    memory_of: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time one REALM step with our ops and in plain torch, turn about, and take the peak memory of each.

    Example: python -m benchmarks.pretraining_step --rows 20000 --hidden 64 --layers 1 --seconds 5
    """
    torch.set_num_threads(threads)
    size = Size(rows, vocabulary, hidden, layers, batch, candidates, targets, query, document)
    if memory_of:
        print(peak(Setting(size), memory_of))
        return
    print(", ".join(f"{name} {value}" for name, value in size._asdict().items()) + f", threads {threads}")
    if seconds > 0:
        times(Setting(size), seconds)
    for name in WAYS if memory else ():
        command = [sys.executable, "-m", "benchmarks.pretraining_step", *sys.argv[1:], "--memory-of", name]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        print(f"peak of a step, {name}: {int(told) / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    typer.run(main)
