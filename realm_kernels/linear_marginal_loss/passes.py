"""The two passes over a chunk's logits between its products: row statistics, and gradients in place."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .products import Products


class Statistics(NamedTuple):
    log_p: Tensor  # [R] float64, log softmax of the logits at the target
    total: Tensor  # [R] float64, sum over V of exp(logit - largest)
    largest: Tensor  # [R], of the logits


class Passes(Protocol):
    """What a device brings. `logits` [V, R] is the workspace: between the calls it holds what they like."""

    @property
    def in_place(self) -> bool:
        """Whether half-precision gradients take the place of the logits, or memory of their own."""

    def score_(
        self, products: Products, hidden: Tensor, logits: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Statistics:
        """The first product, of hidden [R, H], into the logits of the weight's words, and the statistics."""
        products.logits(hidden, logits[: products.weight.shape[0]])
        return self.statistics_(logits, bias, targets)

    def statistics_(self, logits: Tensor, bias: Tensor | None, targets: Tensor) -> Statistics:
        """Of logits W hidden^T, to which bias [V] is still to be added; targets int64 [R] in [0, V)."""

    def gradient_(
        self,
        logits: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        statistics: Statistics,
        factor: Tensor,
        dtype: torch.dtype,
        d_bias: Tensor | None,
    ) -> Tensor:
        """factor [R] float64 times (p - onehot(target)): [V, R] of dtype, its row sums added to d_bias [V].

        `logits` is as score_ left it, and may become the result.
        """


class TorchPasses(Passes):
    """Any device, as torch's own operations: logits become exp(logit - largest), and 0 at the target."""

    in_place = False

    def statistics_(self, logits: Tensor, bias: Tensor | None, targets: Tensor) -> Statistics:
        """The target is summed apart from the rest: log p = -log1p(rest / e) keeps its digits where p is near
        1. What is left of a row is a handful of numbers on which all hangs, and those are float64.
        """
        if bias is not None:
            logits.add_(bias[:, None])
        largest = logits.amax(0)
        largest.masked_fill_(largest == -torch.inf, 0.0)  # exponentials are 0, and no NaN, where all are -inf
        at_target = targets[None]
        distance = logits.gather(0, at_target)[0].double() - largest.double()
        logits.sub_(largest).exp_()
        logits.scatter_(0, at_target, 0.0)
        e, rest = distance.exp(), logits.sum(0).double()
        total = e + rest
        log_p = torch.where(rest < e, -(rest / e).log1p(), distance - total.log())
        return Statistics(log_p, total, largest)

    def gradient_(
        self,
        logits: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        statistics: Statistics,
        factor: Tensor,
        dtype: torch.dtype,
        d_bias: Tensor | None,
    ) -> Tensor:
        logits.mul_((factor / statistics.total).to(logits.dtype))
        logits.scatter_(0, targets[None], (factor * statistics.log_p.expm1()).to(logits.dtype)[None])
        if d_bias is not None:
            d_bias += logits.sum(1)
        return logits.to(dtype)


TORCH = TorchPasses()
