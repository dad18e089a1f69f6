"""What a refresh in the background costs a trainer's step, and what it reaches of the encoder's own speed.

    OMP_NUM_THREADS=1 python -m benchmarks.refresh --rows 100000 --steps 300

One trainer of one thread takes steps, a forward and a backward pass of a small transformer; the encoder is
another one. The rows of the table, in this order:
  alone            the trainer, and nothing else
  busy             the trainer beside a process that encodes and gives nothing to anybody: what two programs
                   on this machine cost each other, whoever refreshes
  thread, process  the trainer while a TableRefresher refreshes over and over in that worker
Steps are told by their median and their 95th percentile; "x busy" is the median over that of "busy", the
share that refreshing itself adds. A refresh's rows per second (RefreshMetrics) stand beside those of the
encoder in a process of its own: in the row "busy" while the trainer steps, below the table with nothing else.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import realm_kernels as rk

DIM, WIDTH, WORDS = 128, 128, 16
BATCH = 256  # documents that are encoded together


class Embedder(nn.Module):
    """Documents [n, M] of word numbers -> [n, D]: a transformer layer, its first position projected."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5000, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.project = nn.Linear(WIDTH, DIM)

    def forward(self, documents: Tensor) -> Tensor:
        return self.project(self.layer(self.words(documents))[:, 0])


def corpus(rows: int) -> Tensor:
    return torch.randint(0, 5000, (rows, WORDS), generator=torch.Generator().manual_seed(0))


def encode(rows: int, snapshot: dict[str, Any]) -> Iterator[Tensor]:
    embedder = Embedder().eval()
    embedder.load_state_dict(snapshot)
    for documents in corpus(rows).split(BATCH):
        yield embedder(documents)


def encode_for_ever(rows: int, rates: Any) -> None:
    """What a worker does, without a refresher; the rate of every pass, in rows per second."""
    torch.set_num_threads(1)
    snapshot = Embedder().state_dict()
    with torch.no_grad():
        while True:
            start = time.perf_counter()
            for _ in encode(rows, snapshot):
                pass
            rates.send(rows / (time.perf_counter() - start))


class Trainer:
    def __init__(self) -> None:
        self.embedder = Embedder()
        self.optimizer = torch.optim.SGD(self.embedder.parameters(), lr=1e-3)
        self.documents = corpus(16)

    def step(self) -> None:
        self.embedder(self.documents).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    trainer = Trainer()
    rows, steps = arguments.rows, arguments.steps
    median = times(trainer, steps)[0]

    ours, theirs = context.Pipe()
    other = context.Process(target=encode_for_ever, args=(rows, theirs), daemon=True)
    other.start()
    ours.recv()
    alone_rate = ours.recv()  # nothing beside it
    lines = []
    busy = times(trainer, max(steps, int(1.2 * rows / alone_rate / median)))
    while ours.poll(0):  # those that began before the steps
        ours.recv()
    rates = []
    while len(rates) < arguments.refreshes:
        trainer.step()
        if ours.poll(0):
            rates.append(ours.recv())
    other.kill()
    other.join()
    busy_rate = statistics.median(rates[1:] or rates)
    lines.append(("alone", *times(trainer, steps), None))
    lines.append(("busy", *busy, busy_rate))
    for name in arguments.worker:
        lines.append((name, *with_refresh(trainer, name, rows, arguments.refreshes)))

    print(f"{rows:,} rows of {DIM}, {WORDS} words each; medians of at least {steps} steps, milliseconds")
    print(f"{'':10} {'step':>8} {'95 %':>8} {'x alone':>8} {'x busy':>8} {'rows/s':>10} {'of busy':>8}")
    alone = lines[0][1]
    for name, step, worst, rate in lines:
        speed = f"{rate:>10,.0f} {rate / busy_rate:>8.0%}" if rate else ""
        print(
            f"{name:10} {step * 1e3:>8.2f} {worst * 1e3:>8.2f} {step / alone:>8.2f} {step / busy[0]:>8.2f} "
            + speed
        )
    print(f"the encoder with nothing beside it: {alone_rate:,.0f} rows/s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--refreshes", type=int, default=2, help="of each worker, one after another")
    parser.add_argument("--worker", nargs="+", choices=["thread", "process"], default=["thread", "process"])
    return parser.parse_args()


def times(trainer: Trainer, steps: int) -> tuple[float, float]:
    """(median, 95th percentile) of a step in seconds."""
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        trainer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1]


def with_refresh(trainer: Trainer, worker: str, rows: int, refreshes: int) -> tuple[float, float, float]:
    table = rk.ShardedTable.from_tensors([torch.zeros(rows, DIM)])
    job = partial(encode, rows)
    encoder = rk.table.ProcessEncoder(job) if worker == "process" else job
    medians, worsts, rates, step = [], [], [], 0
    with rk.TableRefresher(table, encoder, mode="async", every=1) as refresher:
        refresher.build(0, trainer.embedder.state_dict)  # the process has started
        done = refresher.metrics.refreshes
        for _ in range(refreshes):
            seconds = []
            while refresher.metrics.refreshes == done:
                start = time.perf_counter()
                step += 1
                refresher.step(step, trainer.embedder.state_dict)
                trainer.step()
                seconds.append(time.perf_counter() - start)
            done = refresher.metrics.refreshes
            medians.append(statistics.median(seconds))
            worsts.append(statistics.quantiles(seconds, n=20)[-1])
            rates.append(refresher.metrics.rows_per_second)
    return statistics.median(medians), statistics.median(worsts), statistics.median(rates)


if __name__ == "__main__":
    main()
