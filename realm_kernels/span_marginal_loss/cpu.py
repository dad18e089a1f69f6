"""The C++ backend of span_marginal_loss: each span read from memory once a pass (csrc/cpu/span_evidence*)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..backends import Backend, forced_variant
from ..marginal_loss.cpu import array, contiguous, pointer
from ..marginal_loss.reference import result_dtype


def refuses(
    scores: Tensor,
    span_scores: Tensor,
    correct: Tensor,
    valid: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    normalization: str,
) -> str | None:
    if scores.device.type != "cpu":
        return f"the arguments are on {scores.device}"
    if native.cpu is None:
        return native.cpu_missing
    return None


def forward(
    scores: Tensor,
    span_scores: Tensor,
    correct: Tensor,
    valid: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    normalization: str,
    reduction: str,
) -> tuple[Tensor, Tensor | int, Tensor]:
    """As reference.forward; count is a number where it is one of all examples."""
    assert native.cpu is not None
    dtype = result_dtype(scores, span_scores, log_weight)
    kept = torch.empty((4, *scores.shape), dtype=torch.float64)
    shape = scores.shape[:1] if reduction == "none" else ()
    loss = torch.empty(shape, dtype=dtype)
    count = torch.empty(shape, dtype=torch.int64) if reduction == "none" else None
    # Bound to names: what is passed below are addresses, which keep nothing alive.
    tensors: list[Any] = [contiguous(x) for x in (scores, log_weight, doc_mask, span_scores, correct, valid)]
    total = native.cpu.span_marginal_loss_fwd(
        *_inputs(tensors, normalization, reduction),
        kept.data_ptr(),
        array(loss),
        pointer(count),
        torch.get_num_threads(),
        forced_variant(),
    )
    return loss, total if count is None else count, kept


def backward(
    d_loss: Tensor,
    count: Tensor | int | None,
    kept: Tensor,
    scores: Tensor,
    span_scores: Tensor,
    correct: Tensor,
    valid: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    normalization: str,
    needs_scores: bool,
    needs_span_scores: bool,
) -> tuple[Tensor, Tensor]:
    assert native.cpu is not None
    dtype = result_dtype(scores, span_scores, log_weight)
    d_scores = torch.empty(scores.shape if needs_scores else (0,), dtype=dtype)
    d_span_scores = torch.empty(span_scores.shape if needs_span_scores else (0,), dtype=span_scores.dtype)
    d_loss, kept = d_loss.to(dtype).contiguous(), kept.contiguous()
    tensors: list[Any] = [contiguous(x) for x in (scores, log_weight, doc_mask, span_scores, correct, valid)]
    reduction = "none" if d_loss.dim() == 1 else "sum" if count is None else "mean"
    native.cpu.span_marginal_loss_bwd(
        *_inputs(tensors, normalization, reduction),
        kept.data_ptr(),
        array(d_loss),
        1 if count is None else int(count),
        d_scores.data_ptr(),
        d_span_scores.data_ptr(),
        torch.get_num_threads(),
        forced_variant(),
    )
    return d_scores, d_span_scores


def _inputs(tensors: list[Any], normalization: str, reduction: str) -> tuple[object, ...]:
    scores, log_weight, doc_mask, span_scores, correct, valid = tensors
    return (
        array(scores),
        array(log_weight),
        pointer(doc_mask),
        array(span_scores),
        correct.data_ptr(),
        pointer(valid),
        tuple(span_scores.shape),
        normalization == "global",
        reduction,
    )


BACKEND = Backend(name="cpu", refuses=refuses, forward=forward, backward=backward)
