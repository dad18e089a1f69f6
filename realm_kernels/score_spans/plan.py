"""The bytes and flops of score_spans: what explain() tells and what the benchmarks divide by."""

from __future__ import annotations

import math

from torch import Tensor

from ..backends import Explanation
from .checks import OP, check
from .op import backend_for
from .reference import count

# A number of a representation: an addition and a maximum twice, a mean, a variance and a product.
FLOPS_PER_NUMBER = 10


def cost(rows: int, length: int, width: int, max_width: int, item: int) -> tuple[int, int]:
    """Least (bytes, flops) of the forward: both halves read once, three float32 numbers a span written."""
    spans = count(length, max_width)
    return rows * (2 * length * width * item + 12 * spans), rows * spans * width * FLOPS_PER_NUMBER


def explain(
    start: Tensor,
    end: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    max_width: int,
    eps: float = 1e-3,
) -> Explanation:
    check(start, end, weight, bias, norm_weight, norm_bias, max_width, eps)
    *leading, length, width = start.shape
    rows = math.prod(leading)
    shape = (rows, length, width)
    bytes_moved, flops = cost(rows, length, width, max_width, start.element_size())
    return Explanation(
        op=OP,
        backend=backend_for(start.reshape(shape), end.reshape(shape), weight, max_width, eps).name,
        plan=f"{rows} rows of T={length}, C={count(length, max_width)} spans of S={width}: representations "
        "made anew in each pass, 12 bytes a span kept",
        bytes=bytes_moved,
        flops=flops,
        limit="the larger of bytes / bandwidth and flops / float32 rate: spans read rows that lie in cache",
    )
