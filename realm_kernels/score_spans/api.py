"""rk.score_spans: the scores of an extractive reader's answer spans."""

from __future__ import annotations

from torch import Tensor

from ..backends import explained_by
from . import plan
from .checks import check
from .op import call

__all__ = ["score_spans"]


@explained_by(plan.explain)
def score_spans(
    start: Tensor,
    end: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    max_width: int,
    eps: float = 1e-3,
) -> Tensor:
    """The score of every span of up to max_width wordpieces, without their representations in memory.

    The span head that ORQA and REALM released: a span from i to j has the representation

        x = LayerNorm(ReLU(start_i + end_j)),    score = <weight, x> + bias

    start, end: [..., T, S], what a wordpiece brings as the first and as the last of a span; T wordpieces, S
        the width of a representation. float32, bfloat16, float16 or float64, both alike.
    weight, bias: [S] and [] or [1], the dense layer from a representation to its score; bias None is 0.
    norm_weight, norm_bias: [S] each, eps: of the LayerNorm.
    max_width: the longest span, in [1, T].

    Returns [..., C], float32, or float64 where start is: the spans of one wordpiece by their start, then
    those of two, ..., C = sum over w in 1 .. max_width of T - w + 1. Neither the forward nor the backward
    holds [..., C, S]; between them 12 bytes a span are kept. Once differentiable, with respect to all six
    tensors.

    Raises TypeError or ValueError naming the argument for a wrong type, shape, dtype, device or value.

    >>> import torch, realm_kernels as rk
    >>> start, end = torch.randn(2, 5, 30, 16), torch.randn(2, 5, 30, 16)
    >>> weight, one, zero = torch.randn(16), torch.ones(16), torch.zeros(16)
    >>> scores = rk.score_spans(start, end, weight, norm_weight=one, norm_bias=zero, max_width=3)
    >>> scores.shape
    torch.Size([2, 5, 87])
    """
    check(start, end, weight, bias, norm_weight, norm_bias, max_width, eps)
    return call(start, end, weight, bias, norm_weight, norm_bias, max_width, eps)
