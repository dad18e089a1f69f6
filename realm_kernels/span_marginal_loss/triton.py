"""The Triton backend of span_marginal_loss: tiles and launches of the kernels in triton_kernels.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..marginal_loss import triton as marginal_loss
from ..marginal_loss.triton import MAX_REGISTERS, PER_THREAD, TILE, as_bytes, contiguous, on_device
from .problem import Problem


def refuses(problem: Problem) -> str | None:
    return marginal_loss.unserved(problem.scores.device)


def span_tile(spans: int) -> dict[str, int]:
    """Documents and spans of a tile, and launch options, for C spans a document."""
    block_c = min(marginal_loss.power_of_two(spans), TILE)
    return {
        "BLOCK_R": TILE // block_c,
        "BLOCK_C": block_c,
        "num_warps": TILE // (32 * PER_THREAD),
        "maxnreg": MAX_REGISTERS,
    }


def forward(
    problem: Problem,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..marginal_loss.triton_kernels import marginal_loss_reduce_kernel
    from . import triton_kernels as kernels

    scores, span_scores, correct, valid, doc_mask, log_weight, _ = problem
    batch, documents, spans = span_scores.shape
    rows = batch * documents
    dtype = problem.loss_dtype
    kept = scores.new_empty((4, batch, documents), dtype=torch.float64)
    losses = scores.new_empty(batch, dtype=dtype if reduction == "none" else torch.float64)
    counts = scores.new_empty(batch, dtype=torch.int64)
    with on_device(scores.device):
        if batch > 0:
            relevance, log_likelihood = scores.new_empty((2, rows), dtype=torch.float64)
            has_correct = scores.new_empty(rows, dtype=torch.int32)
            tile = span_tile(spans)
            kernels.span_evidence_kernel[(-(-rows // tile["BLOCK_R"]),)](
                scores.contiguous(),
                contiguous(log_weight),
                as_bytes(doc_mask),
                span_scores.contiguous(),
                as_bytes(correct),
                as_bytes(valid),
                kept,
                relevance,
                log_likelihood,
                has_correct,
                rows,
                spans,
                GLOBAL=problem.is_global,
                C_END=-(-spans // tile["BLOCK_C"]) * tile["BLOCK_C"],
                **tile,
            )
            kernels.span_marginal_loss_fwd_kernel[(batch,)](
                relevance,
                log_likelihood,
                has_correct,
                kept,
                losses,
                counts,
                rows,
                documents,
                **marginal_loss.tile(documents, 1),
            )
        if reduction == "none":
            return losses, counts, kept
        loss, count = scores.new_empty((), dtype=dtype), scores.new_empty((), dtype=torch.int64)
        marginal_loss_reduce_kernel[(1,)](
            losses,
            counts,
            loss,
            count,
            batch,
            MEAN=reduction == "mean",
            BLOCK_B=marginal_loss.REDUCE_BLOCK,
        )
        return loss, count, kept


def backward(
    d_loss: Tensor,
    count: Tensor | None,
    kept: Tensor,
    problem: Problem,
    needs_scores: bool,
    needs_span_scores: bool,
) -> tuple[Tensor, Tensor]:
    from . import triton_kernels as kernels

    scores, span_scores, correct, valid, doc_mask, log_weight, _ = problem
    batch, documents, spans = span_scores.shape
    rows = batch * documents
    dtype = problem.loss_dtype
    d_scores = scores.new_empty(scores.shape if needs_scores else (0,), dtype=dtype)
    d_span_scores = torch.empty(
        span_scores.shape if needs_span_scores else (0,), dtype=span_scores.dtype, device=scores.device
    )
    if batch > 0:
        tile = span_tile(spans)
        blocks = -(-spans // tile["BLOCK_C"]) if needs_span_scores else 1
        with on_device(scores.device):
            kernels.span_marginal_loss_bwd_kernel[(-(-rows // tile["BLOCK_R"]), blocks)](
                span_scores.contiguous(),
                as_bytes(correct),
                as_bytes(valid),
                kept.contiguous(),
                d_loss.contiguous(),
                count,
                d_scores if needs_scores else None,
                d_span_scores if needs_span_scores else None,
                rows,
                documents,
                spans,
                GLOBAL=problem.is_global,
                REDUCED=d_loss.dim() == 0,
                **tile,
            )
    return d_scores, d_span_scores


BACKEND = backends.Backend(name="triton", refuses=refuses, forward=forward, backward=backward)
