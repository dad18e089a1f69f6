"""score_spans on a GPU, forward and backward, beside plain torch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from realm_kernels.score_spans.plan import cost
from realm_kernels.score_spans.reference import count

from .. import roofline
from ..bench_score_spans import SHAPES, Head
from . import peers, served
from .rows import OURS, Call, Row

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of the largest score, from float64: sums of a few hundred terms. Peers round representations too.
TOLERANCE, PEER_TOLERANCE = 2.0**-16, 2.0**-5


def score_rows(shape: str, dtype_name: str) -> list[Row]:
    length, width, max_width = SHAPES[shape][1:]
    rows, dtype = SHAPES[shape][0], DTYPES[dtype_name]

    def prepare(method: str, compiles: bool, tolerance: float) -> Call:
        generator = torch.Generator(served.GPU).manual_seed(0)
        torch.manual_seed(0)
        head = Head(length, width, max_width).to(served.GPU, dtype)
        # The halves of a dense layer's output.
        both = torch.randn(rows, length, 2 * width, generator=generator, device=served.GPU).to(dtype)
        d_scores = torch.randn(rows, count(length, max_width), generator=generator, device=served.GPU)
        score: Callable[..., Tensor] = getattr(head, method)
        score = peers.compiled(score) if compiles else score
        leaves = [both.requires_grad_(), *head.parameters()]

        def step() -> object:
            scores = score(*both.chunk(2, 2))
            return scores.detach(), torch.autograd.grad(scores, leaves, d_scores.to(scores.dtype))

        def check(results: Any) -> None:
            with torch.no_grad():
                start, end = both[:1].double().chunk(2, 2)
                expected = Head(length, width, max_width).to(served.GPU, torch.float64)
                expected.load_state_dict({name: x for name, x in head.state_dict().items()})
                right = expected.plain(start, end)
            error, largest = (results[0][:1] - right).abs().max(), right.abs().max()
            if not error <= tolerance * largest:
                raise AssertionError(f"scores differ by {error:.3g}, the largest is {largest:.3g}")

        return Call(step, limit, check, is_replayed=method == "fused")

    def limit() -> float:
        moved, flops = cost(rows, length, width, max_width, dtype.itemsize)
        # The backward reads the same and writes a gradient of each half.
        moved += moved + 2 * rows * length * width * dtype.itemsize
        return roofline.limit_seconds(moved, 0, torch.float32, served.GPU)

    group = f"score_spans {dtype_name} {shape}"
    return [
        Row(group, OURS, lambda: prepare("fused", False, TOLERANCE)),
        Row(group, "torch eager", lambda: prepare("plain", False, PEER_TOLERANCE)),
        Row(group, "torch.compile", lambda: prepare("plain", True, PEER_TOLERANCE)),
    ]


def rows(op: str, quick: bool) -> list[Row]:
    shapes = list(SHAPES)[:1] if quick else list(SHAPES)[::-1]
    dtypes = list(DTYPES)[:1] if quick else list(DTYPES)
    return [row for shape in shapes for name in dtypes for row in score_rows(shape, name)]


def absent(op: str) -> list[str]:
    return []
