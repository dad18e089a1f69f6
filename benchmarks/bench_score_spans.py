"""score_spans, forward and backward, beside plain torch. Bytes and flops: score_spans/plan.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import realm_kernels as rk
from realm_kernels.score_spans.plan import cost
from realm_kernels.score_spans.reference import count

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


def inputs(shape: str) -> tuple[Head, list[Tensor], Tensor]:
    """The head, both halves, and the upstream gradient."""
    rows, length, width, max_width = SHAPES[shape]
    torch.manual_seed(0)
    head = Head(length, width, max_width)
    halves = [torch.randn(rows, length, width, requires_grad=True) for _ in range(2)]
    return head, halves, torch.randn(rows, count(length, max_width))


@pytest.mark.parametrize("implementation", ["realm_kernels", "torch eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_score_spans(benchmark, measure, quick, shape, implementation):
    if quick and shape != "N=5 T=320 S=256":
        pytest.skip("--quick runs one shape")
    head, halves, d_scores = inputs(shape)
    benchmark.group = f"score_spans {shape}"

    def step():
        for leaf in (*halves, *head.parameters()):
            leaf.grad = None
        scores = (head.fused if implementation == "realm_kernels" else head.plain)(*halves)
        scores.backward(d_scores)
        return scores.detach()

    rows, length, width, max_width = SHAPES[shape]
    moved, flops = cost(rows, length, width, max_width, 4)
    # The backward reads the same and writes a gradient of each half; 15 operations where the forward has 10.
    moved += moved + 2 * 4 * rows * length * width
    scores = measure(implementation, step, bytes_moved=moved, flops=5 * flops // 2)
    if implementation == "realm_kernels":
        expected = head.double().plain(*(half.detach()[:1].double() for half in halves)).detach()
        assert (scores[:1] - expected).abs().max() <= 2.0**-16 * expected.abs().max()
