"""The torch ops behind span_marginal_loss: schemas, fake kernels, autograd, choice of the backend.

The loss, its gradient and the gradient of that are three ops. What the forward learned of each document,
four float64 numbers, is its third result, so that the backward reads each span once more and finds nothing
twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..marginal_loss.cpu import cast, serves_tensors_here
from ..marginal_loss.op import Direct, observed
from . import checks, cpu, reference, triton
from .problem import Problem

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


def backend_for(problem: Problem) -> backends.Backend:
    return backends.choose(checks.OP, BACKENDS, problem)


def span_marginal_loss_fwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem, reduction = _problem_and_reduction(arguments)
    loss, count, kept = backend_for(problem).forward(problem, reduction)
    return loss, count if isinstance(count, Tensor) else torch.tensor(count), kept


torch.library.impl("realm_kernels::span_marginal_loss", "CompositeExplicitAutograd")(span_marginal_loss_fwd)


def _problem_and_reduction(arguments: Sequence[Any]) -> tuple[Problem, str]:
    """torch leaves out what is the default."""
    inputs = len(Problem._fields)
    return Problem(*arguments[:inputs]), arguments[inputs] if len(arguments) > inputs else "none"


@torch.library.register_fake("realm_kernels::span_marginal_loss")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem, reduction = _problem_and_reduction(arguments)
    scores = problem.scores
    shape = scores.shape[:1] if reduction == "none" else ()
    loss = scores.new_empty(shape, dtype=problem.loss_dtype)
    kept = scores.new_empty((4, *scores.shape), dtype=torch.float64)
    return loss, scores.new_empty(shape, dtype=torch.int64), kept


def span_marginal_loss_bwd(
    d_loss: Tensor, count: Tensor | None, kept: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    *inputs, needs_scores, needs_span_scores = arguments
    problem = Problem(*inputs)
    backend = backend_for(problem)
    assert backend.backward is not None
    return backend.backward(d_loss, count, kept, problem, needs_scores, needs_span_scores)


torch.library.impl("realm_kernels::span_marginal_loss_bwd", "CompositeExplicitAutograd")(
    span_marginal_loss_bwd
)


@torch.library.register_fake("realm_kernels::span_marginal_loss_bwd")
def _(d_loss: Tensor, count: Tensor | None, kept: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, needs_scores, needs_span_scores = arguments
    problem = Problem(*inputs)
    scores, span_scores = problem.scores, problem.span_scores
    d_scores = scores.new_empty(scores.shape if needs_scores else (0,), dtype=problem.loss_dtype)
    return d_scores, span_scores.new_empty(span_scores.shape if needs_span_scores else (0,))


# The second derivative is rare: the specification serves it on every device.
def span_marginal_loss_bwd_bwd(
    v_scores: Tensor | None,
    v_span_scores: Tensor | None,
    d_loss: Tensor,
    count: Tensor | None,
    kept: Tensor,
    *inputs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.double_backward(v_scores, v_span_scores, d_loss, count, kept, Problem(*inputs))


torch.library.impl("realm_kernels::span_marginal_loss_bwd_bwd", "CompositeExplicitAutograd")(
    span_marginal_loss_bwd_bwd
)


@torch.library.register_fake("realm_kernels::span_marginal_loss_bwd_bwd")
def _(
    v_scores: Tensor | None,
    v_span_scores: Tensor | None,
    d_loss: Tensor,
    count: Tensor | None,
    kept: Tensor,
    *inputs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(*inputs)
    return (
        d_loss.new_empty(d_loss.shape, dtype=problem.loss_dtype),
        problem.scores.new_empty(problem.scores.shape, dtype=problem.loss_dtype),
        problem.span_scores.new_empty(problem.span_scores.shape),
    )


def call(problem: Problem, reduction: str) -> Tensor:
    """The loss: by torch's dispatcher where something listens there or another backend than C++ serves,
    straight to C++ else."""
    tensors = problem[:6]
    if observed(*tensors) or not serves_tensors_here():
        return torch.ops.realm_kernels.span_marginal_loss(*problem, reduction)[0]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Direct.apply(*problem, reduction)  # type: ignore[attr-defined]
    return cpu.forward(problem, reduction)[0]


class _Direct(Direct):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        problem, reduction = _problem_and_reduction(arguments)
        loss, count, kept = cpu.forward(problem, reduction)
        ctx.save_for_backward(kept, *problem[:6])
        ctx.plan = problem.normalization, backends.forced_backend(), count if reduction == "mean" else None
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        normalization, forced, count = ctx.plan
        # With create_graph the gradient itself is differentiated: its op knows how.
        if torch.is_grad_enabled() or observed(d_loss) or forced != backends.forced_backend():
            count = torch.tensor(count) if isinstance(count, int) else count
            return _backward_by_op(ctx, d_loss, count, normalization, forced)
        wants = ctx.needs_input_grad
        kept, *tensors = ctx.saved_tensors
        problem = Problem._make([*tensors, normalization])
        assert cpu.BACKEND.backward is not None
        found = cpu.BACKEND.backward(d_loss, count, kept, problem, wants[0] or wants[5], wants[1])
        return _gradients(wants, 0, problem, *found)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    problem, reduction = _problem_and_reduction(inputs)
    ctx.save_for_backward(output[2], *problem[:6], output[1] if reduction == "mean" else None)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    # The backward may run in a thread of its own; what was chosen for the call holds for its gradient too.
    ctx.normalization, ctx.forced = problem.normalization, backends.forced_backend()


def _backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    return _backward_by_op(ctx, d_loss, ctx.saved_tensors[7], ctx.normalization, ctx.forced)


def _backward_by_op(
    ctx: Any, d_loss: Tensor, count: Tensor | None, normalization: str, forced: str | None
) -> tuple[Tensor | None, ...]:
    wants = ctx.needs_input_grad
    kept, *tensors = ctx.saved_tensors[:7]
    problem, needs = Problem._make([*tensors, normalization]), (wants[0] or wants[5], wants[1])
    with backends.use_backend(forced):
        found = torch.ops.realm_kernels.span_marginal_loss_bwd(d_loss, count, kept, *problem, *needs)
    return _gradients(wants, 0, problem, *found)


def _gradients(
    wants: tuple[bool, ...], first: int, problem: Problem, d_relevance: Tensor, d_span_scores: Tensor
) -> tuple[Tensor | None, ...]:
    """One gradient for each argument, of which the problem's begin at `first`."""
    gradients: list[Tensor | None] = [None] * len(wants)
    if wants[first]:
        gradients[first] = cast(d_relevance, problem.scores.dtype)
    if wants[first + 1]:
        gradients[first + 1] = cast(d_span_scores, problem.span_scores.dtype)
    if wants[first + 5]:
        assert problem.log_weight is not None
        gradients[first + 5] = cast(d_relevance, problem.log_weight.dtype)
    return tuple(gradients)


torch.library.register_autograd("realm_kernels::span_marginal_loss", _backward, setup_context=_save_inputs)


def _save_backward_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.normalization, needs_scores, needs_span_scores = inputs
    ctx.needs = needs_scores, needs_span_scores
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:
    """kept is of the inputs, so what goes through it goes to them: it has no gradient of its own."""
    d_loss, count, kept, *tensors = ctx.saved_tensors
    problem = Problem._make([*tensors, ctx.normalization])
    needed = (v if need else None for v, need in zip(directions, ctx.needs, strict=True))
    d_d_loss, *found = torch.ops.realm_kernels.span_marginal_loss_bwd_bwd(
        *needed, d_loss, count, kept, *problem
    )
    wants = ctx.needs_input_grad
    return (d_d_loss.to(d_loss.dtype) if wants[0] else None, *_gradients(wants, 3, problem, *found)[1:])


torch.library.register_autograd(
    "realm_kernels::span_marginal_loss_bwd", _double_backward, setup_context=_save_backward_inputs
)


def _thrice(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(f"{checks.OP}: third derivatives are not offered")


torch.library.register_autograd("realm_kernels::span_marginal_loss_bwd_bwd", _thrice)
