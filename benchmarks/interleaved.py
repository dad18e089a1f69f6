"""The small ops beside plain torch and torch.compile, call by call in turn: the ratios of their README.md.

`make bench` has each implementation's time by itself and its share of the limit. On a machine that others use
too such times do not compare; the median of the ratios of neighbouring calls does.

    python -m benchmarks.interleaved [threads] [seconds a shape] [--compile] [--op score_spans]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import realm_kernels as rk

from . import bench_score_spans as score
from . import marginal_loss_peers as peers
from .memory import peak_of

MARGINAL = [*itertools.product((4, 16, 64, 512), (8, 50, 1000))]  # B, K
# The reader's spans of its top five blocks, and the retriever's loss over its beam.
SPANS = [(8, 5, 2880), (1, 5, 2880), (8, 5000, 1), (1, 5000, 1), (64, 100, 1), (16, 8, 1)]  # B, K, C


def ratios(steps: dict[str, Callable[[], Any]], leaves: Sequence[torch.Tensor], seconds: float) -> str:
    """steps: "ours", and the peers whose times are divided by it. Of one thread the processor's time counts,
    which what else runs on the machine leaves alone; of more, the clock's."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 12:
        for name, step in steps.items():
            for leaf in leaves:
                leaf.grad = None
            start = clock()
            step()
            times[name].append(clock() - start)
    # The first calls warm up.
    ours = times.pop("ours")[2:]
    told = f"ours {1e6 * statistics.median(ours):.0f} us"
    for name, spent in times.items():
        low, middle, high = statistics.quantiles(
            [theirs / mine for mine, theirs in zip(ours, spent[2:], strict=True)], n=4
        )
        told += f" | x {name} {middle:.2f} ({low:.2f} to {high:.2f})"
    return told


def step_of(loss_of: Callable[..., torch.Tensor], *arguments: Any, **options: Any) -> Callable[[], None]:
    return lambda: loss_of(*arguments, **options).backward()


def peers_of(loss_of: Callable[..., torch.Tensor], compiled: bool) -> dict[str, Callable[..., torch.Tensor]]:
    both = {"torch eager": loss_of}
    return both | {"torch.compile": torch.compile(loss_of, dynamic=False)} if compiled else both


def marginal_loss(seconds: float, compiled: bool) -> None:
    for batch, documents in MARGINAL:
        for tokens, mode in ((0, "sequence"), (1, "sequence"), (1, "token"), (20, "sequence"), (20, "token")):
            s = torch.randn(batch, documents).requires_grad_()
            shape = (batch, documents, tokens) if tokens else (batch, documents)
            x = (-10 * torch.rand(shape)).requires_grad_()
            peer = partial(peers.marginal_loss, mode=mode) if tokens else peers.marginal_loss_of_answers
            others = {who: step_of(f, s, x) for who, f in peers_of(peer, compiled).items()}
            steps = {"ours": step_of(rk.marginal_loss, s, x, mode=mode)} | others
            name = f"B={batch} K={documents} " + (f"M={tokens} {mode}" if tokens else "[B, K]")
            print(f"marginal_loss {name}: {ratios(steps, (s, x), seconds)}", flush=True)


def span_marginal_loss(seconds: float, compiled: bool) -> None:
    for normalization in ("document", "global"):
        for batch, documents, spans in SPANS:
            s = torch.randn(batch, documents).requires_grad_()
            x = torch.randn(batch, documents, spans).requires_grad_()
            right = torch.rand(batch, documents, spans) < 0.01
            right[:, 0, 0] = True
            peer = partial(peers.span_marginal_loss, normalization=normalization)
            steps = {"ours": step_of(rk.span_marginal_loss, s, x, right, normalization=normalization)}
            steps |= {who: step_of(f, s, x, right) for who, f in peers_of(peer, compiled).items()}
            name = f"B={batch} K={documents} C={spans} {normalization}"
            print(f"span_marginal_loss {name}: {ratios(steps, (s, x), seconds)}", flush=True)


def score_spans(seconds: float, compiled: bool) -> None:
    """Also the peak of memory above what was there before a call."""
    for name in score.SHAPES:
        head, halves, d_scores = score.inputs(name)
        functions = {"ours": head.fused} | peers_of(head.plain, compiled)
        steps = {who: lambda f=f: f(*halves).backward(d_scores) for who, f in functions.items()}  # noqa: B023
        leaves = [*halves, *head.parameters()]
        print(f"score_spans {name}: {ratios(steps, leaves, seconds)}", flush=True)
        for who, step in steps.items():
            for leaf in leaves:
                leaf.grad = None
            print(f"  {who}: peak memory {peak_of(step)[1] / 2**20:.0f} MiB", flush=True)


OPS = {"marginal_loss": marginal_loss, "span_marginal_loss": span_marginal_loss, "score_spans": score_spans}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("threads", type=int, nargs="?", default=1)
    parser.add_argument("seconds", type=float, nargs="?", default=0.5, help="of each shape")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too: the first time half an hour"
    )
    parser.add_argument("--op", action="append", choices=OPS, help="only this; may be given again")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # Each shape its own code, as a trainer of that shape has it.
    torch._dynamo.config.recompile_limit = 1000
    for op in arguments.op or OPS:
        OPS[op](arguments.seconds, arguments.compile)


if __name__ == "__main__":
    main()
