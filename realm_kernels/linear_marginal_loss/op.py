"""The torch ops behind linear_marginal_loss: schemas, fake kernels, autograd, choice of the backend.

As in marginal_loss, a call goes through the ops only where something listens there or another backend than
C++ serves. Few and large operations: after the products the caches hold nothing of torch's or Python's, and a
small step waits for every function it calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..marginal_loss.cpu import cast
from ..marginal_loss.op import Direct, marginal_loss_bwd, observed
from . import checks, chunked, cpu, reference, triton
from .memory import fresh, scale_into
from .problem import NOTHING, Found, Gradients, Needs, Problem

BACKENDS = (cpu.BACKEND, *triton.BACKENDS, chunked.BACKEND, reference.BACKEND)

_PROBLEM = (
    "Tensor scores, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? doc_mask,"
    " Tensor? log_weight, int ignore_index, str mode, float min_posterior"
)
_NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"

# Gradients come with the forward, for an upstream gradient of 1. needs_weight and needs_bias promise an
# upstream gradient equal for all examples: a sum over examples cannot be taken apart again.
torch.library.define(
    "realm_kernels::linear_marginal_loss",
    f"({_PROBLEM}, str reduction, {_NEEDS}) -> (Tensor loss, Tensor count, Tensor log_likelihood,"
    " Tensor unit_d_hidden, Tensor unit_d_weight, Tensor unit_d_bias)",
)
# count: what reduction "mean" divides by, None for the others. has_units: the forward brought the gradients,
# which are scaled; without it they are computed here.
torch.library.define(
    "realm_kernels::linear_marginal_loss_bwd",
    f"(Tensor d_loss, Tensor? count, Tensor log_likelihood, Tensor unit_d_hidden, Tensor unit_d_weight,"
    f" Tensor unit_d_bias, bool has_units, {_PROBLEM}, {_NEEDS}, bool needs_scores)"
    " -> (Tensor d_scores, Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
)
_FIELDS = len(fields(Problem))


def _split(arguments: Sequence[Any]) -> tuple[Problem, Sequence[Any]]:
    """The problem of a schema, and what comes behind it."""
    return Problem(*arguments[:_FIELDS]), arguments[_FIELDS:]


def backend_for(problem: Problem) -> backends.Backend:
    return backends.choose(checks.OP, BACKENDS, problem)


@contextmanager
def _inside(problem: Problem, backend: backends.Backend) -> Iterator[None]:
    """No autocast within, and the marginal of documents by the same backend if it has one of that name."""
    device_type = problem.hidden.device.type
    marginal = backends.forced_backend() if backend.name in ("cpu", "reference") else None
    # Entering it costs more than many a small operation.
    casting = torch.is_autocast_enabled(device_type)
    no_cast = torch.autocast(device_type, enabled=False) if casting else nullcontext()
    with no_cast, backends.use_backend(marginal):
        yield


def _forward(problem: Problem, reduction: str, needs: Needs) -> Found:
    checks.check_values(problem.targets, problem.weight.shape[0], problem.ignore_index)
    backend = backend_for(problem)
    with _inside(problem, backend):
        return backend.forward(problem, needs, reduction)


def linear_marginal_loss_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    """loss and count as of marginal_loss, log_likelihood float64 [B, K, M], gradients for 1."""
    problem, (reduction, *needs) = _split(arguments)
    found = _forward(problem, reduction, Needs(*needs))
    count = found.counted if isinstance(found.counted, Tensor) else torch.tensor(found.counted)
    return found.loss, count, found.log_likelihood, *found.units


torch.library.impl("realm_kernels::linear_marginal_loss", "CompositeExplicitAutograd")(
    linear_marginal_loss_fwd
)


@torch.library.register_fake("realm_kernels::linear_marginal_loss")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (reduction, *needs) = _split(arguments)
    scores, hidden, weight, dtype = problem.scores, problem.hidden, problem.weight, problem.sum_dtype
    needs_hidden, needs_weight, needs_bias = needs
    shape = scores.shape[:1] if reduction == "none" else ()
    return (
        scores.new_empty(shape, dtype=problem.loss_dtype),
        scores.new_empty(shape, dtype=torch.int64),
        hidden.new_empty(hidden.shape[:3], dtype=torch.float64),
        hidden.new_empty(hidden.shape if needs_hidden else (0,), dtype=problem.hidden_gradient_dtype),
        weight.new_empty(weight.shape if needs_weight else (0,), dtype=dtype),
        weight.new_empty(weight.shape[0] if needs_bias else 0, dtype=dtype),
    )


def linear_marginal_loss_bwd(
    d_loss: Tensor,
    count: Tensor | int | None,
    log_likelihood: Tensor,
    unit_d_hidden: Tensor,
    unit_d_weight: Tensor,
    unit_d_bias: Tensor,
    has_units: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    problem, (*needed, needs_scores) = _split(arguments)
    units, needs = Gradients(unit_d_hidden, unit_d_weight, unit_d_bias), Needs(*needed)
    backend = backend_for(problem)
    with _inside(problem, backend):
        inputs = problem.marginal_inputs(log_likelihood)
        d_scores, _ = marginal_loss_bwd(d_loss, *inputs, needs_scores, False, count)
        d_scores = cast(d_scores, problem.loss_dtype)
        if d_loss.dim() == 0:
            by_all = _divided(d_loss, count)
            return d_scores, *scaled(problem, units, needs, by_all.expand(problem.scores.shape[:1]), by_all)
        if has_units or not any(needs):
            return d_scores, *scaled(problem, units, needs, d_loss, d_loss[:1].sum())
        # Of the size of one, as the units are: half precision has no room for the scale of a loss.
        size = d_loss.abs().amax() if d_loss.numel() > 0 else d_loss.sum()
        relative = torch.where(size > 0, d_loss / size, 0.0)
        assert backend.backward is not None
        units = backend.backward(problem, log_likelihood, relative, needs)
        return d_scores, *scaled(problem, units, needs, size.expand(d_loss.shape), size)


torch.library.impl("realm_kernels::linear_marginal_loss_bwd", "CompositeExplicitAutograd")(
    linear_marginal_loss_bwd
)


@torch.library.register_fake("realm_kernels::linear_marginal_loss_bwd")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (needs_hidden, needs_weight, needs_bias, needs_scores) = _split(arguments[7:])
    scores, hidden, weight = problem.scores, problem.hidden, problem.weight
    return (
        scores.new_empty(scores.shape if needs_scores else (0,), dtype=problem.loss_dtype),
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty(weight.shape[0] if needs_bias else 0),
    )


def _divided(d_loss: Tensor, count: Tensor | int | None) -> Tensor:
    if count is None:
        return d_loss
    return d_loss / (count.clamp(min=1) if isinstance(count, Tensor) else max(1, count))


def scaled(
    problem: Problem, units: Gradients, needs: Needs, by_example: Tensor, by_all: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the inputs, in their dtypes, in memory of their own."""
    hidden, weight = problem.hidden, problem.weight
    d_hidden = torch.empty(hidden.shape if needs.hidden else 0, dtype=hidden.dtype, device=hidden.device)
    d_weight = fresh(weight, weight.shape if needs.weight else (0,), weight.dtype)
    d_bias = weight.new_empty(weight.shape[0] if needs.bias else 0)
    # With a d_weight the scale is one for all examples.
    if needs.weight or needs.bias:
        wanted = [i for i in range(3) if needs[i]]
        gradients = d_hidden, d_weight, d_bias
        scale_into([gradients[i] for i in wanted], [units[i] for i in wanted], by_all)
    elif needs.hidden:
        torch.mul(units.d_hidden, by_example[:, None, None, None], out=d_hidden)
    # An infinite scale makes 0 a NaN; on a CPU it costs less to look for one.
    if needs.hidden and (not hidden.is_cpu or not all(map(isfinite, by_example.tolist()))):
        d_hidden.masked_fill_(~problem.live()[..., None], 0.0)
    return d_hidden, d_weight, d_bias


def loss(problem: Problem, reduction: str) -> tuple[Tensor, Tensor]:
    """The reduced loss, and log_likelihood float64 [B, K, M], of inputs that were checked."""
    needs = needs_of(problem)
    # One example's share of d_weight cannot be scaled afterwards, so with "none" nothing is made beforehand.
    if reduction == "none" and (needs.weight or needs.bias):
        needs = NOTHING
    arguments = *problem.tensors, *problem.options, reduction, *needs
    if not observed(*problem.tensors) and backend_for(problem) is cpu.BACKEND:
        return _Direct.apply(*arguments)  # type: ignore[attr-defined]
    found_loss, _, log_likelihood, *_ = torch.ops.realm_kernels.linear_marginal_loss(*arguments)
    return found_loss, log_likelihood


def needs_of(problem: Problem) -> Needs:
    return Needs(*(_needs_gradient(x) for x in (problem.hidden, problem.weight, problem.bias)))


def _needs_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and torch.is_grad_enabled() and tensor.requires_grad


def _save(ctx: Any, inputs: Sequence[Any], count: Tensor | int, log_likelihood: Tensor, units: Any) -> None:
    problem, (reduction, *needs) = _split(inputs)
    ctx.set_materialize_grads(False)  # zeros for the units would be as large as they
    ctx.divisor = count if reduction == "mean" and isinstance(count, int) else None
    divisor = count if reduction == "mean" and isinstance(count, Tensor) else None
    ctx.save_for_backward(*problem.tensors, divisor, log_likelihood, *units)
    # The backward may run in a thread of its own; what was chosen for the call holds for its gradient too.
    ctx.plan = problem.options, any(needs), backends.forced_backend()


def _save_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, count, log_likelihood, *units = output
    ctx.mark_non_differentiable(count, log_likelihood, *units)
    _save(ctx, inputs, count, log_likelihood, units)


def _backward_op(ctx: Any, d_loss: Tensor | None, *_rest: None) -> tuple[Tensor | None, ...]:
    return _backward(ctx, torch.ops.realm_kernels.linear_marginal_loss_bwd, d_loss)


def _backward(ctx: Any, run: Any, d_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, divisor, log_likelihood, unit_d_hidden, unit_d_weight, unit_d_bias = ctx.saved_tensors
    options, has_units, forced = ctx.plan
    scores, log_weight = tensors[0], tensors[-1]
    wants_scores, wants_hidden, wants_weight, _, wants_bias, _, wants_log_weight, *rest = ctx.needs_input_grad
    with backends.use_backend(forced):
        d_scores, d_hidden, d_weight, d_bias = run(
            d_loss,
            ctx.divisor if divisor is None else divisor,
            log_likelihood,
            unit_d_hidden,
            unit_d_weight,
            unit_d_bias,
            has_units,
            *tensors,
            *options,
            wants_hidden,
            wants_weight,
            wants_bias,
            wants_scores or wants_log_weight,
        )
    return (
        cast(d_scores, scores.dtype) if wants_scores else None,
        d_hidden if wants_hidden else None,
        d_weight if wants_weight else None,
        None,
        d_bias if wants_bias else None,
        None,
        cast(d_scores, log_weight.dtype) if wants_log_weight else None,
        *(None for _ in rest),
    )


torch.library.register_autograd("realm_kernels::linear_marginal_loss", _backward_op, setup_context=_save_op)


class _Direct(Direct):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        problem, (reduction, *needs) = _split(arguments)
        found = _forward(problem, reduction, Needs(*needs))
        ctx.mark_non_differentiable(found.log_likelihood)
        _save(ctx, arguments, found.counted, found.log_likelihood, found.units)
        return found.loss, found.log_likelihood

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_rest: None) -> tuple[Tensor | None, ...]:
        # With create_graph the gradient would itself be differentiated, which its op refuses.
        is_plain = not torch.is_grad_enabled() and (d_loss is None or not observed(d_loss))
        return _backward(ctx, linear_marginal_loss_bwd if is_plain else _through_op, d_loss)


def _through_op(d_loss: Tensor, count: Any, *arguments: Any) -> Any:
    count = torch.tensor(count) if isinstance(count, int) else count
    return torch.ops.realm_kernels.linear_marginal_loss_bwd(d_loss, count, *arguments)


def _once(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(
        f"{checks.OP}: the gradient is itself not differentiable (second derivatives are not offered)"
    )


torch.library.register_autograd("realm_kernels::linear_marginal_loss_bwd", _once)
