"""The C++ backend of span_evidence: each span read from memory once a pass (csrc/cpu/span_evidence*)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, native
from ..marginal_loss.checks import DTYPES
from ..marginal_loss.op import observed
from ..validation import dtype_name
from . import reference
from .reference import Evidence


def refuses(span_scores: Tensor, correct: Tensor, valid: Tensor | None, is_document: Tensor) -> str | None:
    if native.cpu is None:
        return native.cpu_missing
    if observed(span_scores, correct, valid, is_document):
        return "the spans are not plain CPU tensors, or the call is traced: torch has to see its operations"
    forced = backends.forced_backend()
    if forced is not None and forced.partition(":")[0] != "cpu":
        return f"use_backend({forced!r}) asks for another"
    return None


def span_evidence(
    span_scores: Tensor, correct: Tensor, valid: Tensor | None, is_document: Tensor
) -> Evidence:
    return Evidence(*_SpanEvidence.apply(span_scores, correct, valid, is_document))


class _SpanEvidence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, span_scores: Tensor, correct: Tensor, valid: Tensor | None, is_document: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert native.cpu is not None
        ctx.forced = backends.forced_backend()
        documents = is_document.shape
        right, wrong, log_likelihood, log_normalizer = (
            torch.empty(documents, dtype=torch.float64) for _ in range(4)
        )
        has_correct = torch.empty(documents, dtype=torch.bool)
        # Bound to names: what is passed below are addresses, which keep nothing alive.
        inputs = _contiguous(span_scores, correct, valid, is_document)
        outputs = right, wrong, log_likelihood, log_normalizer, has_correct
        native.cpu.span_evidence_fwd(
            *_pointers(*inputs),
            *(tensor.data_ptr() for tensor in outputs),
            torch.get_num_threads(),
            backends.forced_variant(),
        )
        ctx.save_for_backward(span_scores, correct, valid, is_document, right, wrong)
        ctx.mark_non_differentiable(has_correct)
        return log_likelihood, log_normalizer, has_correct

    @staticmethod
    def backward(ctx: Any, d_log_likelihood: Tensor, d_log_normalizer: Tensor, _: Tensor) -> Any:
        *inputs, right, wrong = ctx.saved_tensors
        if torch.is_grad_enabled() or observed(d_log_likelihood, d_log_normalizer):
            # The gradient itself is differentiated: by the specification, whose every step torch knows.
            with torch.enable_grad():
                evidence = reference.span_evidence(*inputs)
                gradient = torch.autograd.grad(
                    evidence[:2], inputs[0], (d_log_likelihood, d_log_normalizer), create_graph=True
                )
            return *gradient, None, None, None
        assert native.cpu is not None
        d_log_likelihood, d_log_normalizer = d_log_likelihood.contiguous(), d_log_normalizer.contiguous()
        d_span_scores = torch.empty(inputs[0].shape, dtype=inputs[0].dtype)
        inputs = _contiguous(*inputs)
        outputs = right, wrong, d_log_likelihood, d_log_normalizer, d_span_scores
        with backends.use_backend(ctx.forced):
            native.cpu.span_evidence_bwd(
                *_pointers(*inputs),
                *(tensor.data_ptr() for tensor in outputs),
                torch.get_num_threads(),
                backends.forced_variant(),
            )
        return d_span_scores, None, None, None


_NAMES = {dtype: dtype_name(dtype) for dtype in DTYPES}


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _pointers(
    span_scores: Tensor, correct: Tensor, valid: Tensor | None, is_document: Tensor
) -> tuple[object, ...]:
    return (
        (span_scores.data_ptr(), _NAMES[span_scores.dtype]),
        correct.data_ptr(),
        0 if valid is None else valid.data_ptr(),
        is_document.data_ptr(),
        is_document.numel(),
        span_scores.shape[2],
    )


BACKEND = backends.Backend(name="cpu", refuses=refuses, forward=span_evidence)
