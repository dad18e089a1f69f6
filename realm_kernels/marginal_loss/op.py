"""The torch ops behind marginal_loss: schemas, fake kernels, autograd, choice of the backend.

The loss, its gradient and the gradient of that are three ops. Each works from the inputs alone: nothing is
kept between them but what the caller holds anyway, so a backward may run any number of times.

At the sizes of one training step torch's dispatcher costs more than the kernel behind it. So `call`, the way
of the public function, goes through the ops only where something listens there (`observed`) or another
backend than C++ serves.
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
    loss, count = backend_for(*inputs).forward(*inputs, reduction)
    return loss, count if isinstance(count, Tensor) else torch.tensor(count)


torch.library.impl("realm_kernels::marginal_loss", "CompositeExplicitAutograd")(marginal_loss_fwd)


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


torch.library.impl("realm_kernels::marginal_loss_bwd", "CompositeExplicitAutograd")(marginal_loss_bwd)


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


def call(
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
    reduction: str,
) -> Tensor:
    """The loss, through torch's dispatcher where something listens there and straight to C++ else.

    log_likelihood: [B, K, M] or [B, K].
    """
    inputs = (scores, log_likelihood, token_mask, doc_mask, log_weight, mode)
    if observed(scores, log_likelihood, token_mask, doc_mask, log_weight) or (
        backend_for(*inputs) is not cpu.BACKEND
    ):
        tokens = reference.with_tokens(log_likelihood)
        return torch.ops.realm_kernels.marginal_loss(scores, tokens, *inputs[2:], reduction)[0]
    if torch.is_grad_enabled() and (
        scores.requires_grad
        or log_likelihood.requires_grad
        or (log_weight is not None and log_weight.requires_grad)
    ):
        return _Direct.apply(*inputs, reduction)
    return cpu.forward(*inputs, reduction)[0]


def observed(*tensors: Tensor | None) -> bool:
    """Whether anything but the kernel has to see the op: a compiler, a trace, a transform, a dispatch mode, a
    tensor that is more than one; and any device but the CPU, whose choice is the dispatcher's business."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return True
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and type(tensor) in (Tensor, torch.nn.Parameter)):
            return True
    return False


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.mode, reduction = inputs if len(inputs) == 7 else (*inputs, "none")
    ctx.save_for_backward(*tensors, output[1] if reduction == "mean" else None)
    ctx.mark_non_differentiable(output[1])
    # The backward may run in a thread of its own; what was chosen for the call holds for its gradient too.
    ctx.forced = backends.forced_backend()


def _backward(ctx: Any, d_loss: Tensor, _d_count: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, divisor = ctx.saved_tensors
    return _backward_by_op(ctx, ctx.mode, ctx.forced, d_loss, inputs, divisor)


def _backward_by_op(
    ctx: Any,
    mode: str,
    forced: str | None,
    d_loss: Tensor,
    inputs: Sequence[Tensor | None],
    divisor: Tensor | None,
) -> tuple[Tensor | None, ...]:
    wants_scores, wants_log_likelihood, _, _, wants_log_weight = ctx.needs_input_grad[:5]
    wants_relevance = wants_scores or wants_log_weight
    with backends.use_backend(forced):
        gradients = torch.ops.realm_kernels.marginal_loss_bwd(
            d_loss, *inputs, mode, wants_relevance, wants_log_likelihood, divisor
        )
    return _gradients(ctx.needs_input_grad, 0, inputs, *gradients)


class _Direct(torch.autograd.Function):
    """The autograd of the op without the op, for the C++ backend."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        scores, log_likelihood, _, _, log_weight, mode, reduction = inputs
        wants = ctx.needs_input_grad
        kept = cpu.room_to_keep(scores, log_likelihood, log_weight, mode, wants[0] or wants[4], wants[1])
        loss, count = cpu.BACKEND.forward(*inputs, kept=kept)
        ctx.save_for_backward(*inputs[:5], *kept)
        ctx.plan = mode, backends.forced_backend(), count if reduction == "mean" else None
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, residual, posterior = ctx.saved_tensors
        mode, forced, divisor = ctx.plan
        # With create_graph the gradient itself is differentiated: its op knows how.
        if torch.is_grad_enabled() or observed(d_loss) or forced != backends.forced_backend():
            divisor = torch.tensor(divisor) if isinstance(divisor, int) else divisor
            shape = inputs[1].shape
            inputs[1] = reference.with_tokens(inputs[1])
            gradients = _backward_by_op(ctx, mode, forced, d_loss, inputs, divisor)
            wide = gradients[1]
            return gradients[0], None if wide is None else wide.view(shape), *gradients[2:]
        wants = ctx.needs_input_grad
        needs = wants[0] or wants[4], wants[1]
        assert cpu.BACKEND.backward is not None
        kept = residual, posterior
        found = cpu.BACKEND.backward(d_loss, divisor, *inputs, mode, *needs, kept=kept)
        return _gradients(wants, 0, inputs, *found)


def _gradients(
    wants: tuple[bool, ...],
    first: int,
    inputs: Sequence[Tensor | None],
    d_relevance: Tensor,
    d_log_likelihood: Tensor,
) -> tuple[Tensor | None, ...]:
    """One gradient for each argument, of which scores, log_likelihood .. log_weight begin at `first`."""
    scores, log_likelihood, _, _, log_weight = inputs
    gradients: list[Tensor | None] = [None] * len(wants)
    if wants[first]:
        gradients[first] = cast(d_relevance, scores)
    if wants[first + 1]:
        gradients[first + 1] = cast(d_log_likelihood, log_likelihood)
    if wants[first + 4]:
        gradients[first + 4] = cast(d_relevance, log_weight)
    return tuple(gradients)


def cast(gradient: Tensor, tensor: Tensor | None) -> Tensor:
    """The gradient in the dtype of its input; torch's own cast takes its time also where that is the same."""
    assert tensor is not None
    return gradient if gradient.dtype == tensor.dtype else gradient.to(tensor.dtype)


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
