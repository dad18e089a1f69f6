"""The torch ops behind span_marginal_loss: schemas, fake kernels, autograd, choice of the backend.

The loss, its gradient and the gradient of that are three ops. What the forward learned of each document,
four float64 numbers, is its third result, so that the backward reads each span once more and finds nothing
twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..marginal_loss.op import cast, observed
from ..marginal_loss.reference import result_dtype
from . import checks, cpu, reference, triton

BACKENDS = (cpu.BACKEND, triton.BACKEND, reference.BACKEND)

_INPUTS = (
    "Tensor scores, Tensor span_scores, Tensor correct, Tensor? valid, Tensor? doc_mask, Tensor? log_weight, "
    "str normalization"
)
torch.library.define(
    "realm_kernels::span_marginal_loss",
    f"({_INPUTS}, str reduction='none') -> (Tensor loss, Tensor count, Tensor kept)",
)
torch.library.define(
    "realm_kernels::span_marginal_loss_bwd",
    f"(Tensor d_loss, Tensor? count, Tensor kept, {_INPUTS}, bool needs_scores, bool needs_span_scores)"
    " -> (Tensor d_scores, Tensor d_span_scores)",
)
torch.library.define(
    "realm_kernels::span_marginal_loss_bwd_bwd",
    f"(Tensor? v_scores, Tensor? v_span_scores, Tensor d_loss, Tensor? count, Tensor kept, {_INPUTS})"
    " -> (Tensor d_d_loss, Tensor d_scores, Tensor d_span_scores)",
)


def backend_for(*inputs: Any) -> backends.Backend:
    """inputs: scores, span_scores, correct, valid, doc_mask, log_weight, normalization."""
    return backends.choose(checks.OP, BACKENDS, *inputs)


def span_marginal_loss_fwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """loss, count and kept: the inputs of the schema, in its order."""
    *inputs, reduction = arguments if len(arguments) == 8 else (*arguments, "none")
    loss, count, kept = backend_for(*inputs).forward(*inputs, reduction)
    return loss, count if isinstance(count, Tensor) else torch.tensor(count), kept


torch.library.impl("realm_kernels::span_marginal_loss", "CompositeExplicitAutograd")(span_marginal_loss_fwd)


@torch.library.register_fake("realm_kernels::span_marginal_loss")
def _(
    scores: Tensor,
    span_scores: Tensor,
    correct: Tensor,
    valid: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    normalization: str,
    reduction: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    shape = scores.shape[:1] if reduction == "none" else ()
    loss = scores.new_empty(shape, dtype=result_dtype(scores, span_scores, log_weight))
    kept = scores.new_empty((4, *scores.shape), dtype=torch.float64)
    return loss, scores.new_empty(shape, dtype=torch.int64), kept


def span_marginal_loss_bwd(
    d_loss: Tensor, count: Tensor | None, kept: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    *inputs, needs_scores, needs_span_scores = arguments
    backend = backend_for(*inputs)
    assert backend.backward is not None
    return backend.backward(d_loss, count, kept, *inputs, needs_scores, needs_span_scores)


torch.library.impl("realm_kernels::span_marginal_loss_bwd", "CompositeExplicitAutograd")(
    span_marginal_loss_bwd
)


@torch.library.register_fake("realm_kernels::span_marginal_loss_bwd")
def _(
    d_loss: Tensor,
    count: Tensor | None,
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
    dtype = result_dtype(scores, span_scores, log_weight)
    d_scores = scores.new_empty(scores.shape if needs_scores else (0,), dtype=dtype)
    return d_scores, span_scores.new_empty(span_scores.shape if needs_span_scores else (0,))


# The second derivative is rare: the specification serves it on every device.
torch.library.impl("realm_kernels::span_marginal_loss_bwd_bwd", "CompositeExplicitAutograd")(
    reference.double_backward
)


@torch.library.register_fake("realm_kernels::span_marginal_loss_bwd_bwd")
def _(
    v_scores: Tensor | None,
    v_span_scores: Tensor | None,
    d_loss: Tensor,
    count: Tensor | None,
    kept: Tensor,
    scores: Tensor,
    span_scores: Tensor,
    correct: Tensor,
    valid: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    normalization: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = result_dtype(scores, span_scores, log_weight)
    return (
        d_loss.new_empty(d_loss.shape, dtype=dtype),
        scores.new_empty(scores.shape, dtype=dtype),
        span_scores.new_empty(span_scores.shape),
    )


def call(*arguments: Any) -> Tensor:
    """The loss of the arguments of the schema: by torch's dispatcher where something listens there or another
    backend than C++ serves, straight to C++ else."""
    *inputs, normalization, reduction = arguments
    if observed(*inputs) or backend_for(*inputs, normalization) is not cpu.BACKEND:
        return torch.ops.realm_kernels.span_marginal_loss(*arguments)[0]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _Direct.apply(*arguments)
    return cpu.forward(*arguments)[0]


class _Direct(torch.autograd.Function):
    """The autograd of the op without the op, for the C++ backend."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        loss, count, kept = cpu.forward(*arguments)
        ctx.save_for_backward(kept, *arguments[:6])
        ctx.plan = arguments[6], backends.forced_backend(), count if arguments[7] == "mean" else None
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        normalization, forced, count = ctx.plan
        # With create_graph the gradient itself is differentiated: its op knows how.
        if torch.is_grad_enabled() or observed(d_loss) or forced != backends.forced_backend():
            count = torch.tensor(count) if isinstance(count, int) else count
            return _backward_by_op(ctx, d_loss, count, normalization, forced)
        wants = ctx.needs_input_grad
        kept, *inputs = ctx.saved_tensors
        assert cpu.BACKEND.backward is not None
        found = cpu.BACKEND.backward(
            d_loss, count, kept, *inputs, normalization, wants[0] or wants[5], wants[1]
        )
        return _gradients(wants, 0, inputs, *found)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    reduction = inputs[7] if len(inputs) > 7 else "none"
    ctx.save_for_backward(output[2], *inputs[:6], output[1] if reduction == "mean" else None)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    # The backward may run in a thread of its own; what was chosen for the call holds for its gradient too.
    ctx.normalization, ctx.forced = inputs[6], backends.forced_backend()


def _backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    return _backward_by_op(ctx, d_loss, ctx.saved_tensors[7], ctx.normalization, ctx.forced)


def _backward_by_op(
    ctx: Any, d_loss: Tensor, count: Tensor | None, normalization: str, forced: str | None
) -> tuple[Tensor | None, ...]:
    wants = ctx.needs_input_grad
    kept, *inputs = ctx.saved_tensors[:7]
    with backends.use_backend(forced):
        found = torch.ops.realm_kernels.span_marginal_loss_bwd(
            d_loss, count, kept, *inputs, normalization, wants[0] or wants[5], wants[1]
        )
    return _gradients(wants, 0, inputs, *found)


def _gradients(
    wants: tuple[bool, ...], first: int, inputs: Any, d_relevance: Tensor, d_span_scores: Tensor
) -> tuple[Tensor | None, ...]:
    """One gradient for each argument, of which scores, span_scores .. log_weight begin at `first`."""
    gradients: list[Tensor | None] = [None] * len(wants)
    for place, gradient in ((0, d_relevance), (1, d_span_scores), (5, d_relevance)):
        if wants[first + place]:
            gradients[first + place] = cast(gradient, inputs[place])
    return tuple(gradients)


torch.library.register_autograd("realm_kernels::span_marginal_loss", _backward, setup_context=_save_inputs)


def _save_backward_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.normalization, ctx.needs_scores, ctx.needs_span_scores = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, v_scores: Tensor, v_span_scores: Tensor) -> tuple[Tensor | None, ...]:
    """kept is of the inputs, so what goes through it goes to them: it has no gradient of its own."""
    d_loss, count, kept, *inputs = ctx.saved_tensors
    d_d_loss, d_relevance, d_span_scores = torch.ops.realm_kernels.span_marginal_loss_bwd_bwd(
        v_scores if ctx.needs_scores else None,
        v_span_scores if ctx.needs_span_scores else None,
        d_loss,
        count,
        kept,
        *inputs,
        ctx.normalization,
    )
    gradients = _gradients(ctx.needs_input_grad, 3, inputs, d_relevance, d_span_scores)
    return (d_d_loss.to(d_loss.dtype) if ctx.needs_input_grad[0] else None, *gradients[1:])


torch.library.register_autograd(
    "realm_kernels::span_marginal_loss_bwd", _double_backward, setup_context=_save_backward_inputs
)


def _thrice(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(f"{checks.OP}: third derivatives are not offered")


torch.library.register_autograd("realm_kernels::span_marginal_loss_bwd_bwd", _thrice)
