"""The Triton backend of score_spans: tiles and launches of the kernels in triton_kernels.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Backend
from ..marginal_loss.triton import on_device, power_of_two, unserved
from .reference import count

TILE = 4096  # numbers of the representations that a program holds at once
PER_THREAD = 32  # of these for each thread
# Threads that share a row. Each has the same columns of every part of it, so that most of a reduction over S
# is within a thread, the rest three shuffles for four rows; and eight threads of 16 bytes read a whole line.
THREADS_OF_ROW = 8
MAX_WIDTH = 8192  # of a representation: more does not fit the registers of a program


def refuses(start: Tensor, end: Tensor, v: Tensor, max_width: int, eps: float) -> str | None:
    if start.dtype == torch.float64:
        return "it computes in float32, start is float64"
    if start.shape[2] > MAX_WIDTH:
        return f"S must be at most {MAX_WIDTH}, got {start.shape[2]}"
    return unserved(start.device)


def tile(length: int, width: int, vector: int) -> dict[str, int]:
    """The tile of a program and its warps, for T wordpieces of S numbers read `vector` at a time."""
    columns = power_of_two(width)
    part = min(columns, THREADS_OF_ROW * vector)
    block_t = min(power_of_two(length), max(TILE // columns, 1))
    warps = max(block_t * columns // (32 * PER_THREAD), 1)
    return {"S": width, "BLOCK_T": block_t, "PARTS": columns // part, "PART": part, "num_warps": warps}


def _plan(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...], dict[str, int]]:
    """Both halves, contiguous along S as those of a dense layer's output are, other strides, the tile."""
    start, end = (half if half.stride(2) == 1 else half.contiguous() for half in (start, end))
    strides = (*start.stride()[:2], *end.stride()[:2])
    # What Triton knows to be aligned: multiples of 16.
    aligned = all(x % 16 == 0 for x in (start.data_ptr(), end.data_ptr(), *strides))
    _, length, width = start.shape
    return start, end, strides, tile(length, width, 16 // start.element_size() if aligned else 1)


def forward(start: Tensor, end: Tensor, v: Tensor, max_width: int, eps: float) -> tuple[Tensor, Tensor]:
    from . import triton_kernels as kernels

    rows, length, width = start.shape
    spans = count(length, max_width)
    scores = start.new_empty((rows, spans), dtype=torch.float32)
    moments = start.new_empty((2, rows, spans), dtype=torch.float32)
    start, end, strides, plan = _plan(start, end)
    if rows > 0:
        with on_device(start.device):
            kernels.score_spans_fwd_kernel[(rows * -(-length // plan["BLOCK_T"]),)](
                start,
                end,
                v.float().contiguous(),
                scores,
                moments,
                length,
                spans,
                max_width,
                *strides,
                eps,
                **plan,
            )
    return scores, moments


def backward(
    d_scores: Tensor,
    scores: Tensor,
    moments: Tensor,
    start: Tensor,
    end: Tensor,
    v: Tensor,
    max_width: int,
    eps: float,
    needs_start: bool,
    needs_end: bool,
    needs_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_kernels as kernels

    rows, length, width = start.shape
    d_start, d_end = (
        torch.empty(half.shape if needed else (0,), dtype=half.dtype, device=half.device)
        for half, needed in ((start, needs_start), (end, needs_end))
    )
    start, end, strides, plan = _plan(start, end)
    programs = rows * -(-length // plan["BLOCK_T"])
    d_v = start.new_empty((programs, width) if needs_v else (0,), dtype=torch.float32)
    # Programs of starts, which make d_v as well, and of ends.
    sides = (needs_start or needs_v) + needs_end
    if rows > 0 and sides > 0:
        with on_device(start.device):
            kernels.score_spans_bwd_kernel[(programs, sides)](
                start,
                end,
                v.float().contiguous(),
                d_scores.contiguous(),
                scores,
                moments,
                d_start if needs_start else None,
                d_end if needs_end else None,
                d_v if needs_v else None,
                length,
                scores.shape[1],
                max_width,
                *strides,
                **plan,
            )
    return d_start, d_end, (d_v.sum(0) if needs_v else d_v).to(v.dtype)


BACKEND = Backend(name="triton", refuses=refuses, forward=forward, backward=backward)
