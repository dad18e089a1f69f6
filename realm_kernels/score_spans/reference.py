"""The specification of score_spans in plain torch: one width of spans at a time, so that memory holds a
max_width-th of the representations and not all. It serves every device.

With v = norm_weight * weight the score of a span is <v, x^> + <norm_bias, weight> + bias, where
x^ = (x - mean) rstd and x = ReLU(start_i + end_j). The op is <v, x^>; autograd does the rest (op.py). v comes
less its mean: x^ sums to 0, so that changes nothing, but an error of the mean no longer reaches the score.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends import Backend


def count(length: int, max_width: int) -> int:
    """C, the spans of up to max_width wordpieces."""
    return max_width * (2 * length - max_width + 1) // 2


def wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _widths(length: int, max_width: int) -> Iterator[tuple[int, slice, slice, slice]]:
    """Of each width less one: where its spans lie among all, their starts, their ends."""
    first = 0
    for w in range(max_width):
        last = first + length - w
        yield w, slice(first, last), slice(0, length - w), slice(w, length)
        first = last


def forward(start: Tensor, end: Tensor, v: Tensor, max_width: int, eps: float) -> tuple[Tensor, Tensor]:
    """start, end [N, T, S], v [S] of sum 0 -> <v, x^> [N, C]; mean and rstd of x [2, N, C]."""
    start, end, v = wide(start), wide(end), wide(v)
    rows, length, _ = start.shape
    scores = start.new_empty(rows, count(length, max_width))
    moments = start.new_empty(2, *scores.shape)
    for _, spans, starts, ends in _widths(length, max_width):
        x = (start[:, starts] + end[:, ends]).relu()  # [N, T - w + 1, S]
        mean = x.mean(2)
        centred = x - mean[..., None]
        rstd = (centred.square().mean(2) + eps).rsqrt()
        scores[:, spans], moments[0, :, spans], moments[1, :, spans] = (centred * v).sum(2) * rstd, mean, rstd
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
    *needs: bool,
) -> tuple[Tensor, ...]:
    """dx = g rstd (v - x^ <v, x^> / S) where x > 0, to both ends; dv = sum g x^."""
    start_wide, end_wide, v_wide = wide(start), wide(end), wide(v)
    d_start, d_end, d_v = (torch.zeros_like(x) for x in (start_wide, end_wide, v_wide))
    for _, spans, starts, ends in _widths(start.shape[1], max_width):
        score, mean, rstd, g = (part[:, spans, None] for part in (scores, *moments, d_scores))
        # What a span without upstream holds is not looked at, NaN included.
        x = torch.where(g == 0, 0.0, (start_wide[:, starts] + end_wide[:, ends]).relu())
        normal = torch.where(g == 0, 0.0, (x - mean) * rstd)
        dx = torch.where(x == 0, 0.0, (g * rstd) * (v_wide - normal * (score / x.shape[2])))
        d_start[:, starts] += dx
        d_end[:, ends] += dx
        d_v += (g * normal).sum((0, 1))
    found = (d_start.to(start.dtype), d_end.to(end.dtype), d_v.to(v.dtype))
    return tuple(x if need else x.new_empty(0) for x, need in zip(found, needs, strict=True))


BACKEND = Backend(name="reference", refuses=lambda *arguments: None, forward=forward, backward=backward)
