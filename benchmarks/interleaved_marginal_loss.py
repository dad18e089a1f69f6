"""marginal_loss and span_marginal_loss beside plain torch and torch.compile, call by call in turn.

On a machine that others use too, times of two runs do not compare; the median of the ratios of neighbouring
calls does. python -m benchmarks.interleaved_marginal_loss [threads] [seconds a shape] [--compile]
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import realm_kernels as rk

from . import marginal_loss_peers as peers

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


def main(threads: int = 1, seconds: float = 0.5, compiled: bool = False) -> None:
    torch.set_num_threads(threads)
    torch._dynamo.config.cache_size_limit = 1000  # each shape its own code, as a trainer of that shape has it

    def beside(peer: Callable[..., torch.Tensor], *arguments: Any) -> dict[str, Callable[[], None]]:
        steps = {"torch eager": step_of(peer, *arguments)}
        if compiled:
            steps["torch.compile"] = step_of(torch.compile(peer, dynamic=False), *arguments)
        return steps

    for batch, documents in MARGINAL:
        for tokens, mode in ((0, "sequence"), (1, "sequence"), (1, "token"), (20, "sequence"), (20, "token")):
            s = torch.randn(batch, documents).requires_grad_()
            shape = (batch, documents, tokens) if tokens else (batch, documents)
            x = (-10 * torch.rand(shape)).requires_grad_()
            peer = partial(peers.marginal_loss, mode=mode) if tokens else peers.marginal_loss_of_answers
            steps = {"ours": step_of(rk.marginal_loss, s, x, mode=mode)} | beside(peer, s, x)
            name = f"B={batch} K={documents} " + (f"M={tokens} {mode}" if tokens else "[B, K]")
            print(f"marginal_loss {name}: {ratios(steps, (s, x), seconds)}", flush=True)
    for normalization in ("document", "global"):
        for batch, documents, spans in SPANS:
            s = torch.randn(batch, documents).requires_grad_()
            x = torch.randn(batch, documents, spans).requires_grad_()
            right = torch.rand(batch, documents, spans) < 0.01
            right[:, 0, 0] = True
            peer = partial(peers.span_marginal_loss, normalization=normalization)
            steps = {"ours": step_of(rk.span_marginal_loss, s, x, right, normalization=normalization)}
            name = f"B={batch} K={documents} C={spans} {normalization}"
            told = ratios(steps | beside(peer, s, x, right), (s, x), seconds)
            print(f"span_marginal_loss {name}: {told}", flush=True)


if __name__ == "__main__":
    numbers = [argument for argument in sys.argv[1:] if argument != "--compile"]
    main(
        int(numbers[0]) if numbers else 1,
        float(numbers[1]) if len(numbers) > 1 else 0.5,
        "--compile" in sys.argv,
    )
