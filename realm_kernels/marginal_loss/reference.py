"""The specification of marginal_loss in plain torch, in float64: log prior, evidence, one accurate marginal.

Legend: B examples, K documents, M target tokens. `marginal` is the mathematical core that every marginal loss
of this package shares. It sees K on axis 1 and any number of columns behind it: the M tokens in mode "token",
the one column of token sums in mode "sequence", so that one piece of code serves both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend
from .problem import Problem

MODES = ("sequence", "token")


class Marginal(NamedTuple):
    """What `marginal` returns, float64. Where no document has a likelihood above zero: -inf, 0 and 0."""

    log_marginal: Tensor  # [B, M] log p(y|x) = log sum_z p(z|x) p(y|z,x)
    posterior: Tensor  # [B, K, M] p(z|x,y)
    residual: Tensor  # [B, K, M] r(z) = p(z|x,y) - p(z|x), accurate also where the two nearly agree


def relevance(scores: Tensor, doc_mask: Tensor | None, log_weight: Tensor | None) -> Tensor:
    """s_k + log w_k, and -inf for documents that are masked: float64 [B, K]."""
    u = scores.double()
    if log_weight is not None:
        u = u + log_weight.double()
    return u if doc_mask is None else torch.where(doc_mask, u, -torch.inf)


def peak(u: Tensor) -> tuple[Tensor, Tensor]:
    """The largest u over axis 1 and the sum of exp(u - largest), 0 where all are -inf: [B, 1] each."""
    top = u.amax(1, keepdim=True)
    return top, (u - finite(top)).exp().sum(1, keepdim=True)


def finite(top: Tensor) -> Tensor:
    """A maximum that may be subtracted: 0 for -inf, which every entry then is."""
    return torch.where(top == -torch.inf, 0.0, top)


def normalised(u: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """log softmax of u, given its peak; -inf, not NaN, where every entry is -inf."""
    return torch.where(u == -torch.inf, -torch.inf, u - finite(top) - total.log())


def log_prior(scores: Tensor, doc_mask: Tensor | None = None, log_weight: Tensor | None = None) -> Tensor:
    """log p(z|x) = log softmax over unmasked documents of s + log w: float64 [B, K], -inf where masked."""
    u = relevance(scores, doc_mask, log_weight)
    return normalised(u, *peak(u))


def marginal(log_prior: Tensor, log_likelihood: Tensor) -> Marginal:
    """The marginal likelihood of each column and what its gradient is made of.

    log_prior: float64 [B, K], -inf for masked documents.
    log_likelihood: float64 [B, K, M]; what it holds for masked documents is never looked at.

    r(z) = [p(y|z,x) / p(y|x) - 1] p(z|x) (REALM, section 3.3) as a difference p(z|x,y) - p(z|x) loses
    everything where the documents are nearly equal. So likelihoods are taken relative to the document k* of
    the largest posterior, d = l - l_k*, and prior and expm1 meet before they cancel:

        e_k = p_k expm1(d_k),  S = sum_k e_k = p(y|x) / p(y|k*,x) - 1,  L' = log1p(S),
        r_k = p_k expm1(d_k - L').

    Centring at the largest posterior, not at the largest likelihood, keeps S away from -1 unless the best
    document has a small prior; L' is then a plain log-sum-exp, which loses nothing there.
    """
    log_p = log_prior[:, :, None]  # [B, K, 1]
    log_likelihood = torch.where(log_p == -torch.inf, -torch.inf, log_likelihood)  # [B, K, M]
    best = best_document(log_p, log_likelihood)
    return from_sums(log_p, log_likelihood, best, *sums(log_p, log_likelihood, best))


class Best(NamedTuple):
    """The document k* of the largest posterior, [B, 1, M] each. NaN wins, and so reaches the result."""

    joint: Tensor  # log prior + log-likelihood, up to a constant; -inf where no document is possible
    log_likelihood: Tensor  # the centre
    log_prior: Tensor

    @property
    def impossible(self) -> Tensor:
        return self.joint == -torch.inf


def best_document(log_p: Tensor, log_likelihood: Tensor) -> Best:
    """k* of log_p [B, K, 1], up to a constant, and log_likelihood [B, K, M]; -inf in both where masked."""
    joint, k_star = torch.where(log_p == -torch.inf, -torch.inf, log_p + log_likelihood).max(1, keepdim=True)
    impossible = joint == -torch.inf
    centre = torch.where(impossible, 0.0, log_likelihood.gather(1, k_star))
    log_p_star = torch.where(impossible, 0.0, log_p.expand_as(log_likelihood).gather(1, k_star))
    return Best(joint, centre, log_p_star)


def sums(log_p: Tensor, log_likelihood: Tensor, best: Best) -> tuple[Tensor, Tensor]:
    """S = p(y|x) / p(y|k*,x) - 1, and p(y|x) / p(y,k*|x): [B, 1, M] each, sums over documents."""
    d = log_likelihood - best.log_likelihood
    S = prior_times_expm1(log_p, log_p.exp(), d).sum(1, keepdim=True)
    return S, (log_p + d - best.log_prior).exp().sum(1, keepdim=True)


def from_sums(log_p: Tensor, log_likelihood: Tensor, best: Best, S: Tensor, total: Tensor) -> Marginal:
    """What `marginal` returns, of the documents in log_p, given k* and the sums over all documents."""
    # [B, 1, M], relative to the centre; both forms are NaN where S is.
    L = torch.where(S > -0.5, S.log1p(), best.log_prior + total.log())
    impossible = best.impossible
    none = (log_p == -torch.inf) | impossible
    d = log_likelihood - best.log_likelihood - torch.where(impossible, 0.0, L)
    return Marginal(
        log_marginal=torch.where(impossible, -torch.inf, best.log_likelihood + L)[:, 0],
        posterior=torch.where(none, 0.0, (log_p + d).exp()),
        residual=torch.where(none, 0.0, prior_times_expm1(log_p, log_p.exp(), d)),
    )


def prior_times_expm1(log_p: Tensor, p: Tensor, d: Tensor) -> Tensor:
    """p (exp(d) - 1), without cancellation where d is small and without 0 x inf where p underflows."""
    near = d.abs() < 1
    return torch.where(near, p * torch.where(near, d, 0.0).expm1(), (log_p + d).exp() - p)


def select_tokens(log_likelihood: Tensor, token_mask: Tensor | None) -> Tensor:
    """float64 [B, K, M] with zero for tokens that are not scored, whatever stands there."""
    wide = log_likelihood.double()
    return wide if token_mask is None else torch.where(token_mask[:, None, :], wide, 0.0)


def with_tokens(log_likelihood: Tensor) -> Tensor:
    """[B, K, M] of what may be [B, K]: one token."""
    return log_likelihood.unsqueeze(2) if log_likelihood.dim() == 2 else log_likelihood


def columns(log_likelihood: Tensor, token_mask: Tensor | None, mode: str) -> Tensor:
    """What is marginalised, column by column: tokens [B, K, M], or their sum [B, K, 1] in mode "sequence"."""
    selected = select_tokens(log_likelihood, token_mask)
    return selected if mode == "token" else selected.sum(2, keepdim=True)


def scored_columns(log_p: Tensor, log_likelihood: Tensor, token_mask: Tensor | None, mode: str) -> Tensor:
    """bool [B, M], or [B, 1] in mode "sequence": columns with a document and a scored token, which count."""
    any_document = (log_p != -torch.inf).any(1, keepdim=True)
    return any_document & target_columns(log_likelihood, token_mask, mode)


def target_columns(log_likelihood: Tensor, token_mask: Tensor | None, mode: str) -> Tensor:
    """bool [B, M], or [B, 1] in mode "sequence": columns with a scored token, with documents or not."""
    batch, _, tokens = log_likelihood.shape
    scored = log_likelihood.new_ones(batch, tokens, dtype=torch.bool) if token_mask is None else token_mask
    return scored.any(1, keepdim=True) if mode == "sequence" else scored


def reduce(loss: Tensor, count: Tensor, reduction: str) -> Tensor:
    """The reductions of every marginal loss: loss [B], count int64 [B] of what "mean" divides by."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / count.sum().clamp(min=1)


def forward(
    problem: Problem,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """loss, the sum of -log_marginal over the scored columns, and count int64, how many those are.

    Both are [B] for reduction "none", else one number each.
    """
    scores, log_likelihood, token_mask, doc_mask, log_weight, mode = problem
    log_p = log_prior(scores, doc_mask, log_weight)
    scored = scored_columns(log_p, log_likelihood, token_mask, mode)
    log_marginal = marginal(log_p, columns(log_likelihood, token_mask, mode)).log_marginal
    loss, count = torch.where(scored, -log_marginal, 0.0).sum(1), scored.sum(1)
    loss = reduce(loss, count, reduction).to(problem.loss_dtype)
    return loss, count if reduction == "none" else count.sum()


def upstream(d_loss: Tensor, count: Tensor | None, batch: int) -> Tensor:
    """The gradient of each example's loss, float64 [B]; count divides it in reduction "mean"."""
    g = d_loss.double()
    return (g if count is None else g / count.clamp(min=1)).expand(batch)


def backward(
    d_loss: Tensor,
    count: Tensor | None,
    problem: Problem,
    needs_scores: bool,
    needs_log_likelihood: bool,
) -> tuple[Tensor, Tensor]:
    """d_scores = -g sum_m r and d_log_likelihood = -g posterior; an empty tensor for what is not needed.

    count: the divisor of reduction "mean"; None for the others.
    d_scores [B, K] has the dtype of the loss (log_weight has the same gradient), d_log_likelihood [B, K, M]
    its own.
    """
    scores, log_likelihood, token_mask, doc_mask, log_weight, mode = problem
    log_p = log_prior(scores, doc_mask, log_weight)
    scored = scored_columns(log_p, log_likelihood, token_mask, mode)[:, None, :]  # [B, 1, M] or [B, 1, 1]
    _, posterior, residual = marginal(log_p, columns(log_likelihood, token_mask, mode))
    g = upstream(d_loss, count, scores.shape[0])[:, None, None]
    d_scores = scores.new_empty(0, dtype=problem.loss_dtype)
    d_log_likelihood = log_likelihood.new_empty(0)
    if needs_scores:
        live = scored & (residual != 0)  # an infinite or NaN g must not turn a zero into NaN
        d_scores = torch.where(live, -g * residual, 0.0).sum(2).to(d_scores.dtype)
    if needs_log_likelihood:
        live = scored & (posterior != 0)
        if token_mask is not None:
            live = live & token_mask[:, None, :]
        d_wide = torch.where(live, -g * posterior, 0.0).expand(log_likelihood.shape)
        d_log_likelihood = d_wide.to(log_likelihood.dtype).contiguous()
    return d_scores, d_log_likelihood


def double_backward(
    v_scores: Tensor | None,
    v_log_likelihood: Tensor | None,
    d_loss: Tensor,
    count: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of <v_scores, d_scores> + <v_log_likelihood, d_log_likelihood> in closed form.

    Per column, with V(q) = diag q - q q^T: d2L/dl2 = d2L/dl ds = V(posterior), d2L/ds2 = V(posterior) -
    V(prior). Returns d_d_loss [B] and d_scores [B, K] in the dtype of the loss, d_log_likelihood [B, K, M] in
    its own.
    """
    scores, log_likelihood, token_mask, doc_mask, log_weight, mode = problem
    log_p = log_prior(scores, doc_mask, log_weight)
    scored = scored_columns(log_p, log_likelihood, token_mask, mode)[:, None, :]
    log_marginal, posterior, residual = marginal(log_p, columns(log_likelihood, token_mask, mode))
    live = scored & (log_marginal != -torch.inf)[:, None, :]  # [B, 1, M] or [B, 1, 1]
    prior = torch.where(live, log_p.exp()[:, :, None], 0.0)
    posterior, residual = torch.where(live, posterior, 0.0), torch.where(live, residual, 0.0)

    # One direction a column, [B, K, M]: in mode "sequence" a column is the sum of its tokens.
    v_s = prior.new_zeros(prior.shape) if v_scores is None else v_scores.double()[:, :, None].expand_as(prior)
    v_l = prior.new_zeros(prior.shape)
    if v_log_likelihood is not None:
        v_l = columns(v_log_likelihood, token_mask, mode)
    along = covariance(posterior, v_s + v_l)
    g = upstream(d_loss, count, scores.shape[0])
    d_d_loss = -(residual * v_s + posterior * v_l).sum((1, 2))
    if d_loss.dim() == 0:
        d_d_loss = upstream(d_d_loss.sum(), count, 1)[0]
    d_scores = -g[:, None] * (along - covariance(prior, v_s)).sum(2)
    d_log_likelihood = select_tokens((-g[:, None, None] * along).expand(log_likelihood.shape), token_mask)
    dtype = problem.loss_dtype
    return d_d_loss.to(dtype), d_scores.to(dtype), d_log_likelihood.to(log_likelihood.dtype).contiguous()


def covariance(q: Tensor, v: Tensor) -> Tensor:
    """(diag q - q q^T) v over axis 1."""
    return q * (v - (q * v).sum(1, keepdim=True))


BACKEND = Backend(name="reference", refuses=lambda *arguments: None, forward=forward, backward=backward)
