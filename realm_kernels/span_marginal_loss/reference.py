"""The specification of span_marginal_loss in plain torch, over the torch op of marginal_loss, in float64.

Legend: B examples, K documents, C answer spans per document. Both normalizations marginalise over documents
the one number l_z = log p(answer | z, x) = A_z - N_z, with A_z and N_z the log-sum-exp of the span scores t
over correct and over valid spans. They differ in the prior: softmax(s) over documents for "document". For
"global",

    LSE over correct (s_z + t_zc) - LSE over valid (s_z + t_zc) = LSE_z (log prior_z + A_z - N_z)
    with prior = softmax(s_z + N_z),

so one accurate marginal, its gradient and its second derivative serve both, and what is left are sums over
spans that autograd differentiates without a loss of digits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import Backend
from ..marginal_loss import op as marginal_loss
from ..marginal_loss.reference import relevance, result_dtype


class Evidence(NamedTuple):
    """What the spans say of each document, [B, K]: float64, -inf where there is nothing to sum; and bool."""

    log_likelihood: Tensor  # A - N; 0 where every valid span is correct
    log_normalizer: Tensor  # N
    has_correct: Tensor  # whether a valid span is correct


def masked_logsumexp(x: Tensor, mask: Tensor) -> Tensor:
    """Log-sum-exp over the last axis of what the mask selects; -inf and gradient 0 where that is nothing."""
    x = torch.where(mask, x, -torch.inf)
    found = x.detach().amax(-1) != -torch.inf
    # torch.logsumexp has a NaN gradient at rows of -inf alone; such rows never reach it.
    return torch.where(found, torch.where(found[..., None], x, 0.0).logsumexp(-1), -torch.inf)


def span_evidence(
    span_scores: Tensor, correct: Tensor, valid: Tensor | None, is_document: Tensor
) -> Evidence:
    """l = A - N as -softplus(I - A), I over the incorrect valid spans: no digit cancels where l is near 0.

    Of a row that is no document, is_document [B, K], no span is looked at.
    """
    valid = is_document[:, :, None] if valid is None else valid & is_document[:, :, None]
    valid, span_scores = valid.expand(span_scores.shape), span_scores.double()
    right = masked_logsumexp(span_scores, valid & correct)  # [B, K], A
    wrong = masked_logsumexp(span_scores, valid & ~correct)  # [B, K], I
    none_right, none_wrong = right == -torch.inf, wrong == -torch.inf
    odds = torch.where(none_right | none_wrong, 0.0, wrong - right)
    gap = F.softplus(odds, threshold=40.0)  # beyond 40 it returns odds: exp(-40) is below float64's half ulp
    gap = torch.where(none_wrong, 0.0, gap)
    return Evidence(
        log_likelihood=torch.where(none_right, -torch.inf, -gap),
        log_normalizer=torch.where(none_right, wrong, right + gap),
        has_correct=(valid & correct).any(2),
    )


def forward(
    scores: Tensor,
    span_scores: Tensor,
    correct: Tensor,
    valid: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    normalization: str,
    evidence_of: Callable[[Tensor, Tensor, Tensor | None, Tensor], Evidence],
) -> tuple[Tensor, Tensor]:
    """loss [B] and count int64 [B]: 1 for examples with a correct span in some document, 0 for the others.

    evidence_of: span_evidence, or what computes the same of the same arguments.
    """
    dtype = result_dtype(scores, span_scores, log_weight)
    is_document = relevance(scores.detach(), doc_mask, log_weight) != -torch.inf  # [B, K]
    evidence = evidence_of(span_scores, correct, valid, is_document)
    is_possible = is_document
    if normalization == "global":
        # Without a valid span a document has no part in the softmax over spans: N = -inf masks it.
        scores = torch.where(is_document, scores.double(), 0.0) + evidence.log_normalizer
        is_possible = is_document & (evidence.log_normalizer.detach() != -torch.inf)
    log_likelihood = evidence.log_likelihood[:, :, None]
    loss = marginal_loss.call(scores, log_likelihood, None, is_document, log_weight, "sequence", "none")
    counted = evidence.has_correct.any(1)
    # A correct span where every valid span scores -inf is impossible, like any answer of likelihood zero.
    loss = torch.where(counted, torch.where(is_possible.any(1), loss, torch.inf), 0.0)
    return loss.to(dtype), counted.long()


BACKEND = Backend(name="reference", refuses=lambda *arguments: None, forward=span_evidence)
