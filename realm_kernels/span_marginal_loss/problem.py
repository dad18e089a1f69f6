"""The arguments of one call and what follows from them: what every backend of span_marginal_loss is given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..marginal_loss.problem import result_dtype


class Problem(NamedTuple):
    """In the order of the op's schema. Legend: B examples, K documents, C answer spans per document."""

    scores: Tensor  # [B, K]
    span_scores: Tensor  # [B, K, C]
    correct: Tensor  # [B, K, C]
    valid: Tensor | None  # [B, K, C]
    doc_mask: Tensor | None  # [B, K]
    log_weight: Tensor | None  # [B, K]
    normalization: str

    @property
    def is_global(self) -> bool:
        return self.normalization == "global"

    @property
    def loss_dtype(self) -> torch.dtype:
        return result_dtype(self.scores, self.span_scores, self.log_weight)
