"""score_spans, forward and backward, beside plain torch and torch.compile: time and peak memory.

python -m benchmarks.bench_score_spans [threads] [seconds a shape]
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import realm_kernels as rk
from realm_kernels.score_spans.reference import count

from .interleaved_marginal_loss import ratios
from .memory import peak_of

# The released reader: joins of 320 wordpieces, spans of at most ten, representations of 256.
SHAPES = {"N=5 T=320 S=256": (5, 320, 256, 10), "N=40 T=320 S=256": (40, 320, 256, 10)}


class Head(nn.Module):
    """What follows the first dense layer: LayerNorm(ReLU(start + end)), dense to 1."""

    def __init__(self, length: int, width: int, max_width: int) -> None:
        super().__init__()
        self.norm, self.dense, self.max_width = nn.LayerNorm(width, eps=1e-3), nn.Linear(width, 1), max_width
        widths = range(1, max_width + 1)
        self.register_buffer("starts", torch.cat([torch.arange(length - w + 1) for w in widths]))
        self.register_buffer("ends", torch.cat([torch.arange(w - 1, length) for w in widths]))

    def plain(self, start: Tensor, end: Tensor) -> Tensor:
        both = start.index_select(1, self.starts) + end.index_select(1, self.ends)  # [N, C, S]
        return self.dense(self.norm(both.relu())).squeeze(-1)

    def fused(self, start: Tensor, end: Tensor) -> Tensor:
        return rk.score_spans(
            start,
            end,
            self.dense.weight[0],
            self.dense.bias,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            max_width=self.max_width,
        )


def main(threads: int = 1, seconds: float = 4.0) -> None:
    torch.set_num_threads(threads)
    for name, (rows, length, width, max_width) in SHAPES.items():
        torch.manual_seed(0)
        head = Head(length, width, max_width)
        start, end = (torch.randn(rows, length, width, requires_grad=True) for _ in range(2))
        d_scores = torch.randn(rows, count(length, max_width))
        leaves = [start, end, *head.parameters()]
        peers = {"torch eager": head.plain, "torch.compile": torch.compile(head.plain)}
        steps = {who: step_of(f, start, end, d_scores) for who, f in {"ours": head.fused, **peers}.items()}
        print(f"score_spans {name} C={count(length, max_width)}", ratios(steps, leaves, seconds), flush=True)
        for who, step in steps.items():
            for leaf in leaves:
                leaf.grad = None
            print(f"  {who}: peak memory {peak_of(step)[1] / 2**20:.0f} MiB", flush=True)


def step_of(
    score: Callable[[Tensor, Tensor], Tensor], start: Tensor, end: Tensor, d_scores: Tensor
) -> Callable[[], None]:
    return lambda: score(start, end).backward(d_scores)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1, float(sys.argv[2]) if len(sys.argv) > 2 else 4.0)
