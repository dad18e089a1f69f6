"""The bytes and flops of span_marginal_loss: what explain() tells and what the benchmarks divide by."""

from __future__ import annotations

from torch import Tensor

from ..backends import Explanation
from ..marginal_loss.plan import FLOPS_PER_EXP
from .checks import OP, check
from .op import backend_for
from .problem import Problem


def cost(batch: int, documents: int, spans: int, span_bytes: int, score_bytes: int) -> tuple[int, int]:
    """Least (bytes, flops) of the forward: scores and both span masks read once, an exponential a span."""
    bytes_moved = batch * (documents * (spans * (span_bytes + 2) + score_bytes) + 4 + 8)
    return bytes_moved, batch * documents * (spans + 2) * FLOPS_PER_EXP


def explain(
    scores: Tensor,
    span_scores: Tensor,
    correct: Tensor,
    *,
    valid: Tensor | None = None,
    doc_mask: Tensor | None = None,
    log_weight: Tensor | None = None,
    normalization: str = "document",
    reduction: str = "mean",
) -> Explanation:
    check(scores, span_scores, correct, valid, doc_mask, log_weight, normalization, reduction)
    problem = Problem(scores, span_scores, correct, valid, doc_mask, log_weight, normalization)
    batch, documents, spans = span_scores.shape
    bytes_moved, flops = cost(batch, documents, spans, span_scores.element_size(), scores.element_size())
    return Explanation(
        op=OP,
        backend=backend_for(problem).name,
        plan=f"B={batch} K={documents} C={spans} normalization {normalization}: sums over spans, then "
        "the marginal over documents, float64 inside",
        bytes=bytes_moved,
        flops=flops,
        limit="the larger of bytes / bandwidth and flops / float64 rate",
    )
