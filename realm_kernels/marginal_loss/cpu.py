"""The C++ backend of marginal_loss: one pass each way, float64 inside (csrc/cpu/marginal_loss*)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..backends import Backend, forced_backend, forced_variant
from ..validation import dtype_name
from .checks import DTYPES
from .problem import Problem


def refuses(problem: Problem) -> str | None:
    if not problem.scores.is_cpu:
        return f"the arguments are on {problem.scores.device}"
    if native.cpu is None:
        return native.cpu_missing
    return None


def serves_tensors_here() -> bool:
    """What choosing a backend comes to for tensors that are on the CPU."""
    forced = forced_backend()
    return native.cpu is not None and (forced is None or forced.startswith("cpu"))


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """torch's own takes its time also where the dtype is the same."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# Building the name of a dtype takes longer than everything else that is done with the tensor here.
_NAMES = {dtype: dtype_name(dtype) for dtype in DTYPES}


# The numbers by which C++ knows them (csrc/cpu/marginal_loss.h).
_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
# empty_like takes half the time of empty.
_SCALARS = {dtype: torch.empty((), dtype=dtype) for dtype in (torch.float32, torch.float64)}


def array(tensor: Tensor | None) -> tuple[int, str]:
    return (0, "float32") if tensor is None else (tensor.data_ptr(), _NAMES[tensor.dtype])


# Log-likelihoods from which on finding things again costs more than memory for them.
LEAST_TO_KEEP = 2048


def room_to_keep(problem: Problem, needs_scores: bool, needs_log_likelihood: bool) -> Sequence[Tensor | None]:
    """Where the forward leaves what the backward would have to find again: r and posterior, [B, K] each, or
    four numbers a token, where each draws a document."""
    scores, log_likelihood = problem.scores, problem.log_likelihood
    if log_likelihood.numel() < LEAST_TO_KEEP:
        return ()
    tokens = log_likelihood.shape[2] if log_likelihood.dim() == 3 else 1
    if problem.mode == "token" and tokens > 1:
        return None, None, torch.empty(scores.shape[0], 4, (tokens + 7) // 8 * 8, dtype=torch.float64)
    dtype = problem.loss_dtype
    residual = _room_like(scores, dtype) if needs_scores else None
    return residual, _room_like(scores, dtype) if needs_log_likelihood else None, None


def forward(
    problem: Problem, reduction: str, *, kept: Sequence[Tensor | None] = ()
) -> tuple[Tensor, Tensor | int]:
    """The loss and what it counts: per example in a tensor, of all examples as a number, where the caller who
    needs a tensor makes one. kept: of room_to_keep, or nothing."""
    assert native.cpu is not None
    count, dtype = None, problem.loss_dtype
    if reduction == "none":
        loss = torch.empty(problem.scores.shape[0], dtype=dtype)
        count = torch.empty(problem.scores.shape[0], dtype=torch.int64)
    else:
        loss = torch.empty_like(_SCALARS[dtype])
    _held, inputs = _inputs(problem)
    total = native.cpu.marginal_loss_fwd(
        *inputs,
        _REDUCTIONS[reduction],
        loss.data_ptr(),
        dtype is torch.float64,
        pointer(count),
        [pointer(x) for x in kept] if kept else None,
        torch.get_num_threads(),
        forced_variant(),
    )
    return loss, total if count is None else count


def backward(
    d_loss: Tensor,
    count: Tensor | int | None,
    problem: Problem,
    needs_scores: bool,
    needs_log_likelihood: bool,
    *,
    kept: Sequence[Tensor | None] = (),
) -> tuple[Tensor, Tensor]:
    assert native.cpu is not None
    dtype, log_likelihood = problem.loss_dtype, problem.log_likelihood
    d_scores = _room_like(problem.scores, dtype) if needs_scores else torch.empty(0, dtype=dtype)
    d_log_likelihood = (
        _room_like(log_likelihood, log_likelihood.dtype)
        if needs_log_likelihood
        else torch.empty(0, dtype=log_likelihood.dtype)
    )
    d_loss = cast(d_loss, dtype).contiguous()
    _held, inputs = _inputs(problem)
    native.cpu.marginal_loss_bwd(
        *inputs,
        d_loss.dim() == 1,
        d_loss.data_ptr(),
        dtype is torch.float64,
        1 if count is None else int(count),
        d_scores.data_ptr(),
        d_log_likelihood.data_ptr(),
        [pointer(x) for x in kept] if kept else None,
        torch.get_num_threads(),
        forced_variant(),
    )
    return d_scores, d_log_likelihood


def _room_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Fresh memory, contiguous. empty_like is the faster one, and keeps the strides of what has others."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return torch.empty_like(tensor)
    return torch.empty(tensor.shape, dtype=dtype)


def _inputs(problem: Problem) -> tuple[Sequence[Tensor | None], tuple[int, ...]]:
    """What the kernel is told of the arguments, behind tensors to hold meanwhile: it is told addresses, which
    keep nothing alive. It takes log-likelihoods of any strides and nothing else.

    Plain numbers and few steps: among a training step's other work each takes several times as long as in a
    loop of its own."""
    scores, log_likelihood, token_mask, doc_mask, log_weight, mode = problem
    if log_likelihood.dim() == 2:
        (batch, documents), tokens = log_likelihood.shape, 1
        (stride_b, stride_k), stride_m = log_likelihood.stride(), 1
    else:
        batch, documents, tokens = log_likelihood.shape
        stride_b, stride_k, stride_m = log_likelihood.stride()
    scores = scores.contiguous()
    weight = mask_of_tokens = mask_of_documents = weight_type = 0
    if token_mask is not None:
        token_mask = token_mask.contiguous()
        mask_of_tokens = token_mask.data_ptr()
    if doc_mask is not None:
        doc_mask = doc_mask.contiguous()
        mask_of_documents = doc_mask.data_ptr()
    if log_weight is not None:
        log_weight = log_weight.contiguous()
        weight, weight_type = log_weight.data_ptr(), _TYPES[log_weight.dtype]
    return (scores, token_mask, doc_mask, log_weight), (
        scores.data_ptr(),
        _TYPES[scores.dtype],
        log_likelihood.data_ptr(),
        _TYPES[log_likelihood.dtype],
        weight,
        weight_type,
        mask_of_tokens,
        mask_of_documents,
        batch,
        documents,
        tokens,
        stride_b,
        stride_k,
        stride_m,
        mode == "token",
    )


BACKEND = Backend(name="cpu", refuses=refuses, forward=forward, backward=backward)
