"""The torch ops behind marginal_loss: schemas, fake kernels, autograd, choice of the backend.

The loss, its gradient and the gradient of that are three ops. Each works from the inputs alone: nothing is
kept between them but what the caller holds anyway, so a backward may run any number of times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from . import checks, cpu, reference
from .reference import result_dtype

BACKENDS = (cpu.BACKEND, reference.BACKEND)

_INPUTS = (
    "Tensor scores, Tensor log_likelihood, Tensor? token_mask, Tensor? doc_mask, Tensor? log_weight, str mode"
)
torch.library.define("realm_kernels::marginal_loss", f"({_INPUTS}) -> (Tensor loss, Tensor count)")
torch.library.define(
    "realm_kernels::marginal_loss_bwd",
    f"(Tensor d_loss, {_INPUTS}, bool needs_scores, bool needs_log_likelihood)"
    " -> (Tensor d_scores, Tensor d_log_likelihood)",
)
torch.library.define(
    "realm_kernels::marginal_loss_bwd_bwd",
    f"(Tensor? v_scores, Tensor? v_log_likelihood, Tensor d_loss, {_INPUTS})"
    " -> (Tensor d_d_loss, Tensor d_scores, Tensor d_log_likelihood)",
)


def backend_for(
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
) -> backends.Backend:
    return backends.choose(
        checks.OP, BACKENDS, scores, log_likelihood, token_mask, doc_mask, log_weight, mode
    )


@torch.library.impl("realm_kernels::marginal_loss", "CompositeExplicitAutograd")
def marginal_loss_fwd(
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """loss [B], zero where nothing is scored; count int64 [B], the examples (0 or 1) or tokens in it."""
    backend = backend_for(scores, log_likelihood, token_mask, doc_mask, log_weight, mode)
    return backend.forward(scores, log_likelihood, token_mask, doc_mask, log_weight, mode)


@torch.library.register_fake("realm_kernels::marginal_loss")
def _(
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
) -> tuple[Tensor, Tensor]:
    batch = scores.shape[0]
    loss = scores.new_empty(batch, dtype=result_dtype(scores, log_likelihood, log_weight))
    return loss, scores.new_empty(batch, dtype=torch.int64)


@torch.library.impl("realm_kernels::marginal_loss_bwd", "CompositeExplicitAutograd")
def marginal_loss_bwd(
    d_loss: Tensor,
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
    needs_scores: bool,
    needs_log_likelihood: bool,
) -> tuple[Tensor, Tensor]:
    inputs = (scores, log_likelihood, token_mask, doc_mask, log_weight, mode)
    backend = backend_for(*inputs)
    assert backend.backward is not None
    return backend.backward(d_loss, *inputs, needs_scores, needs_log_likelihood)


@torch.library.register_fake("realm_kernels::marginal_loss_bwd")
def _(
    d_loss: Tensor,
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
    needs_scores: bool,
    needs_log_likelihood: bool,
) -> tuple[Tensor, Tensor]:
    dtype = result_dtype(scores, log_likelihood, log_weight)
    d_scores = scores.new_empty(scores.shape if needs_scores else (0,), dtype=dtype)
    return d_scores, log_likelihood.new_empty(log_likelihood.shape if needs_log_likelihood else (0,))


# The second derivative is rare: the specification serves it on every device.
torch.library.impl("realm_kernels::marginal_loss_bwd_bwd", "CompositeExplicitAutograd")(
    reference.double_backward
)


@torch.library.register_fake("realm_kernels::marginal_loss_bwd_bwd")
def _(
    v_scores: Tensor | None,
    v_log_likelihood: Tensor | None,
    d_loss: Tensor,
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = result_dtype(scores, log_likelihood, log_weight)
    d_scores = scores.new_empty(scores.shape, dtype=dtype)
    return (
        d_loss.new_empty(d_loss.shape, dtype=dtype),
        d_scores,
        log_likelihood.new_empty(log_likelihood.shape),
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.mode = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])
    # The backward may run in a thread of its own; what was chosen for the call holds for its gradient too.
    ctx.forced = backends.forced_backend()


def _backward(ctx: Any, d_loss: Tensor, _d_count: Tensor) -> tuple[Tensor | None, ...]:
    scores, log_likelihood, token_mask, doc_mask, log_weight = ctx.saved_tensors
    wants_scores, wants_log_likelihood, _, _, wants_log_weight, _ = ctx.needs_input_grad
    with backends.use_backend(ctx.forced):
        d_scores, d_log_likelihood = torch.ops.realm_kernels.marginal_loss_bwd(
            d_loss,
            *ctx.saved_tensors,
            ctx.mode,
            wants_scores or wants_log_weight,
            wants_log_likelihood,
        )
    return (
        d_scores.to(scores.dtype) if wants_scores else None,
        d_log_likelihood if wants_log_likelihood else None,
        None,
        None,
        d_scores.to(log_weight.dtype) if wants_log_weight else None,
        None,
    )


torch.library.register_autograd("realm_kernels::marginal_loss", _backward, setup_context=_save_inputs)


def _save_backward_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.mode, ctx.needs_scores, ctx.needs_log_likelihood = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, v_scores: Tensor, v_log_likelihood: Tensor) -> tuple[Tensor | None, ...]:
    d_loss, scores, log_likelihood, token_mask, doc_mask, log_weight = ctx.saved_tensors
    d_d_loss, d_scores, d_log_likelihood = torch.ops.realm_kernels.marginal_loss_bwd_bwd(
        v_scores if ctx.needs_scores else None,
        v_log_likelihood if ctx.needs_log_likelihood else None,
        *ctx.saved_tensors,
        ctx.mode,
    )
    wants_g, wants_scores, wants_log_likelihood, _, _, wants_log_weight, *_ = ctx.needs_input_grad
    return (
        d_d_loss.to(d_loss.dtype) if wants_g else None,
        d_scores.to(scores.dtype) if wants_scores else None,
        d_log_likelihood if wants_log_likelihood else None,
        None,
        None,
        d_scores.to(log_weight.dtype) if wants_log_weight else None,
        None,
        None,
        None,
    )


torch.library.register_autograd(
    "realm_kernels::marginal_loss_bwd", _double_backward, setup_context=_save_backward_inputs
)


def _twice(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(f"{checks.OP}: third derivatives are not offered")


torch.library.register_autograd("realm_kernels::marginal_loss_bwd_bwd", _twice)
