"""The C++ backend of marginal_loss: one pass each way, float64 inside (csrc/cpu/marginal_loss*)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..backends import Backend, forced_variant
from ..validation import dtype_name
from .checks import DTYPES
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


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# Building the name of a dtype takes longer than everything else that is done with the tensor here.
_NAMES = {dtype: dtype_name(dtype) for dtype in DTYPES}


def array(tensor: Tensor | None) -> tuple[int, str]:
    return (0, "float32") if tensor is None else (tensor.data_ptr(), _NAMES[tensor.dtype])


def _extents(log_likelihood: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides [B, K, M] of what may be [B, K]."""
    if log_likelihood.dim() == 2:
        return (*log_likelihood.shape, 1), (*log_likelihood.stride(), 1)
    return tuple(log_likelihood.shape), log_likelihood.stride()


Kept = tuple[Tensor | None, Tensor | None]


def room_to_keep(
    scores: Tensor,
    log_likelihood: Tensor,
    log_weight: Tensor | None,
    mode: str,
    needs_scores: bool,
    needs_log_likelihood: bool,
) -> Kept:
    """Where the forward leaves r [B, K] and the posterior, [B, K] or [B, K, M] in mode "token", for the
    backward, which then scales them. A backward without them finds them again from the inputs."""
    dtype = result_dtype(scores, log_likelihood, log_weight)
    residual = torch.empty(scores.shape, dtype=dtype) if needs_scores else None
    shape = log_likelihood.shape if mode == "token" else scores.shape
    return residual, torch.empty(shape, dtype=dtype) if needs_log_likelihood else None


def forward(
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
    reduction: str,
    *,
    kept: Kept = (None, None),
) -> tuple[Tensor, Tensor | int]:
    """The loss and what it counts: per example in a tensor, of all examples as a number, where the caller who
    needs a tensor makes one. log_likelihood: [B, K, M] or [B, K]."""
    assert native.cpu is not None
    dtype = result_dtype(scores, log_likelihood, log_weight)
    scores, log_weight = scores.contiguous(), contiguous(log_weight)
    token_mask, doc_mask = contiguous(token_mask), contiguous(doc_mask)
    if reduction == "none":
        count = torch.empty(scores.shape[:1], dtype=torch.int64)
        loss = torch.empty(scores.shape[:1], dtype=dtype)
    else:
        count = None
        loss = torch.empty((), dtype=dtype)
    total = native.cpu.marginal_loss_fwd(
        array(scores),
        array(log_likelihood),
        array(log_weight),
        pointer(token_mask),
        pointer(doc_mask),
        *_extents(log_likelihood),
        mode == "token",
        reduction,
        array(loss),
        pointer(count),
        (pointer(kept[0]), pointer(kept[1])),
        torch.get_num_threads(),
        forced_variant(),
    )
    return loss, total if count is None else count


def backward(
    d_loss: Tensor,
    count: Tensor | int | None,
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
    needs_scores: bool,
    needs_log_likelihood: bool,
    *,
    kept: Kept = (None, None),
) -> tuple[Tensor, Tensor]:
    assert native.cpu is not None
    dtype = result_dtype(scores, log_likelihood, log_weight)
    d_scores = _gradient_of(scores, dtype) if needs_scores else torch.empty(0, dtype=dtype)
    d_log_likelihood = (
        _gradient_of(log_likelihood, log_likelihood.dtype)
        if needs_log_likelihood
        else torch.empty(0, dtype=log_likelihood.dtype)
    )
    if d_loss.dtype != dtype:
        d_loss = d_loss.to(dtype)
    d_loss, scores, log_weight = d_loss.contiguous(), scores.contiguous(), contiguous(log_weight)
    token_mask, doc_mask = contiguous(token_mask), contiguous(doc_mask)
    native.cpu.marginal_loss_bwd(
        array(scores),
        array(log_likelihood),
        array(log_weight),
        pointer(token_mask),
        pointer(doc_mask),
        *_extents(log_likelihood),
        mode == "token",
        "none" if d_loss.dim() == 1 else "sum" if count is None else "mean",
        array(d_loss),
        1 if count is None else int(count),
        d_scores.data_ptr(),
        d_log_likelihood.data_ptr(),
        (pointer(kept[0]), pointer(kept[1])),
        torch.get_num_threads(),
        forced_variant(),
    )
    return d_scores, d_log_likelihood


def _gradient_of(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Fresh memory, contiguous. empty_like is the faster one, and keeps the strides of what has others."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return torch.empty_like(tensor)
    return torch.empty(tensor.shape, dtype=dtype)


BACKEND = Backend(name="cpu", refuses=refuses, forward=forward, backward=backward)
