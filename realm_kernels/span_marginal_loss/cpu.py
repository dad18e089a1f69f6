"""The C++ backend of span_marginal_loss: each span read from memory once a pass (csrc/cpu/span_evidence*)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..backends import Backend, forced_variant
from ..marginal_loss.cpu import array, cast, contiguous, pointer
from .problem import Problem


def refuses(problem: Problem) -> str | None:
    if not problem.scores.is_cpu:
        return f"the arguments are on {problem.scores.device}"
    if native.cpu is None:
        return native.cpu_missing
    return None


def forward(
    problem: Problem,
    reduction: str,
) -> tuple[Tensor, Tensor | int, Tensor]:
    """As reference.forward; count is a number where it is one of all examples."""
    assert native.cpu is not None
    per_example = problem.scores.shape[:1] if reduction == "none" else None
    kept = torch.empty((4, *problem.scores.shape), dtype=torch.float64)
    loss = torch.empty(per_example or (), dtype=problem.loss_dtype)
    count = None if per_example is None else torch.empty(per_example, dtype=torch.int64)
    problem = _in_rows(problem)
    total = native.cpu.span_marginal_loss_fwd(
        *_inputs(problem),
        reduction,
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
    problem: Problem,
    needs_scores: bool,
    needs_span_scores: bool,
) -> tuple[Tensor, Tensor]:
    assert native.cpu is not None
    scores, span_scores, dtype = problem.scores, problem.span_scores, problem.loss_dtype
    d_scores = torch.empty(scores.shape if needs_scores else (0,), dtype=dtype)
    d_span_scores = torch.empty(span_scores.shape if needs_span_scores else (0,), dtype=span_scores.dtype)
    d_loss, kept = cast(d_loss, dtype).contiguous(), kept.contiguous()
    problem = _in_rows(problem)
    native.cpu.span_marginal_loss_bwd(
        *_inputs(problem),
        "none" if d_loss.dim() == 1 else "sum" if count is None else "mean",
        kept.data_ptr(),
        array(d_loss),
        1 if count is None else int(count),
        d_scores.data_ptr(),
        d_span_scores.data_ptr(),
        torch.get_num_threads(),
        forced_variant(),
    )
    return d_scores, d_span_scores


def _in_rows(problem: Problem) -> Problem:
    """To be held by its caller: what _inputs passes are addresses, which keep nothing alive."""
    scores, span_scores, correct, valid, doc_mask, log_weight, normalization = problem
    return Problem(
        scores.contiguous(),
        span_scores.contiguous(),
        correct.contiguous(),
        contiguous(valid),
        contiguous(doc_mask),
        contiguous(log_weight),
        normalization,
    )


def _inputs(problem: Problem) -> tuple[object, ...]:
    scores, span_scores, correct, valid, doc_mask, log_weight, _ = problem
    return (
        array(scores),
        array(log_weight),
        pointer(doc_mask),
        array(span_scores),
        pointer(correct),
        pointer(valid),
        tuple(span_scores.shape),
        problem.is_global,
    )


BACKEND = Backend(name="cpu", refuses=refuses, forward=forward, backward=backward)
