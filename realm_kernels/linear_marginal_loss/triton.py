"""The Triton passes of linear_marginal_loss between its matrix products: tiles and launches."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, native

# Rows of logits that stand for no number: those without a part in the loss, and targets outside [0, V).
NO_PART, OUTSIDE = -2, -1

# A tile of statistics stays in registers, 32 numbers a thread: one read, and no loop to carry a maximum.
STATISTICS_V, STATISTICS_R, STATISTICS_WARPS = 64, 128, 8
COMBINE_S, COMBINE_R, COMBINE_WARPS = 64, 8, 8
# 16 words a program: V = 30522 makes 1908 programs, 14 on each of 132 multiprocessors, all at once.
GRADIENT_V, GRADIENT_R, GRADIENT_WARPS = 16, 128, 4


class Rows(NamedTuple):
    """What the passes know of the rows of a chunk: float64 [R] and three float32 [R]."""

    log_p: Tensor  # log softmax at the target; 0 for NO_PART, NaN for OUTSIDE
    shift: Tensor
    inverse: Tensor
    at_target: Tensor


def row_targets(live: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """int64: a target where the row has one in the vocabulary, else NO_PART or OUTSIDE."""
    inside = (targets >= 0) & (targets < vocabulary)
    return torch.where(live, torch.where(inside, targets, OUTSIDE), NO_PART)


def statistics(logits: Tensor, bias: Tensor | None, targets: Tensor) -> Rows:
    """The statistics of logits [V, R] float32 over V; bias: [V] float32; targets: [R] of row_targets()."""
    from . import triton_kernels as kernels

    vocabulary, count = logits.shape
    parts = _blocks(vocabulary, STATISTICS_V)
    peaks, sums = logits.new_empty(2, parts, count)
    rows = Rows(logits.new_empty(count, dtype=torch.float64), *logits.new_empty(3, count))
    if count == 0:
        return rows
    with _on_device(logits.device):
        kernels.linear_marginal_loss_statistics_kernel[(parts * _blocks(count, STATISTICS_R),)](
            logits,
            bias,
            targets,
            peaks,
            sums,
            vocabulary,
            count,
            BLOCK_V=STATISTICS_V,
            BLOCK_R=STATISTICS_R,
            num_warps=STATISTICS_WARPS,
        )
        kernels.linear_marginal_loss_combine_kernel[(_blocks(count, COMBINE_R),)](
            logits,
            bias,
            targets,
            peaks,
            sums,
            *rows,
            count,
            parts,
            NO_PART=NO_PART,
            BLOCK_S=COMBINE_S,
            BLOCK_R=COMBINE_R,
            num_warps=COMBINE_WARPS,
        )
    return rows


def logits_gradient_(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Rows,
    factor: Tensor,
    scale: float,
    dtype: torch.dtype,
    d_bias: Tensor | None,
) -> Tensor:
    """scale factor (p - onehot) in `dtype`, a view of the logits' memory; its sum is added to d_bias [V]."""
    from . import triton_kernels as kernels

    vocabulary, count = logits.shape
    pitch = logits.element_size() // dtype.itemsize
    d_logits = logits.view(dtype)[:, :count]
    if count == 0:
        return d_logits
    with _on_device(logits.device):
        kernels.linear_marginal_loss_gradient_kernel[(_blocks(vocabulary, GRADIENT_V),)](
            logits,
            d_logits,
            bias,
            d_bias,
            targets,
            *rows[1:],
            factor,
            scale,
            vocabulary,
            count,
            PITCH=pitch,
            BLOCK_V=GRADIENT_V,
            BLOCK_R=GRADIENT_R,
            num_warps=GRADIENT_WARPS,
        )
    return d_logits


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device's current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
