"""The torch ops behind marginal_loss: schemas, fake kernels, autograd, choice of the backend.

The loss, its gradient and the gradient of that are three ops. Each works from the inputs alone: nothing is
kept between them but what the caller holds anyway, so a backward may run any number of times.

At the sizes of one training step torch's dispatcher costs more than the kernel behind it. So `call`, the way
of the public function, goes through the ops only where something listens there (`observed`) or another
backend than C++ serves; else `_Direct` keeps what the backward scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_dead_tensor_wrapper  # type: ignore[attr-defined]

from .. import backends
from . import checks, cpu, cuda, reference, triton
from .problem import Problem

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


def backend_for(problem: Problem) -> backends.Backend:
    return backends.choose(checks.OP, BACKENDS, problem)


def marginal_loss_fwd(*arguments: Any) -> tuple[Tensor, Tensor]:
    """loss and count, the examples or tokens it sums: [B] each for reduction "none", else one number each."""
    problem, (reduction,) = _split(arguments, ("none",))
    loss, count = backend_for(problem).forward(problem, reduction)
    return loss, count if isinstance(count, Tensor) else torch.tensor(count)


torch.library.impl("realm_kernels::marginal_loss", "CompositeExplicitAutograd")(marginal_loss_fwd)


# Behind the inputs in the backward's schema: needs_scores, needs_log_likelihood, count. The last may lack.
_NEEDS = (True, True, None)


def _split(arguments: Sequence[Any], defaults: tuple[Any, ...]) -> tuple[Problem, tuple[Any, ...]]:
    """The inputs of a schema and what comes behind them; torch leaves out what is the default."""
    inputs = len(Problem._fields)
    rest = tuple(arguments[inputs:])
    return Problem(*arguments[:inputs]), rest + defaults[len(rest) :]


@torch.library.register_fake("realm_kernels::marginal_loss")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem, (reduction,) = _split(arguments, ("none",))
    shape = problem.scores.shape[:1] if reduction == "none" else ()
    loss = problem.scores.new_empty(shape, dtype=problem.loss_dtype)
    return loss, problem.scores.new_empty(shape, dtype=torch.int64)


def marginal_loss_bwd(d_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    problem, (*needs, count) = _split(arguments, _NEEDS)
    backend = backend_for(problem)
    assert backend.backward is not None
    return backend.backward(d_loss, count, problem, *needs)


torch.library.impl("realm_kernels::marginal_loss_bwd", "CompositeExplicitAutograd")(marginal_loss_bwd)


@torch.library.register_fake("realm_kernels::marginal_loss_bwd")
def _(d_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    problem, (needs_scores, needs_log_likelihood, _) = _split(arguments, _NEEDS)
    scores, log_likelihood = problem.scores, problem.log_likelihood
    d_scores = scores.new_empty(scores.shape if needs_scores else (0,), dtype=problem.loss_dtype)
    return d_scores, log_likelihood.new_empty(log_likelihood.shape if needs_log_likelihood else (0,))


# The second derivative is rare: the specification serves it on every device.
def marginal_loss_bwd_bwd(
    v_scores: Tensor | None, v_log_likelihood: Tensor | None, d_loss: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    problem, (count,) = _split(arguments, (None,))
    return reference.double_backward(v_scores, v_log_likelihood, d_loss, count, problem)


torch.library.impl("realm_kernels::marginal_loss_bwd_bwd", "CompositeExplicitAutograd")(marginal_loss_bwd_bwd)


@torch.library.register_fake("realm_kernels::marginal_loss_bwd_bwd")
def _(
    v_scores: Tensor | None, v_log_likelihood: Tensor | None, d_loss: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    problem, _ = _split(arguments, (None,))
    scores, log_likelihood = problem.scores, problem.log_likelihood
    return (
        d_loss.new_empty(d_loss.shape, dtype=problem.loss_dtype),
        scores.new_empty(scores.shape, dtype=problem.loss_dtype),
        log_likelihood.new_empty(log_likelihood.shape),
    )


def call(problem: Problem, reduction: str) -> Tensor:
    """The loss, through torch's dispatcher where something listens there and straight to C++ else.

    log_likelihood: [B, K, M] or [B, K].
    """
    scores, log_likelihood, _, _, log_weight, _ = problem
    if observed(*problem[:5]) or not cpu.serves_tensors_here():
        return torch.ops.realm_kernels.marginal_loss(*problem.with_tokens(), reduction)[0]
    if torch.is_grad_enabled() and (
        scores.requires_grad
        or log_likelihood.requires_grad
        or (log_weight is not None and log_weight.requires_grad)
    ):
        return _Direct.apply(scores, log_likelihood, log_weight, problem, reduction)  # type: ignore[attr-defined]
    return cpu.forward(problem, reduction)[0]


_PLAIN = (Tensor, torch.nn.Parameter)


def observed(*tensors: Tensor | None) -> bool:
    """Whether anything but the kernel has to see the op: a compiler, a trace, a transform, a dispatch mode, a
    tensor that is more than one, or less, as one that outlived its transform and has no memory of its own;
    and any device but the CPU, whose choice is the dispatcher's business."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return True
    for tensor in tensors:  # noqa: SIM110  (a generator takes twice as long)
        if tensor is not None and not (
            tensor.is_cpu and type(tensor) in _PLAIN and not is_dead_tensor_wrapper(tensor)
        ):
            return True
    return False


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.mode, reduction = inputs if len(inputs) == 7 else (*inputs, "none")
    ctx.save_for_backward(*tensors, output[1] if reduction == "mean" else None)
    ctx.mark_non_differentiable(output[1])
    # The backward may run in a thread of its own; what was chosen for the call holds for its gradient too.
    ctx.forced = backends.forced_backend()


def _backward(ctx: Any, d_loss: Tensor, _d_count: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, divisor = ctx.saved_tensors
    problem, wants = Problem._make([*tensors, ctx.mode]), ctx.needs_input_grad
    needs = wants[0] or wants[4], wants[1]
    with backends.use_backend(ctx.forced):
        gradients = torch.ops.realm_kernels.marginal_loss_bwd(d_loss, *problem, *needs, divisor)
    return _gradients(wants, 0, problem, *gradients)


class Direct(torch.autograd.function._SingleLevelFunction):
    """The autograd of an op without the op, for the C++ backend: torch.autograd.Function without its look
    at transforms, which `observed` has taken."""


class _Direct(Direct):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        log_likelihood: Tensor,
        log_weight: Tensor | None,
        problem: Problem,
        reduction: str,
    ) -> Tensor:
        wants = ctx.needs_input_grad
        kept = cpu.room_to_keep(problem, wants[0] or wants[2], wants[1])
        loss, count = cpu.forward(problem, reduction, kept=kept)
        ctx.save_for_backward(*problem[:5], *kept)
        ctx.plan = problem.mode, backends.forced_backend(), count if reduction == "mean" else None
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        mode, forced, divisor = ctx.plan
        problem, wants = Problem._make([*saved[:5], mode]), ctx.needs_input_grad
        needs = wants[0] or wants[2], wants[1]
        # With create_graph the gradient itself is differentiated: its op knows how.
        if torch.is_grad_enabled() or observed(d_loss) or forced != backends.forced_backend():
            divisor = torch.tensor(divisor) if isinstance(divisor, int) else divisor
            with backends.use_backend(forced):
                d_relevance, d_log_likelihood = torch.ops.realm_kernels.marginal_loss_bwd(
                    d_loss, *problem.with_tokens(), *needs, divisor
                )
            if wants[1]:
                d_log_likelihood = d_log_likelihood.view_as(problem.log_likelihood)
        else:
            d_relevance, d_log_likelihood = cpu.backward(d_loss, divisor, problem, *needs, kept=saved[5:])
        log_weight = problem.log_weight
        return (
            cpu.cast(d_relevance, problem.scores.dtype) if wants[0] else None,
            cpu.cast(d_log_likelihood, problem.log_likelihood.dtype) if wants[1] else None,
            cpu.cast(d_relevance, log_weight.dtype) if wants[2] and log_weight is not None else None,
            None,
            None,
        )


def _gradients(
    wants: tuple[bool, ...], first: int, problem: Problem, d_relevance: Tensor, d_log_likelihood: Tensor
) -> tuple[Tensor | None, ...]:
    """One gradient for each argument, of which the problem's begin at `first`."""
    gradients: list[Tensor | None] = [None] * len(wants)
    if wants[first]:
        gradients[first] = cpu.cast(d_relevance, problem.scores.dtype)
    if wants[first + 1]:
        gradients[first + 1] = cpu.cast(d_log_likelihood, problem.log_likelihood.dtype)
    if wants[first + 4]:
        assert problem.log_weight is not None
        gradients[first + 4] = cpu.cast(d_relevance, problem.log_weight.dtype)
    return tuple(gradients)


torch.library.register_autograd("realm_kernels::marginal_loss", _backward, setup_context=_save_inputs)


def _save_backward_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    problem, (*ctx.needs, count) = _split(inputs[1:], _NEEDS)
    ctx.mode = problem.mode
    ctx.save_for_backward(inputs[0], *problem[:5], count)


def _double_backward(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:
    d_loss, *tensors, count = ctx.saved_tensors
    problem = Problem._make([*tensors, ctx.mode])
    needed = (v if need else None for v, need in zip(directions, ctx.needs, strict=True))
    d_d_loss, *found = torch.ops.realm_kernels.marginal_loss_bwd_bwd(*needed, d_loss, *problem, count)
    wants = ctx.needs_input_grad
    return (d_d_loss.to(d_loss.dtype) if wants[0] else None, *_gradients(wants, 1, problem, *found)[1:])


torch.library.register_autograd(
    "realm_kernels::marginal_loss_bwd", _double_backward, setup_context=_save_backward_inputs
)


def _twice(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(f"{checks.OP}: third derivatives are not offered")


torch.library.register_autograd("realm_kernels::marginal_loss_bwd_bwd", _twice)
