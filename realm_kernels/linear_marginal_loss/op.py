"""The torch ops behind linear_marginal_loss: schemas, fake kernels, autograd, choice of the backend.

As in marginal_loss, a call goes through the ops only where something listens there or another backend than
C++ serves: torch's dispatcher is serial, and costs a small step more beside two threads than on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..marginal_loss.op import marginal_loss_bwd, observed
from ..marginal_loss.reference import reduce
from . import checks, chunked, cpu, reference, triton
from .memory import fresh, scale_into
from .problem import Gradients, Needs, Problem

BACKENDS = (cpu.BACKEND, triton.BACKEND, chunked.BACKEND, reference.BACKEND)

_INPUTS = (
    "Tensor scores, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? doc_mask,"
    " Tensor? log_weight"
)
_OPTIONS = (
    "int ignore_index, str mode, bool needs_hidden, bool needs_weight, bool needs_bias, float min_posterior"
)

# Gradients come with the forward, for an upstream gradient of 1. needs_weight and needs_bias promise an
# upstream gradient equal for all examples: a sum over examples cannot be taken apart again.
torch.library.define(
    "realm_kernels::linear_marginal_loss",
    f"({_INPUTS}, {_OPTIONS}) -> (Tensor loss, Tensor count, Tensor log_likelihood, Tensor unit_d_hidden,"
    " Tensor unit_d_weight, Tensor unit_d_bias)",
)
# has_units: the forward brought the gradients, which are scaled; without it they are computed here.
torch.library.define(
    "realm_kernels::linear_marginal_loss_bwd",
    f"(Tensor d_loss, {_INPUTS}, Tensor log_likelihood, Tensor unit_d_hidden, Tensor unit_d_weight,"
    f" Tensor unit_d_bias, bool has_units, {_OPTIONS}, bool needs_scores)"
    " -> (Tensor d_scores, Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
)


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


def linear_marginal_loss_fwd(
    scores: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    ignore_index: int,
    mode: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    min_posterior: float,
) -> tuple[Tensor, ...]:
    """loss [B], count int64 [B] as of marginal_loss, log_likelihood float64 [B, K, M], gradients for 1."""
    checks.check_values(targets, weight.shape[0], ignore_index)
    problem = Problem(
        scores, hidden, weight, targets, bias, doc_mask, log_weight, ignore_index, mode, min_posterior
    )
    backend = backend_for(problem)
    with _inside(problem, backend):
        found = backend.forward(problem, Needs(needs_hidden, needs_weight, needs_bias))
    return found.loss.to(problem.loss_dtype), found.counted, found.log_likelihood, *found.units


torch.library.impl("realm_kernels::linear_marginal_loss", "CompositeExplicitAutograd")(
    linear_marginal_loss_fwd
)


@torch.library.register_fake("realm_kernels::linear_marginal_loss")
def _(
    scores: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    ignore_index: int,
    mode: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    min_posterior: float,
) -> tuple[Tensor, ...]:
    problem = Problem(scores, hidden, weight, targets, bias, doc_mask, log_weight, ignore_index, mode)
    batch, vocabulary, dtype = scores.shape[0], weight.shape[0], problem.sum_dtype
    return (
        scores.new_empty(batch, dtype=problem.loss_dtype),
        scores.new_empty(batch, dtype=torch.int64),
        hidden.new_empty(hidden.shape[:3], dtype=torch.float64),
        hidden.new_empty(hidden.shape if needs_hidden else (0,), dtype=problem.hidden_gradient_dtype),
        weight.new_empty(weight.shape if needs_weight else (0,), dtype=dtype),
        weight.new_empty(vocabulary if needs_bias else 0, dtype=dtype),
    )


def linear_marginal_loss_bwd(
    d_loss: Tensor,
    scores: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    log_likelihood: Tensor,
    unit_d_hidden: Tensor,
    unit_d_weight: Tensor,
    unit_d_bias: Tensor,
    has_units: bool,
    ignore_index: int,
    mode: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    min_posterior: float,
    needs_scores: bool,
) -> tuple[Tensor, ...]:
    problem = Problem(
        scores, hidden, weight, targets, bias, doc_mask, log_weight, ignore_index, mode, min_posterior
    )
    needs = Needs(needs_hidden, needs_weight, needs_bias)
    backend = backend_for(problem)
    with _inside(problem, backend):
        d_scores, _ = marginal_loss_bwd(
            d_loss,
            scores,
            log_likelihood,
            problem.scored(),
            doc_mask,
            log_weight,
            mode,
            needs_scores,
            False,
        )
        if has_units or not any(needs):
            units = Gradients(unit_d_hidden, unit_d_weight, unit_d_bias)
            return d_scores.to(problem.loss_dtype), *scaled(problem, units, needs, d_loss, d_loss[:1].sum())
        # Of the size of one, as the units are: half precision has no room for the scale of a loss.
        size = d_loss.abs().amax() if d_loss.numel() > 0 else d_loss.sum()
        relative = torch.where(size > 0, d_loss / size, 0.0)
        assert backend.backward is not None
        units = backend.backward(problem, log_likelihood, relative, needs)
        gradients = scaled(problem, units, needs, size.expand(d_loss.shape), size)
        return d_scores.to(problem.loss_dtype), *gradients


def loss(problem: Problem, reduction: str) -> tuple[Tensor, Tensor]:
    """The reduced loss, and log_likelihood float64 [B, K, M], of inputs that were checked."""
    needs = needs_of(problem)
    # One example's share of d_weight cannot be scaled afterwards, so with "none" nothing is made beforehand.
    beforehand = reduction != "none" or not (needs.weight or needs.bias)
    is_plain = not observed(*problem.tensors) and backend_for(problem) is cpu.BACKEND
    run = _Direct.apply if is_plain else torch.ops.realm_kernels.linear_marginal_loss
    each, count, log_likelihood, *_ = run(
        *problem.tensors,
        problem.ignore_index,
        problem.mode,
        *(beforehand and needed for needed in needs),
        problem.min_posterior,
    )
    return reduce(each, count, reduction), log_likelihood


def needs_of(problem: Problem) -> Needs:
    return Needs(*(_needs_gradient(x) for x in (problem.hidden, problem.weight, problem.bias)))


def _needs_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and torch.is_grad_enabled() and tensor.requires_grad


def scaled(
    problem: Problem, units: Gradients, needs: Needs, by_example: Tensor, by_all: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the inputs, in their dtypes, in memory of their own."""
    d_hidden, d_weight = problem.hidden.new_empty(0), problem.weight.new_empty(0)
    d_bias = problem.weight.new_empty(0)
    if needs.hidden:
        d_hidden = torch.empty_like(problem.hidden, memory_format=torch.contiguous_format)
        # With a d_weight the scale is one for all examples, and torch multiplies by one number in a third of
        # the time.
        scale = by_all if needs.weight or needs.bias else by_example[:, None, None, None]
        torch.mul(units.d_hidden, scale, out=d_hidden)
        # An infinite scale makes 0 a NaN; on a CPU it costs less to look for one.
        if d_hidden.device.type != "cpu" or not all(map(isfinite, by_example.tolist())):
            d_hidden.masked_fill_(~problem.live()[..., None], 0.0)
    if needs.weight:
        d_weight = fresh(problem.weight, problem.weight.shape, problem.weight.dtype)
        scale_into(d_weight, units.d_weight, by_all)
    if needs.bias:
        d_bias = problem.weight.new_empty(problem.weight.shape[0])
        torch.mul(units.d_bias, by_all, out=d_bias)
    return d_hidden, d_weight, d_bias


torch.library.impl("realm_kernels::linear_marginal_loss_bwd", "CompositeExplicitAutograd")(
    linear_marginal_loss_bwd
)


@torch.library.register_fake("realm_kernels::linear_marginal_loss_bwd")
def _(
    d_loss: Tensor,
    scores: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    log_likelihood: Tensor,
    unit_d_hidden: Tensor,
    unit_d_weight: Tensor,
    unit_d_bias: Tensor,
    has_units: bool,
    ignore_index: int,
    mode: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    min_posterior: float,
    needs_scores: bool,
) -> tuple[Tensor, ...]:
    problem = Problem(scores, hidden, weight, targets, bias, doc_mask, log_weight, ignore_index, mode)
    return (
        scores.new_empty(scores.shape if needs_scores else (0,), dtype=problem.loss_dtype),
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty(weight.shape[0] if needs_bias else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.ignore_index, ctx.mode, needs_hidden, needs_weight, needs_bias, ctx.min_posterior = inputs
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)  # zeros for the units would be as large as they
    ctx.save_for_backward(*tensors, *rest[1:])
    ctx.has_units = needs_hidden or needs_weight or needs_bias
    # The backward may run in a thread of its own; what was chosen for the call holds for its gradient too.
    ctx.forced = backends.forced_backend()
    ctx.is_direct = False


def _backward(ctx: Any, d_loss: Tensor | None, *_rest: None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    scores, *_, log_weight = ctx.saved_tensors[:7]
    wants_scores, wants_hidden, wants_weight, _, wants_bias, _, wants_log_weight, *_ = ctx.needs_input_grad
    # With create_graph the gradient would itself be differentiated, which its op refuses.
    is_plain = ctx.is_direct and not torch.is_grad_enabled() and not observed(d_loss)
    run: Any = linear_marginal_loss_bwd if is_plain else torch.ops.realm_kernels.linear_marginal_loss_bwd
    with backends.use_backend(ctx.forced):
        d_scores, d_hidden, d_weight, d_bias = run(
            d_loss,
            *ctx.saved_tensors,
            ctx.has_units,
            ctx.ignore_index,
            ctx.mode,
            wants_hidden,
            wants_weight,
            wants_bias,
            ctx.min_posterior,
            wants_scores or wants_log_weight,
        )
    return (
        d_scores.to(scores.dtype) if wants_scores else None,
        d_hidden if wants_hidden else None,
        d_weight if wants_weight else None,
        None,
        d_bias if wants_bias else None,
        None,
        d_scores.to(log_weight.dtype) if wants_log_weight else None,
        *(None,) * 6,
    )


torch.library.register_autograd("realm_kernels::linear_marginal_loss", _backward, setup_context=_save)


class _Direct(torch.autograd.Function):
    """The op and its autograd without the dispatcher, for the C++ backend."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = linear_marginal_loss_fwd(*inputs)
        _save(ctx, inputs, output)
        ctx.is_direct = True
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *gradients)


def _once(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(
        f"{checks.OP}: the gradient is itself not differentiable (second derivatives are not offered)"
    )


torch.library.register_autograd("realm_kernels::linear_marginal_loss_bwd", _once)
