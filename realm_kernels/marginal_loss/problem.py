"""The arguments of one call and what follows from them: what every backend of marginal_loss is given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Of the loss: float64 where any input is, float32 for everything else."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


class Problem(NamedTuple):
    """In the order of the op's schema. Legend: B examples, K documents, M target tokens.

    A tuple: a dataclass takes four times as long to make, and at the sizes of a training step that shows."""

    scores: Tensor  # [B, K]
    log_likelihood: Tensor  # [B, K, M]; to the C++ backend also [B, K], one token
    token_mask: Tensor | None  # [B, M]
    doc_mask: Tensor | None  # [B, K]
    log_weight: Tensor | None  # [B, K]
    mode: str

    @property
    def loss_dtype(self) -> torch.dtype:
        return result_dtype(self.scores, self.log_likelihood, self.log_weight)

    def with_tokens(self) -> Problem:
        """log_likelihood [B, K, M] of what may be [B, K]: one token."""
        wide = self.log_likelihood.dim() == 3
        return self if wide else self._replace(log_likelihood=self.log_likelihood.unsqueeze(2))
