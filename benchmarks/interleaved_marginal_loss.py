"""marginal_loss and span_marginal_loss beside plain torch, call by call in turn, on the CPU.

On a machine that others use too, times of two runs do not compare; the median of the ratios of neighbouring
calls does. python -m benchmarks.interleaved_marginal_loss [threads] [seconds a shape]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

import realm_kernels as rk

from . import bench_marginal_loss, bench_span_marginal_loss
from . import marginal_loss_peers as peers


def ratio(
    ours: Callable[[], torch.Tensor], theirs: Callable[[], torch.Tensor], leaves, seconds: float
) -> str:
    ratios, times = [], ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(ratios) < 12:
        for loss_of, spent in zip((ours, theirs), times, strict=True):
            for leaf in leaves:
                leaf.grad = None
            start = time.perf_counter()
            loss_of().backward()
            spent.append(time.perf_counter() - start)
        ratios.append(times[1][-1] / times[0][-1])
    # The first calls warm up.
    low, middle, high = statistics.quantiles(ratios[2:], n=4)
    us = [1e6 * statistics.median(spent[2:]) for spent in times]
    return f"x {middle:.2f} ({low:.2f} to {high:.2f})  ours {us[0]:.0f} us  torch eager {us[1]:.0f} us"


def main(threads: int = 1, seconds: float = 1.0) -> None:
    torch.set_num_threads(threads)
    for mode in ("sequence", "token"):
        for name, (batch, documents, tokens) in bench_marginal_loss.SHAPES.items():
            s = torch.randn(batch, documents).requires_grad_()
            x = (-10 * torch.rand(batch, documents, tokens)).requires_grad_()
            ours, theirs = (
                lambda f=f, s=s, x=x, mode=mode: f(s, x, mode=mode)
                for f in (rk.marginal_loss, peers.marginal_loss)
            )
            print(f"marginal_loss {mode:<9}{name:<18}{ratio(ours, theirs, (s, x), seconds)}", flush=True)
    for normalization in ("document", "global"):
        for name, (batch, documents, spans) in bench_span_marginal_loss.SHAPES.items():
            s = torch.randn(batch, documents).requires_grad_()
            x = torch.randn(batch, documents, spans).requires_grad_()
            right = torch.rand(batch, documents, spans) < 0.01
            right[:, 0, 0] = True
            ours, theirs = (
                lambda f=f, s=s, x=x, right=right, n=normalization: f(s, x, right, normalization=n)
                for f in (rk.span_marginal_loss, peers.span_marginal_loss)
            )
            print(f"span {normalization:<18}{name:<18}{ratio(ours, theirs, (s, x), seconds)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1, float(sys.argv[2]) if len(sys.argv) > 2 else 1.0)
