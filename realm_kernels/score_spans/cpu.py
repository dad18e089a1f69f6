"""The C++ backend of score_spans: representations in registers alone (csrc/cpu/score_spans*)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..backends import Backend, forced_variant
from . import reference

LANES = 16  # S is a multiple of the widest vector


def refuses(start: Tensor, end: Tensor, v: Tensor, max_width: int, eps: float) -> str | None:
    if start.device.type != "cpu":
        return f"the arguments are on {start.device}"
    if native.cpu is None:
        return native.cpu_missing
    if start.dtype == torch.float64:
        return "it computes in float32, start is float64"
    if start.shape[2] % LANES:
        return f"S must be a multiple of {LANES}, got {start.shape[2]}"
    return None


def _rows(half: Tensor) -> Tensor:
    """float32 rows [N T] at one distance, each contiguous, as the halves of a dense layer's output are."""
    half = half.float()
    even = half.stride(2) == 1 and half.stride(0) == half.shape[1] * half.stride(1)
    return half if even else half.contiguous()


def forward(start: Tensor, end: Tensor, v: Tensor, max_width: int, eps: float) -> tuple[Tensor, Tensor]:
    assert native.cpu is not None
    rows, length, width = start.shape
    spans = reference.count(length, max_width)
    scores, moments = torch.empty(rows, spans), torch.empty(2, rows, spans)
    start, end, v = _rows(start), _rows(end), v.float().contiguous()
    native.cpu.score_spans_fwd(
        (start.data_ptr(), start.stride(1)),
        (end.data_ptr(), end.stride(1)),
        v.data_ptr(),
        (rows, length, width, max_width, spans),
        eps,
        (scores.data_ptr(), moments.data_ptr()),
        torch.get_num_threads(),
        forced_variant(),
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
    assert native.cpu is not None
    rows, length, width = start.shape
    # Both halves' are one number for each of a representation: either costs what both do.
    halves = needs_start or needs_end
    d_start, d_end = (torch.empty(half.shape if halves else (0,)) for half in (start, end))
    d_v = torch.empty(width if needs_v else 0)
    if not (halves or needs_v):
        return d_start.to(start.dtype), d_end.to(end.dtype), d_v.to(v.dtype)
    starts, ends, wide_v, d_scores = _rows(start), _rows(end), v.float().contiguous(), d_scores.contiguous()
    native.cpu.score_spans_bwd(
        (starts.data_ptr(), starts.stride(1)),
        (ends.data_ptr(), ends.stride(1)),
        wide_v.data_ptr(),
        (rows, length, width, max_width, scores.shape[1]),
        eps,
        (scores.data_ptr(), moments.data_ptr()),
        d_scores.data_ptr(),
        *(gradient.data_ptr() if gradient.numel() > 0 else 0 for gradient in (d_start, d_end, d_v)),
        torch.get_num_threads(),
        forced_variant(),
    )
    d_start, d_end = (
        x if need else x.new_empty(0) for x, need in ((d_start, needs_start), (d_end, needs_end))
    )
    return d_start.to(start.dtype), d_end.to(end.dtype), d_v.to(v.dtype)


BACKEND = Backend(name="cpu", refuses=refuses, forward=forward, backward=backward)
