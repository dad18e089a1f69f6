"""Who reduces the spans of span_marginal_loss: the C++ kernel where it can, the specification elsewhere.

No torch op stands here: what torch has to see (a compiler, a transform, a mode) sees the specification's own
operations, and marginal_loss behind them is an op of its own.
"""

from __future__ import annotations

from torch import Tensor

from ..backends import Backend
from . import cpu, reference


def backend_for(span_scores: Tensor, correct: Tensor, valid: Tensor | None, is_document: Tensor) -> Backend:
    """use_backend() names what serves marginal_loss behind the spans; here it decides for or against C++."""
    if cpu.BACKEND.refuses(span_scores, correct, valid, is_document) is None:
        return cpu.BACKEND
    return reference.BACKEND
