"""The C++ backend of marginal_loss: one pass each way, float64 inside (csrc/cpu/marginal_loss*)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..backends import Backend, forced_variant
from ..validation import dtype_name
from .reference import result_dtype


def refuses(
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
) -> str | None:
    if scores.device.type != "cpu":
        return f"the arguments are on {scores.device}"
    if native.cpu is None:
        return native.cpu_missing
    return None


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _array(tensor: Tensor | None) -> tuple[int, str]:
    return (0, "float32") if tensor is None else (tensor.data_ptr(), dtype_name(tensor.dtype))


def forward(
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    assert native.cpu is not None
    dtype = result_dtype(scores, log_likelihood, log_weight)
    scores, log_weight = scores.contiguous(), _contiguous(log_weight)
    token_mask, doc_mask = _contiguous(token_mask), _contiguous(doc_mask)
    shape = scores.shape[:1] if reduction == "none" else ()
    loss, count = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=torch.int64)
    native.cpu.marginal_loss_fwd(
        _array(scores),
        _array(log_likelihood),
        _array(log_weight),
        _pointer(token_mask),
        _pointer(doc_mask),
        tuple(log_likelihood.shape),
        log_likelihood.stride(),
        mode == "token",
        reduction,
        _array(loss),
        count.data_ptr(),
        torch.get_num_threads(),
        forced_variant(),
    )
    return loss, count


def backward(
    d_loss: Tensor,
    count: Tensor | None,
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
    needs_scores: bool,
    needs_log_likelihood: bool,
) -> tuple[Tensor, Tensor]:
    assert native.cpu is not None
    dtype = result_dtype(scores, log_likelihood, log_weight)
    d_scores = torch.empty(scores.shape if needs_scores else (0,), dtype=dtype)
    d_log_likelihood = torch.empty(
        log_likelihood.shape if needs_log_likelihood else (0,), dtype=log_likelihood.dtype
    )
    d_loss, scores, log_weight = d_loss.to(dtype).contiguous(), scores.contiguous(), _contiguous(log_weight)
    token_mask, doc_mask = _contiguous(token_mask), _contiguous(doc_mask)
    native.cpu.marginal_loss_bwd(
        _array(scores),
        _array(log_likelihood),
        _array(log_weight),
        _pointer(token_mask),
        _pointer(doc_mask),
        tuple(log_likelihood.shape),
        log_likelihood.stride(),
        mode == "token",
        "none" if d_loss.dim() == 1 else "sum" if count is None else "mean",
        _array(d_loss),
        _pointer(count),
        d_scores.data_ptr(),
        d_log_likelihood.data_ptr(),
        torch.get_num_threads(),
        forced_variant(),
    )
    return d_scores, d_log_likelihood


BACKEND = Backend(name="cpu", refuses=refuses, forward=forward, backward=backward)
