"""The specification of linear_marginal_loss in plain torch: every logit in memory, all in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import Backend
from .problem import Found, Gradients, Needs, Problem, found, posterior_factor


def log_probabilities(problem: Problem) -> Tensor:
    """log softmax of hidden W^T + b over the vocabulary: float64 [B, K, M, V]; of b for other rows."""
    hidden = torch.where(problem.live()[..., None], problem.hidden.double(), 0.0)
    bias = None if problem.bias is None else problem.bias.double()
    return F.linear(hidden, problem.weight.double(), bias).log_softmax(-1)


def targets_by_row(problem: Problem) -> tuple[Tensor, Tensor]:
    """int64 [B, K, M] the target of each row, 0 where it has none; bool [B, K, M] where out of range."""
    live, targets = problem.live(), problem.targets[:, None, :]
    inside = (targets >= 0) & (targets < problem.weight.shape[0])
    return torch.where(live & inside, targets, 0), live & ~inside


def log_likelihood(problem: Problem) -> Tensor:
    """log p(y_m | z_k, x), float64 [B, K, M]: 0 for rows without a part, NaN for a target out of range."""
    targets, outside = targets_by_row(problem)
    chosen = log_probabilities(problem).gather(3, targets[..., None])[..., 0]
    return torch.where(problem.live(), torch.where(outside, torch.nan, chosen), 0.0)


def backward(problem: Problem, log_likelihood: Tensor, d_loss: Tensor, needs: Needs) -> Gradients:
    """The gradients of sum_b d_loss_b loss_b.

    d loss / d logits = d_loss posterior (p - onehot(target)).
    """
    dtype = problem.sum_dtype
    factor = posterior_factor(problem, log_likelihood, d_loss)[..., None]
    targets, _ = targets_by_row(problem)
    d_logits = log_probabilities(problem).exp()
    d_logits.scatter_add_(3, targets[..., None], torch.full_like(d_logits[..., :1], -1.0))
    # Select before summing: where a row has no part, or no gradient, its logits may be infinite.
    d_logits = torch.where(factor != 0, factor * d_logits, 0.0)
    hidden = torch.where(problem.live()[..., None], problem.hidden.double(), 0.0)

    none = problem.weight.new_empty(0, dtype=dtype)
    d_hidden, d_weight, d_bias = problem.hidden.new_empty(0, dtype=problem.hidden_gradient_dtype), none, none
    if needs.hidden:
        d_hidden = (d_logits @ problem.weight.double()).to(problem.hidden_gradient_dtype)
    if needs.weight:
        d_weight = torch.einsum("bkmv,bkmh->vh", d_logits, hidden).to(dtype)
    if needs.bias:
        d_bias = d_logits.sum((0, 1, 2)).to(dtype)
    return Gradients(d_hidden, d_weight, d_bias)


def forward(problem: Problem, needs: Needs, reduction: str) -> Found:
    exact = log_likelihood(problem)
    ones = exact.new_ones(exact.shape[0])
    return found(problem, exact, backward(problem, exact, ones, needs), reduction)


BACKEND = Backend(name="reference", refuses=lambda *arguments: None, forward=forward, backward=backward)
