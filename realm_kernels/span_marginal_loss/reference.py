"""The specification of span_marginal_loss in plain torch, float64: sums over spans, then `marginal`.

Legend: B examples, K documents, C answer spans per document. Both normalizations marginalise over documents
the one number l_z = log p(answer | z, x) = A_z - N_z, with A_z and N_z the log-sum-exp of the span scores t
over correct and over valid spans. They differ in the prior: softmax(s) over documents for "document". For
"global",

    LSE over correct (s_z + t_zc) - LSE over valid (s_z + t_zc) = LSE_z (log prior_z + A_z - N_z)
    with prior = softmax(s_z + N_z),

so one accurate marginal, its gradient and its second derivative serve both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import Backend
from ..marginal_loss.reference import (
    covariance,
    marginal,
    normalised,
    peak,
    reduce,
    relevance,
    upstream,
)
from .problem import Problem


def masked_logsumexp(x: Tensor, mask: Tensor) -> Tensor:
    """Log-sum-exp over the last axis of what the mask selects; -inf where that is nothing."""
    return torch.where(mask, x, -torch.inf).logsumexp(-1)


def span_masks(correct: Tensor, valid: Tensor | None, is_document: Tensor) -> tuple[Tensor, Tensor]:
    """Spans that are correct, and spans that are not, of those that exist: bool [B, K, C] each."""
    valid = is_document[:, :, None] if valid is None else valid & is_document[:, :, None]
    return correct & valid, ~correct & valid


def likelihood(right: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """l = A - N and N, of A over correct and I over incorrect valid spans.

    l is -softplus(I - A): no digit cancels where it is near 0. -inf without a correct span.
    """
    none_right, none_wrong = right == -torch.inf, wrong == -torch.inf
    odds = torch.where(none_right | none_wrong, 0.0, wrong - right)
    gap = F.softplus(odds, threshold=40.0)  # beyond 40 it returns odds: exp(-40) is below float64's half ulp
    gap = torch.where(none_wrong, 0.0, gap)
    return torch.where(none_right, -torch.inf, -gap), torch.where(none_right, wrong, right + gap)


def forward(
    problem: Problem,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, count (1 for an example with a correct span in some document) and what the backward needs.

    kept: float64 [4, B, K]: A, I, and of each document the posterior and r, 0 where nothing is pulled.
    """
    scores, span_scores, correct, valid, doc_mask, log_weight, _ = problem
    u = relevance(scores, doc_mask, log_weight)  # [B, K]
    is_right, is_wrong = span_masks(correct, valid, u != -torch.inf)
    wide = span_scores.double()
    right, wrong = masked_logsumexp(wide, is_right), masked_logsumexp(wide, is_wrong)
    log_likelihood, log_normalizer = likelihood(right, wrong)
    if problem.is_global:
        # Without a valid span a document has no part in the softmax over spans: N = -inf masks it.
        u = torch.where((u == -torch.inf) | (log_normalizer == -torch.inf), -torch.inf, u + log_normalizer)
    found = marginal(normalised(u, *peak(u)), log_likelihood[:, :, None])
    counted = is_right.flatten(1).any(1)
    # A correct span where every valid span scores -inf is impossible, like any answer of likelihood zero.
    loss = torch.where(counted, -found.log_marginal[:, 0], 0.0)
    kept = torch.stack([right, wrong, found.posterior[:, :, 0], found.residual[:, :, 0]])
    count = counted.long()
    dtype = problem.loss_dtype
    return reduce(loss, count, reduction).to(dtype), count if reduction == "none" else count.sum(), kept


class Shares(NamedTuple):
    """Softmaxes over the spans of a document, float64 [B, K, C], 0 where a span does not count."""

    right: Tensor  # over correct spans, dA/dt
    valid: Tensor  # over valid spans, dN/dt
    difference: Tensor  # right - valid, dl/dt, without cancellation; 0 where l is a constant


def shares(span_scores: Tensor, is_right: Tensor, is_wrong: Tensor, right: Tensor, wrong: Tensor) -> Shares:
    none_right, none_wrong = right == -torch.inf, wrong == -torch.inf
    odds = torch.where(none_right | none_wrong, 0.0, wrong - right)
    # exp(A - N) and exp(I - N), neither as a difference from 1.
    p_right = torch.where(none_wrong, 1.0, torch.where(none_right, 0.0, torch.sigmoid(-odds)))[:, :, None]
    p_wrong = torch.where(none_right, 1.0, torch.where(none_wrong, 0.0, torch.sigmoid(odds)))[:, :, None]
    wide = span_scores.double()
    of_right = _share(wide, is_right, right)
    of_wrong = _share(wide, is_wrong, wrong)
    constant = (none_right | none_wrong)[:, :, None]
    difference = torch.where(is_right, of_right * p_wrong, -of_wrong * p_wrong)
    return Shares(
        right=of_right,
        valid=torch.where(is_right, of_right * p_right, of_wrong * p_wrong),
        difference=torch.where(constant, 0.0, difference),
    )


def _share(x: Tensor, mask: Tensor, log_sum: Tensor) -> Tensor:
    counts = mask & (log_sum != -torch.inf)[:, :, None]
    return torch.where(counts, (x - log_sum[:, :, None]).exp(), 0.0)


def backward(
    d_loss: Tensor,
    count: Tensor | None,
    kept: Tensor,
    problem: Problem,
    needs_scores: bool,
    needs_span_scores: bool,
) -> tuple[Tensor, Tensor]:
    """d_scores = -g r in the dtype of the loss, and d_span_scores in its own: -g times

        "document"  posterior (a - n)            "global"  posterior (a - n) + r n

    of a and n, the shares of a span among the correct and among the valid spans of its document. An empty
    tensor for what is not needed. count: the divisor of reduction "mean"; None for the others.
    """
    scores, span_scores, correct, valid, doc_mask, log_weight, _ = problem
    right, wrong, posterior, residual = kept
    g = upstream(d_loss, count, scores.shape[0])[:, None]
    d_scores = scores.new_empty(0, dtype=problem.loss_dtype)
    d_span_scores = span_scores.new_empty(0)
    # Selected, not multiplied: an infinite or NaN g must not turn a zero into NaN.
    d_relevance = torch.where(residual != 0, -g * residual, 0.0)
    if needs_scores:
        d_scores = d_relevance.to(d_scores.dtype)
    if needs_span_scores:
        is_document = relevance(scores, doc_mask, log_weight) != -torch.inf
        share = shares(span_scores, *span_masks(correct, valid, is_document), right, wrong)
        d_likelihood = torch.where(posterior != 0, -g * posterior, 0.0)
        d_wide = _times(d_likelihood, share.difference)
        if problem.is_global:
            d_wide = d_wide + _times(d_relevance, share.valid)
        d_span_scores = d_wide.to(span_scores.dtype)
    return d_scores, d_span_scores


def _times(d: Tensor, share: Tensor) -> Tensor:
    return torch.where(share != 0, d[:, :, None] * share, 0.0)


def double_backward(
    v_scores: Tensor | None,
    v_span_scores: Tensor | None,
    d_loss: Tensor,
    count: Tensor | None,
    kept: Tensor,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of <v_scores, d_scores> + <v_span_scores, d_span_scores> in closed form.

    Along v the numbers of a document change by alpha = <a, v_t> (A), nu = <n, v_t> (N), alpha - nu (l) and
    v_u = v_s, or v_s + nu in "global" (its relevance). With V(q) = diag q - q q^T and the prior
    p = posterior - r, the marginal's second derivative gives h_l = V(posterior) (v_u + alpha - nu) and
    h_u = h_l - V(p) v_u, and a span adds its own: d a_c = a_c (v_c - alpha), d n_c = n_c (v_c - nu).
    Returns d_d_loss and d_scores [B, K] in the dtype of the loss, d_span_scores [B, K, C] in its own.
    """
    scores, span_scores, correct, valid, doc_mask, log_weight, _ = problem
    right, wrong, posterior, residual = kept
    is_global = problem.is_global
    u = relevance(scores, doc_mask, log_weight)
    share = shares(span_scores, *span_masks(correct, valid, u != -torch.inf), right, wrong)
    v_t = torch.zeros_like(share.right)
    if v_span_scores is not None:
        v_t = torch.where(share.valid != 0, v_span_scores.double(), 0.0)
    alpha, nu = ((part * v_t).sum(2) for part in (share.right, share.valid))  # [B, K]
    along_l = (share.difference * v_t).sum(2)
    along_u = torch.zeros_like(alpha) if v_scores is None else v_scores.double()
    if is_global:
        along_u = along_u + nu
    prior = posterior - residual  # 0 in an example that pulls nothing
    h_l = covariance(posterior, along_u + along_l)
    h_u = h_l - covariance(prior, along_u)

    g = upstream(d_loss, count, scores.shape[0])
    d_d_loss = -(residual * along_u + posterior * along_l).sum(1)
    if d_loss.dim() == 0:
        d_d_loss = upstream(d_d_loss.sum(), count, 1)[0]
    of_right = (posterior[:, :, None] * share.right) * (v_t - alpha[:, :, None])
    of_valid = ((prior if is_global else posterior)[:, :, None] * share.valid) * (v_t - nu[:, :, None])
    d_span_scores = h_l[:, :, None] * share.difference + of_right - of_valid
    if is_global:
        d_span_scores = d_span_scores + h_u[:, :, None] * share.valid
    dtype = problem.loss_dtype
    return (
        d_d_loss.to(dtype),
        (-g[:, None] * h_u).to(dtype),
        (-g[:, None, None] * d_span_scores).to(span_scores.dtype),
    )


BACKEND = Backend(name="reference", refuses=lambda *arguments: None, forward=forward, backward=backward)
