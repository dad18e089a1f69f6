"""The marginal losses as others compute them: plain torch, chunked torch, torch's linear_cross_entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def marginal_loss(scores: Tensor, log_likelihood: Tensor, mode: str) -> Tensor:
    """-log p(y|x) of [B, K] scores and [B, K, M] log likelihoods, averaged, in plain torch."""
    log_prior = scores.float().log_softmax(1)
    if mode == "sequence":
        return -(log_prior + log_likelihood.sum(2)).logsumexp(1).mean()
    return -(log_prior[:, :, None] + log_likelihood).logsumexp(1).mean()


def marginal_loss_of_answers(scores: Tensor, log_likelihood: Tensor) -> Tensor:
    """The same of [B, K] log likelihoods of whole answers."""
    return -(scores.float().log_softmax(1) + log_likelihood).logsumexp(1).mean()


def span_marginal_loss(scores: Tensor, span_scores: Tensor, correct: Tensor, normalization: str) -> Tensor:
    """The reader's loss of [B, K, C] span scores, averaged over examples with a correct span."""
    if normalization == "document":
        log_p = scores.log_softmax(1)[:, :, None] + span_scores.log_softmax(2)  # [B, K, C]
    else:
        log_p = (scores[:, :, None] + span_scores).flatten(1).log_softmax(1).view(span_scores.shape)
    log_p = log_p.flatten(1).masked_fill(~correct.flatten(1), -torch.inf)
    return -log_p.logsumexp(1).mean()


def _row_losses(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias).float()
    return F.cross_entropy(logits, targets, reduction="none")


def by_row(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [B * K * M, H], and the target of each of its rows."""
    return hidden.flatten(0, 2), targets[:, None].expand(hidden.shape[:3]).flatten()


def eager(scores: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """All logits [B, K, M, V] in memory, as most trainers do. Targets of -100 are not scored."""
    flat, row_targets = by_row(hidden, targets)
    losses = _row_losses(flat, weight, bias, row_targets)
    return marginal_loss(scores, -losses.view(hidden.shape[:3]), "sequence")


def chunked(
    scores: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: int
) -> Tensor:
    """Chunks of rows whose logits the backward recomputes: four products, and no logits kept."""
    flat, row_targets = by_row(hidden, targets)
    losses = [
        checkpoint(_row_losses, part, weight, bias, target, use_reentrant=False)
        for part, target in zip(flat.split(rows), row_targets.split(rows), strict=True)
    ]
    return marginal_loss(scores, -torch.cat(losses).view(hidden.shape[:3]), "sequence")


def linear_cross_entropy(
    scores: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor
) -> Tensor:
    """torch 2.13's chunked linear_cross_entropy without reduction, then the marginal over documents."""
    flat, row_targets = by_row(hidden, targets)
    losses = F.linear_cross_entropy(
        flat,
        weight,
        row_targets,
        linear_bias=bias,
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return marginal_loss(scores, -losses.float().view(hidden.shape[:3]), "sequence")
