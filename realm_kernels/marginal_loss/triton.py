"""The Triton backend of marginal_loss: tiles and launches of the kernels in triton_kernels.py."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from .. import backends, native
from .problem import Problem

TILE = 1024  # float64 numbers of a tile at most
PER_THREAD = 4  # of these for each thread: more spills
# Left to itself ptxas spills a few registers for an occupancy that one program an example has no use for.
MAX_REGISTERS = 255
REDUCE_BLOCK = 1024


def refuses(problem: Problem) -> str | None:
    return unserved(problem.scores.device)


def unserved(device: torch.device) -> str | None:
    """Why Triton serves no tensor of this device, or None."""
    missing = native.triton_missing()
    if missing:
        return missing
    if device.type == "cuda":
        return None
    if device.type == "cpu" and backends.forced_backend() == "triton":
        from . import triton_kernels

        if triton_kernels.INTERPRETED:
            return None
    return f"it serves CUDA tensors, got {device} (CPU tensors with TRITON_INTERPRET=1, when forced)"


def power_of_two(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()


def tile(documents: int, tokens: int) -> dict[str, int]:
    """Tiles and launch options for K documents of M tokens."""
    block_k = min(power_of_two(documents), TILE)
    block_m = min(power_of_two(tokens), TILE // block_k)
    return {
        "K_END": -(-documents // block_k) * block_k,
        "BLOCK_K": block_k,
        "BLOCK_M": block_m,
        "num_warps": power_of_two(-(-block_k * block_m // (32 * PER_THREAD))),
        "maxnreg": MAX_REGISTERS,
    }


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device's current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def forward(
    problem: Problem,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    from . import triton_kernels as kernels

    scores, log_likelihood, token_mask, doc_mask, log_weight, mode = problem
    batch, documents, tokens = log_likelihood.shape
    dtype = problem.loss_dtype
    losses = scores.new_empty(batch, dtype=dtype if reduction == "none" else torch.float64)
    counts = scores.new_empty(batch, dtype=torch.int64)
    with on_device(scores.device):
        if batch > 0:
            kernels.marginal_loss_fwd_kernel[(batch,)](
                scores.contiguous(),
                log_likelihood,
                contiguous(log_weight),
                as_bytes(token_mask),
                as_bytes(doc_mask),
                losses,
                counts,
                documents,
                tokens,
                *log_likelihood.stride(),
                PER_TOKEN=mode == "token",
                **tile(documents, tokens),
            )
        if reduction == "none":
            return losses, counts
        loss, count = scores.new_empty((), dtype=dtype), scores.new_empty((), dtype=torch.int64)
        kernels.marginal_loss_reduce_kernel[(1,)](
            losses, counts, loss, count, batch, MEAN=reduction == "mean", BLOCK_B=REDUCE_BLOCK
        )
        return loss, count


def backward(
    d_loss: Tensor,
    count: Tensor | None,
    problem: Problem,
    needs_scores: bool,
    needs_log_likelihood: bool,
) -> tuple[Tensor, Tensor]:
    from . import triton_kernels as kernels

    scores, log_likelihood, token_mask, doc_mask, log_weight, mode = problem
    batch, documents, tokens = log_likelihood.shape
    dtype = problem.loss_dtype
    d_scores = scores.new_empty(scores.shape if needs_scores else (0,), dtype=dtype)
    d_log_likelihood = torch.empty(
        log_likelihood.shape if needs_log_likelihood else (0,),
        dtype=log_likelihood.dtype,
        device=log_likelihood.device,
    )
    plan = tile(documents, tokens)
    if batch > 0:
        with on_device(scores.device):
            kernels.marginal_loss_bwd_kernel[(batch, plan["K_END"] // plan["BLOCK_K"])](
                scores.contiguous(),
                log_likelihood,
                contiguous(log_weight),
                as_bytes(token_mask),
                as_bytes(doc_mask),
                d_loss.contiguous(),
                count,
                d_scores if needs_scores else None,
                d_log_likelihood if needs_log_likelihood else None,
                documents,
                tokens,
                *log_likelihood.stride(),
                REDUCED=d_loss.dim() == 0,
                PER_TOKEN=mode == "token",
                **plan,
            )
    return d_scores, d_log_likelihood


BACKEND = backends.Backend(name="triton", refuses=refuses, forward=forward, backward=backward)
