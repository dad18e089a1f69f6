"""The C++ backend of marginal_loss: one pass each way, float64 inside (csrc/cpu/marginal_loss*)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..backends import Backend, forced_variant
from ..validation import dtype_name
from .checks import DTYPES
from .problem import Problem


def refuses(problem: Problem) -> str | None:
    if not problem.scores.is_cpu:
        return f"the arguments are on {problem.scores.device}"
    if native.cpu is None:
        return native.cpu_missing
    return None


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """torch's own takes its time also where the dtype is the same."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# Building the name of a dtype takes longer than everything else that is done with the tensor here.
_NAMES = {dtype: dtype_name(dtype) for dtype in DTYPES}


def array(tensor: Tensor | None) -> tuple[int, str]:
    return (0, "float32") if tensor is None else (tensor.data_ptr(), _NAMES[tensor.dtype])


Kept = tuple[Tensor | None, Tensor | None, Tensor | None]
NOTHING_KEPT: Kept = (None, None, None)


def room_to_keep(problem: Problem, needs_scores: bool, needs_log_likelihood: bool) -> Kept:
    """Where the forward leaves what the backward would have to find again: r and posterior, [B, K] each, of
    sequences of several tokens, which are less than their log-likelihoods; else a few numbers a column."""
    dtype, scores, shape = problem.loss_dtype, problem.scores, problem.log_likelihood.shape
    tokens = shape[2] if len(shape) == 3 else 1
    if problem.mode == "sequence" and tokens > 1:
        residual = _room_like(scores, dtype) if needs_scores else None
        return residual, _room_like(scores, dtype) if needs_log_likelihood else None, None
    columns = 1 if tokens <= 1 else (tokens + 7) // 8 * 8
    return None, None, torch.empty(shape[0], 2 + 4 * columns, dtype=torch.float64)


def forward(problem: Problem, reduction: str, *, kept: Kept = NOTHING_KEPT) -> tuple[Tensor, Tensor | int]:
    """The loss and what it counts: per example in a tensor, of all examples as a number, where the caller who
    needs a tensor makes one."""
    assert native.cpu is not None
    count = None
    if reduction == "none":
        loss = torch.empty(problem.scores.shape[:1], dtype=problem.loss_dtype)
        count = torch.empty(problem.scores.shape[:1], dtype=torch.int64)
    else:
        loss = torch.empty((), dtype=problem.loss_dtype)
    problem = _in_rows(problem)
    total = native.cpu.marginal_loss_fwd(
        *_inputs(problem),
        reduction,
        array(loss),
        pointer(count),
        tuple(map(pointer, kept)),
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
    kept: Kept = NOTHING_KEPT,
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
    problem = _in_rows(problem)
    native.cpu.marginal_loss_bwd(
        *_inputs(problem),
        "none" if d_loss.dim() == 1 else "sum" if count is None else "mean",
        array(d_loss),
        1 if count is None else int(count),
        d_scores.data_ptr(),
        d_log_likelihood.data_ptr(),
        tuple(map(pointer, kept)),
        torch.get_num_threads(),
        forced_variant(),
    )
    return d_scores, d_log_likelihood


def _room_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Fresh memory, contiguous. empty_like is the faster one, and keeps the strides of what has others."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return torch.empty_like(tensor)
    return torch.empty(tensor.shape, dtype=dtype)


def _in_rows(problem: Problem) -> Problem:
    """The kernel takes log-likelihoods of any strides and nothing else. To be held by its caller: what
    _inputs passes are addresses, which keep nothing alive."""
    scores, log_likelihood, token_mask, doc_mask, log_weight, mode = problem
    return Problem(
        scores.contiguous(),
        log_likelihood,
        contiguous(token_mask),
        contiguous(doc_mask),
        contiguous(log_weight),
        mode,
    )


def _inputs(problem: Problem) -> tuple[object, ...]:
    scores, log_likelihood, token_mask, doc_mask, log_weight, mode = problem
    sizes, strides = tuple(log_likelihood.shape), log_likelihood.stride()
    if len(sizes) == 2:
        sizes, strides = (*sizes, 1), (*strides, 1)
    return (
        array(scores),
        array(log_likelihood),
        array(log_weight),
        pointer(token_mask),
        pointer(doc_mask),
        sizes,
        strides,
        mode == "token",
    )


BACKEND = Backend(name="cpu", refuses=refuses, forward=forward, backward=backward)
