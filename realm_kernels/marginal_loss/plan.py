"""The bytes and flops of marginal_loss: what explain() tells and what the benchmarks divide by."""

from __future__ import annotations

from torch import Tensor

from ..backends import Explanation
from . import op
from .checks import OP, REDUCTIONS, check, check_choice

# An exponential and what surrounds it, counted as the double-precision operations of its polynomial.
FLOPS_PER_EXP = 30


def cost(
    batch: int, documents: int, tokens: int, mode: str, log_likelihood_bytes: int, score_bytes: int
) -> tuple[int, int]:
    """Least (bytes, flops) of the forward: every input read once, a loss and a count written per example.

    The backward reads the same and writes d_log_likelihood and d_scores.
    """
    bytes_moved = batch * (documents * (tokens * log_likelihood_bytes + score_bytes) + 4 + 8)
    columns = tokens if mode == "token" else 1
    return bytes_moved, batch * documents * (tokens + FLOPS_PER_EXP * (1 + columns))


def explain(
    scores: Tensor,
    log_likelihood: Tensor,
    *,
    token_mask: Tensor | None = None,
    doc_mask: Tensor | None = None,
    log_weight: Tensor | None = None,
    mode: str = "sequence",
    reduction: str = "mean",
) -> Explanation:
    check(OP, scores, log_likelihood, token_mask, doc_mask, log_weight, mode)
    check_choice(OP, "reduction", reduction, REDUCTIONS)
    if log_likelihood.dim() == 2:
        log_likelihood = log_likelihood.unsqueeze(2)
    backend = op.backend_for(scores, log_likelihood, token_mask, doc_mask, log_weight, mode)
    batch, documents, tokens = log_likelihood.shape
    bytes_moved, flops = cost(
        batch, documents, tokens, mode, log_likelihood.element_size(), scores.element_size()
    )
    return Explanation(
        op=OP,
        backend=backend.name,
        plan=f"B={batch} K={documents} M={tokens} {mode} mode, float64 inside",
        bytes=bytes_moved,
        flops=flops,
        limit="one kernel launch; for large B the larger of bytes / bandwidth and flops / float64 rate",
    )
