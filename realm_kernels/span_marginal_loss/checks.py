"""Every error a user of span_marginal_loss can see."""

from __future__ import annotations

import torch
from torch import Tensor

from ..marginal_loss.checks import DTYPES, REDUCTIONS, check_documents
from ..validation import check_choice, check_tensor, describe

OP = "span_marginal_loss"
NORMALIZATIONS = ("document", "global")


def check(
    scores: Tensor,
    span_scores: Tensor,
    correct: Tensor,
    valid: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    normalization: str,
    reduction: str,
) -> None:
    """Raise TypeError or ValueError for arguments the op does not take."""
    check_documents(OP, scores, doc_mask, log_weight)
    legend = "[B, K, C]"
    check_tensor(OP, "span_scores", span_scores, legend, (*scores.shape, None), DTYPES, scores.device)
    if span_scores.shape[2] < 1:
        raise ValueError(f"{OP}: span_scores must be [B, K, C] with C >= 1, got {describe(span_scores)}")
    sizes = tuple(span_scores.shape)
    check_tensor(OP, "correct", correct, legend, sizes, (torch.bool,), scores.device)
    if valid is not None:
        check_tensor(OP, "valid", valid, legend, sizes, (torch.bool,), scores.device)
    check_choice(OP, "normalization", normalization, NORMALIZATIONS)
    check_choice(OP, "reduction", reduction, REDUCTIONS)
