"""The torch ops behind score_spans: schemas, fake kernels, autograd, choice of the backend.

The op is <v, x^> of v = norm_weight * weight less its mean; what LayerNorm's bias and the dense layer's add
is one number for all spans, so torch differentiates those two products and the op knows three inputs. Its
second result, mean and reciprocal deviation of each span, is for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from . import checks, cpu, reference, triton
from .reference import count, wide

BACKENDS = (cpu.BACKEND, triton.BACKEND, reference.BACKEND)

_INPUTS = "Tensor start, Tensor end, Tensor v, int max_width, float eps"
torch.library.define("realm_kernels::score_spans", f"({_INPUTS}) -> (Tensor scores, Tensor moments)")
torch.library.define(
    "realm_kernels::score_spans_bwd",
    f"(Tensor d_scores, Tensor scores, Tensor moments, {_INPUTS}, bool needs_start, bool needs_end,"
    " bool needs_v) -> (Tensor d_start, Tensor d_end, Tensor d_v)",
)


def backend_for(start: Tensor, end: Tensor, v: Tensor, max_width: int, eps: float) -> backends.Backend:
    return backends.choose(checks.OP, BACKENDS, start, end, v, max_width, eps)


def score_spans_fwd(
    start: Tensor, end: Tensor, v: Tensor, max_width: int, eps: float
) -> tuple[Tensor, Tensor]:
    inputs = (start, end, v, max_width, eps)
    return backend_for(*inputs).forward(*inputs)


def score_spans_bwd(
    d_scores: Tensor, scores: Tensor, moments: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What is not needed is empty."""
    backend = backend_for(*inputs[:5])
    assert backend.backward is not None
    return backend.backward(d_scores, scores, moments, *inputs)


torch.library.impl("realm_kernels::score_spans", "CompositeExplicitAutograd")(score_spans_fwd)
torch.library.impl("realm_kernels::score_spans_bwd", "CompositeExplicitAutograd")(score_spans_bwd)


@torch.library.register_fake("realm_kernels::score_spans")
def _(start: Tensor, end: Tensor, v: Tensor, max_width: int, eps: float) -> tuple[Tensor, Tensor]:
    rows, length, _ = start.shape
    dtype = torch.float64 if start.dtype == torch.float64 else torch.float32
    spans = count(length, max_width)
    return start.new_empty((rows, spans), dtype=dtype), start.new_empty((2, rows, spans), dtype=dtype)


@torch.library.register_fake("realm_kernels::score_spans_bwd")
def _(
    d_scores: Tensor,
    scores: Tensor,
    moments: Tensor,
    start: Tensor,
    end: Tensor,
    v: Tensor,
    max_width: int,
    eps: float,
    *needs: bool,
) -> tuple[Tensor, ...]:
    inputs = (start, end, v)
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip(inputs, needs, strict=True))


def call(
    start: Tensor,
    end: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    max_width: int,
    eps: float,
) -> Tensor:
    leading = start.shape[:-2]
    # Autocast has no say here: these are [S] numbers, and a half-precision product would move every score.
    with torch.autocast(start.device.type, enabled=False):
        weight = wide(weight)
        v = wide(norm_weight) * weight
        v = v - v.mean()
        constant = (wide(norm_bias) * weight).sum()
        if bias is not None:
            constant = constant + wide(bias).reshape(())
        flat = [half.reshape(-1, *half.shape[-2:]) for half in (start, end)]
        scores, _ = torch.ops.realm_kernels.score_spans(*flat, v, max_width, eps)
        return (scores + constant.to(scores.dtype)).reshape(*leading, scores.shape[1])


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_width, ctx.eps = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])
    # The backward may run in a thread of its own; what was chosen for the call holds for its gradient too.
    ctx.forced = backends.forced_backend()


def _backward(ctx: Any, d_scores: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    wants = ctx.needs_input_grad[:3]
    with backends.use_backend(ctx.forced):
        found = torch.ops.realm_kernels.score_spans_bwd(
            d_scores, *ctx.saved_tensors, ctx.max_width, ctx.eps, *wants
        )
    return (*(gradient if want else None for gradient, want in zip(found, wants, strict=True)), None, None)


torch.library.register_autograd("realm_kernels::score_spans", _backward, setup_context=_save_inputs)


def _twice(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(f"{checks.OP}: second derivatives are not offered")


torch.library.register_autograd("realm_kernels::score_spans_bwd", _twice)
