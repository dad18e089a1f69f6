"""Every error a user of marginal_loss and posterior can see."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import FLOAT_DTYPES, check_choice, check_tensor, describe
from .reference import MODES

OP = "marginal_loss"
REDUCTIONS = ("none", "sum", "mean")
DTYPES = (*FLOAT_DTYPES, torch.float64)


def check(
    op: str,
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
    least_documents: int = 1,
) -> None:
    """Raise TypeError or ValueError for arguments the op does not take."""
    check_documents(op, scores, doc_mask, log_weight, least_documents)
    batch = scores.shape[0]
    per_token = not isinstance(log_likelihood, Tensor) or log_likelihood.dim() != 2
    sizes = (*scores.shape, None) if per_token else scores.shape
    legend = "[B, K, M]" if per_token else "[B, K]"
    check_tensor(op, "log_likelihood", log_likelihood, legend, sizes, DTYPES, scores.device)
    if token_mask is not None:
        if log_likelihood.dim() == 2:
            got = describe(log_likelihood)
            raise ValueError(
                f"{op}: token_mask must come with a log_likelihood [B, K, M], got one with {got}"
            )
        tokens = log_likelihood.shape[2]
        check_tensor(op, "token_mask", token_mask, "[B, M]", (batch, tokens), (torch.bool,), scores.device)
    check_choice(op, "mode", mode, MODES)


def check_documents(
    op: str, scores: Tensor, doc_mask: Tensor | None, log_weight: Tensor | None, least: int = 1
) -> None:
    """The arguments that make the prior: the same in every marginal loss."""
    check_tensor(op, "scores", scores, "[B, K]", (None, None), DTYPES)
    if scores.shape[1] < least:
        raise ValueError(f"{op}: scores must be [B, K] with K >= {least}, got {describe(scores)}")
    if doc_mask is not None:
        check_tensor(op, "doc_mask", doc_mask, "[B, K]", scores.shape, (torch.bool,), scores.device)
    if log_weight is not None:
        check_tensor(op, "log_weight", log_weight, "[B, K]", scores.shape, DTYPES, scores.device)


def check_null_index(op: str, documents: int, null_index: int | None) -> None:
    if null_index is None:
        return
    if isinstance(null_index, bool) or not isinstance(null_index, int):
        raise TypeError(f"{op}: null_index must be an int or None, got {describe(null_index)}")
    if not 0 <= null_index < documents:
        raise ValueError(f"{op}: null_index must be in [0, K={documents}), got {null_index}")
