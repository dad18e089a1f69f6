"""Every error a user of linear_marginal_loss can see."""

from __future__ import annotations

import torch
from torch import Tensor

from ..marginal_loss.checks import DTYPES, REDUCTIONS, check_documents
from ..marginal_loss.reference import MODES
from ..validation import check_choice, check_tensor, describe
from .problem import Problem

OP = "linear_marginal_loss"


def check(problem: Problem, reduction: str, *, least_documents: int = 1, least_words: int = 1) -> None:
    """Raise TypeError or ValueError for arguments the op does not take, of whatever type they are."""
    scores, hidden, weight, targets, bias, doc_mask, log_weight = problem.tensors
    ignore_index, mode, min_posterior = problem.options
    check_documents(OP, scores, doc_mask, log_weight, least_documents)
    device = scores.device
    legend = "[B, K, M, H]"
    check_tensor(OP, "hidden", hidden, legend, (*scores.shape, None, None), DTYPES, device)
    batch, _, tokens, width = hidden.shape
    if width < 1:
        raise ValueError(f"{OP}: hidden must be {legend} with H >= 1, got {describe(hidden)}")
    check_tensor(OP, "weight", weight, "[V, H]", (None, width), (hidden.dtype,), device)
    if weight.shape[0] < least_words:
        raise ValueError(f"{OP}: weight must be [V, H] with V >= {least_words}, got {describe(weight)}")
    check_tensor(OP, "targets", targets, "[B, M]", (batch, tokens), (torch.int64,), device)
    if bias is not None:
        check_tensor(OP, "bias", bias, "[V]", (weight.shape[0],), (hidden.dtype,), device)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{OP}: ignore_index must be an int, got {describe(ignore_index)}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{OP}: ignore_index must be an int64, in [-2**63, 2**63), got {ignore_index}")
    if isinstance(min_posterior, bool) or not isinstance(min_posterior, (int, float)):
        raise TypeError(f"{OP}: min_posterior must be a float, got {describe(min_posterior)}")
    if not 0.0 <= min_posterior <= 1.0:
        raise ValueError(f"{OP}: min_posterior must be in [0, 1], got {min_posterior}")
    check_choice(OP, "mode", mode, MODES)
    check_choice(OP, "reduction", reduction, REDUCTIONS)


def check_values(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise ValueError for targets out of range. On the CPU only: elsewhere looking would synchronise."""
    if not targets.is_cpu or targets.numel() == 0:
        return
    low, high = targets.aminmax()
    if low.item() >= 0 and high.item() < vocabulary:
        return
    # With ignored ones among them in Python, as they are few: torch takes longer to select.
    scored = [word for word in targets.flatten().tolist() if word != ignore_index]
    if scored and not 0 <= min(scored) <= max(scored) < vocabulary:
        raise ValueError(
            f"{OP}: targets must be in [0, V={vocabulary}) or ignore_index={ignore_index}, "
            f"got values from {min(scored)} to {max(scored)}"
        )
