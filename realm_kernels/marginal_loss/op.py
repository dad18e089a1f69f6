"""The torch ops behind marginal_loss: schemas, fake kernels, autograd, choice of the backend.

The loss, its gradient and the gradient of that are three ops. Each works from the inputs alone: nothing is
kept between them but what the caller holds anyway, so a backward may run any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from . import checks, cpu, cuda, reference, triton
from .reference import result_dtype

BACKENDS = (cpu.BACKEND, cuda.BACKEND, triton.BACKEND, reference.BACKEND)

_INPUTS = (
    "Tensor scores, Tensor log_likelihood, Tensor? token_mask, Tensor? doc_mask, Tensor? log_weight, str mode"
)
torch.library.define(
    "realm_kernels::marginal_loss", f"({_INPUTS}, str reduction='none') -> (Tensor loss, Tensor count)"
)
torch.library.define(
    "realm_kernels::marginal_loss_bwd",
    f"(Tensor d_loss, {_INPUTS}, bool needs_scores, bool needs_log_likelihood, Tensor? count=None)"
    " -> (Tensor d_scores, Tensor d_log_likelihood)",
)
torch.library.define(
    "realm_kernels::marginal_loss_bwd_bwd",
    f"(Tensor? v_scores, Tensor? v_log_likelihood, Tensor d_loss, {_INPUTS}, Tensor? count)"
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
    reduction: str = "none",
) -> tuple[Tensor, Tensor]:
    """loss and count, the examples or tokens it sums: [B] each for reduction "none", else one number each."""
    inputs = (scores, log_likelihood, token_mask, doc_mask, log_weight, mode)
    return backend_for(*inputs).forward(*inputs, reduction)


@torch.library.register_fake("realm_kernels::marginal_loss")
def _(
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
    reduction: str = "none",
) -> tuple[Tensor, Tensor]:
    shape = scores.shape[:1] if reduction == "none" else ()
    loss = scores.new_empty(shape, dtype=result_dtype(scores, log_likelihood, log_weight))
    return loss, scores.new_empty(shape, dtype=torch.int64)


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
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    inputs = (scores, log_likelihood, token_mask, doc_mask, log_weight, mode)
    backend = backend_for(*inputs)
    assert backend.backward is not None
    return backend.backward(d_loss, count, *inputs, needs_scores, needs_log_likelihood)


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
    count: Tensor | None = None,
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
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = result_dtype(scores, log_likelihood, log_weight)
    d_scores = scores.new_empty(scores.shape, dtype=dtype)
    return (
        d_loss.new_empty(d_loss.shape, dtype=dtype),
        d_scores,
        log_likelihood.new_empty(log_likelihood.shape),
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, log_likelihood, token_mask, doc_mask, log_weight, ctx.mode, *reduction = inputs
    count = output[1]
    divisor = count if reduction == ["mean"] else None
    ctx.save_for_backward(scores, log_likelihood, token_mask, doc_mask, log_weight, divisor)
    ctx.mark_non_differentiable(count)
    # The backward may run in a thread of its own; what was chosen for the call holds for its gradient too.
    ctx.forced = backends.forced_backend()


def _backward(ctx: Any, d_loss: Tensor, _d_count: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, divisor = ctx.saved_tensors
    wants_scores, wants_log_likelihood, _, _, wants_log_weight = ctx.needs_input_grad[:5]
    wants_relevance = wants_scores or wants_log_weight
    with backends.use_backend(ctx.forced):
        d_relevance, d_log_likelihood = torch.ops.realm_kernels.marginal_loss_bwd(
            d_loss, *inputs, ctx.mode, wants_relevance, wants_log_likelihood, divisor
        )
    return _gradients(ctx.needs_input_grad, 0, inputs, d_relevance, d_log_likelihood)


def _gradients(
    wants: tuple[bool, ...],
    first: int,
    inputs: Sequence[Tensor | None],
    d_relevance: Tensor,
    d_log_likelihood: Tensor,
) -> tuple[Tensor | None, ...]:
    """One gradient for each argument, of which scores, log_likelihood .. log_weight begin at `first`."""
    gradients: list[Tensor | None] = [None] * len(wants)
    for offset, gradient in ((0, d_relevance), (1, d_log_likelihood), (4, d_relevance)):
        if wants[first + offset]:
            tensor = inputs[offset]
            assert tensor is not None
            gradients[first + offset] = gradient.to(tensor.dtype)
    return tuple(gradients)


torch.library.register_autograd("realm_kernels::marginal_loss", _backward, setup_context=_save_inputs)


def _save_backward_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.mode, ctx.needs_scores, ctx.needs_log_likelihood = inputs[:9]
    ctx.save_for_backward(*tensors, inputs[9] if len(inputs) > 9 else None)


def _double_backward(ctx: Any, v_scores: Tensor, v_log_likelihood: Tensor) -> tuple[Tensor | None, ...]:
    d_loss, *inputs, divisor = ctx.saved_tensors
    d_d_loss, d_relevance, d_log_likelihood = torch.ops.realm_kernels.marginal_loss_bwd_bwd(
        v_scores if ctx.needs_scores else None,
        v_log_likelihood if ctx.needs_log_likelihood else None,
        d_loss,
        *inputs,
        ctx.mode,
        divisor,
    )
    gradients = _gradients(ctx.needs_input_grad, 1, inputs, d_relevance, d_log_likelihood)
    return (d_d_loss.to(d_loss.dtype) if ctx.needs_input_grad[0] else None, *gradients[1:])


torch.library.register_autograd(
    "realm_kernels::marginal_loss_bwd", _double_backward, setup_context=_save_backward_inputs
)


def _twice(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(f"{checks.OP}: third derivatives are not offered")


torch.library.register_autograd("realm_kernels::marginal_loss_bwd_bwd", _twice)
