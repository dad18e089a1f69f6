"""The tensors of one call and what follows from them: what every backend of linear_marginal_loss is given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..marginal_loss import op as _marginal_loss  # noqa: F401  (registers the op called here)
from ..marginal_loss.problem import result_dtype
from ..marginal_loss.reference import relevance


class Needs(NamedTuple):
    """Which gradients are asked for; no work is done for the others."""

    hidden: bool
    weight: bool
    bias: bool


NOTHING = Needs(False, False, False)


class Gradients(NamedTuple):
    """Empty where not needed. d_hidden has `hidden_gradient_dtype`, the sums have `sum_dtype`."""

    d_hidden: Tensor  # [B, K, M, H]
    d_weight: Tensor  # [V, H]
    d_bias: Tensor  # [V]


class Found(NamedTuple):
    """What a backend's forward makes of a problem."""

    loss: Tensor  # [B] for reduction "none", else one number, as of marginal_loss
    counted: Tensor | int  # likewise, int64: what counts
    log_likelihood: Tensor  # float64 [B, K, M], log p(y_m | z_k, x)
    units: Gradients  # for an upstream gradient of 1


@dataclass(frozen=True)
class Problem:
    """Legend: B examples, K documents, M target tokens, H hidden size, V vocabulary."""

    scores: Tensor  # [B, K]
    hidden: Tensor  # [B, K, M, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [B, M]
    bias: Tensor | None  # [V]
    doc_mask: Tensor | None  # [B, K]
    log_weight: Tensor | None  # [B, K]
    ignore_index: int
    mode: str
    min_posterior: float = 0.0  # rows whose posterior is below it have no part in d_hidden, d_weight, d_bias

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return (
            self.scores,
            self.hidden,
            self.weight,
            self.targets,
            self.bias,
            self.doc_mask,
            self.log_weight,
        )

    @property
    def options(self) -> tuple[int, str, float]:
        return self.ignore_index, self.mode, self.min_posterior

    @property
    def sum_dtype(self) -> torch.dtype:
        """Of logits and of sums over rows: float32, or float64 where the hidden states are."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def loss_dtype(self) -> torch.dtype:
        return result_dtype(self.scores, self.hidden, self.log_weight)

    @property
    def hidden_gradient_dtype(self) -> torch.dtype:
        """Of d_hidden for an upstream gradient of 1: half precision would lose what a loss scale saves."""
        return torch.float32 if self.hidden.dtype == torch.float16 else self.hidden.dtype

    def centred_bias(self) -> Tensor | None:
        """[V] of `sum_dtype`, less its maximum: softmax does not see it, and logits would lose digits."""
        if self.bias is None:
            return None
        bias = self.bias.to(self.sum_dtype)
        return bias - bias.amax()

    def scored(self) -> Tensor:
        """bool [B, M]: the tokens that count."""
        return self.targets != self.ignore_index

    def live(self) -> Tensor:
        """bool [B, K, M]: the rows that have a part in the loss. What the others hold is never looked at."""
        is_document = relevance(self.scores, self.doc_mask, self.log_weight) != -torch.inf
        return is_document[:, :, None] & self.scored()[:, None, :]

    def marginal_inputs(self, log_likelihood: Tensor) -> tuple[Any, ...]:
        """Of the ops of marginal_loss."""
        tensors = self.scores, log_likelihood, self.scored(), self.doc_mask, self.log_weight
        return *tensors, self.mode

    def examples(self, first: int, last: int) -> Problem:
        """The same problem for examples [first, last) alone."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[first:last]

        return replace(
            self,
            scores=self.scores[first:last],
            hidden=self.hidden[first:last],
            targets=self.targets[first:last],
            doc_mask=cut(self.doc_mask),
            log_weight=cut(self.log_weight),
        )


def found(problem: Problem, log_likelihood: Tensor, units: Gradients, reduction: str) -> Found:
    loss, count = torch.ops.realm_kernels.marginal_loss(*problem.marginal_inputs(log_likelihood), reduction)
    return Found(loss.to(problem.loss_dtype), count, log_likelihood, units)


def posterior_factor(problem: Problem, log_likelihood: Tensor, d_loss: Tensor) -> Tensor:
    """d_loss [B] times the posterior: float64 [B, K, M] as log_likelihood, 0 for rows without a part."""
    _, d_log_likelihood = torch.ops.realm_kernels.marginal_loss_bwd(
        d_loss, *problem.marginal_inputs(log_likelihood), False, True
    )
    return keep_likely(problem, -d_log_likelihood, d_loss)


def keep_likely(problem: Problem, factor: Tensor, d_loss: Tensor) -> Tensor:
    """factor [B, K, M], d_loss [B] times the posterior, but 0 where that is below min_posterior.

    |p - onehot| <= sqrt(2), so a row that is left out is missed by at most sqrt(2) min_posterior |d_loss|
    |hidden| in d_weight (Frobenius' norm), as much with |hidden| = 1 in d_bias, and by at most
    2 min_posterior |d_loss| max_v |W_v| in d_hidden: README.md derives it.
    """
    if problem.min_posterior == 0.0:
        return factor
    least = problem.min_posterior * d_loss.abs()[:, None, None]
    return torch.where(factor.abs() < least, 0.0, factor)  # NaN stays
