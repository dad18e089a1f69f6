"""The CUDA C++ backend of marginal_loss: one block an example, float64 inside (csrc/cuda/marginal_loss*).

Reached by use_backend("cuda") only: it is compiled, and has not run on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..backends import Backend
from ..validation import dtype_name
from . import reference
from .problem import Problem


def refuses(problem: Problem) -> str | None:
    return native.cuda_unusable() or (
        None if problem.scores.is_cuda else f"the arguments are on {problem.scores.device}"
    )


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _launch(
    log_prior: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    scored: Tensor,
    mode: str,
    *,
    loss: Tensor | None = None,
    d_loss: Tensor | None = None,
    d_scores: Tensor | None = None,
    d_log_likelihood: Tensor | None = None,
) -> None:
    assert native.cuda is not None
    if log_likelihood.shape[0] == 0:
        return
    token_mask = None if token_mask is None else token_mask.contiguous()
    evidence = torch.empty_like(log_prior)
    stream = torch.cuda.current_stream(log_likelihood.device).cuda_stream
    with torch.cuda.device(log_likelihood.device):
        native.cuda.marginal_loss(
            log_prior.data_ptr(),
            log_likelihood.data_ptr(),
            dtype_name(log_likelihood.dtype),
            tuple(log_likelihood.shape),
            log_likelihood.stride(),
            _pointer(token_mask),
            scored.data_ptr(),
            mode == "token",
            evidence.data_ptr(),
            _pointer(loss),
            _pointer(d_loss),
            _pointer(d_scores),
            _pointer(d_log_likelihood),
            stream,
        )


def forward(
    problem: Problem,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    scores, log_likelihood, token_mask, doc_mask, log_weight, mode = problem
    log_prior = reference.log_prior(scores, doc_mask, log_weight).contiguous()
    scored = reference.scored_columns(log_prior, log_likelihood, token_mask, mode).contiguous()
    loss, count = log_prior.new_empty(scores.shape[0]), scored.sum(1)
    _launch(log_prior, log_likelihood, token_mask, scored, mode, loss=loss)
    total = count if reduction == "none" else count.sum()
    return reference.reduce(loss, count, reduction).to(problem.loss_dtype), total


def backward(
    d_loss: Tensor,
    count: Tensor | None,
    problem: Problem,
    needs_scores: bool,
    needs_log_likelihood: bool,
) -> tuple[Tensor, Tensor]:
    scores, log_likelihood, token_mask, doc_mask, log_weight, mode = problem
    log_prior = reference.log_prior(scores, doc_mask, log_weight).contiguous()
    scored = reference.scored_columns(log_prior, log_likelihood, token_mask, mode).contiguous()
    g = d_loss.double() if count is None else d_loss.double() / count.clamp(min=1)
    d_scores = torch.empty_like(log_prior) if needs_scores else log_prior.new_empty(0)
    d_log_likelihood = torch.empty(
        log_likelihood.shape if needs_log_likelihood else (0,),
        dtype=log_likelihood.dtype,
        device=log_likelihood.device,
    )
    _launch(
        log_prior,
        log_likelihood,
        token_mask,
        scored,
        mode,
        d_loss=g.expand(scores.shape[0]).contiguous(),
        d_scores=d_scores if needs_scores else None,
        d_log_likelihood=d_log_likelihood if needs_log_likelihood else None,
    )
    return d_scores.to(problem.loss_dtype), d_log_likelihood


BACKEND = Backend(name="cuda", refuses=refuses, forward=forward, backward=backward, default=False)
