"""The Triton backend of linear_marginal_loss: its passes over logits, between the products of cuBLAS."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends, native
from . import chunked
from .passes import Statistics
from .problem import Problem

# A tile of statistics stays in registers, 32 numbers a thread: one read, and no loop that carries a maximum.
STATISTICS_V, STATISTICS_R, STATISTICS_WARPS = 64, 128, 8
COMBINE_S, COMBINE_R, COMBINE_WARPS = 64, 8, 8
# 16 words: V = 30522 makes 1908 programs, 14 for each of 132 multiprocessors, which take 6 at a time.
GRADIENT_V, GRADIENT_R, GRADIENT_WARPS = 16, 128, 4


class TritonPasses:
    """Of float32 logits; gradients take the place of the logits they were made of, whatever their dtype."""

    in_place = True

    def statistics_(self, logits: Tensor, bias: Tensor | None, targets: Tensor) -> Statistics:
        from . import triton_kernels as kernels

        vocabulary, count = logits.shape
        parts = _blocks(vocabulary, STATISTICS_V)
        peaks, sums = logits.new_empty(2, parts, count)
        log_p, total = logits.new_empty(2, count, dtype=torch.float64)
        statistics = Statistics(log_p, total, logits.new_empty(count))
        if count == 0:
            return statistics
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
                *statistics,
                count,
                parts,
                BLOCK_S=COMBINE_S,
                BLOCK_R=COMBINE_R,
                num_warps=COMBINE_WARPS,
            )
        return statistics

    def gradient_(
        self,
        logits: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        statistics: Statistics,
        factor: Tensor,
        dtype: torch.dtype,
        d_bias: Tensor | None,
    ) -> Tensor:
        """In half precision a view of every other half of a row of the logits: its pitch is 2 R."""
        from . import triton_kernels as kernels

        vocabulary, count = logits.shape
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
                *statistics,
                factor,
                vocabulary,
                count,
                PITCH=logits.element_size() // dtype.itemsize,
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


def refuses(problem: Problem) -> str | None:
    missing = native.triton_missing()
    if missing:
        return missing
    if problem.hidden.dtype == torch.float64:
        return "it has no float64"
    device = problem.hidden.device
    if device.type == "cuda":
        return None
    if device.type == "cpu" and backends.forced_backend() == "triton":
        from . import triton_kernels

        if triton_kernels.INTERPRETED:
            return None
    return f"it serves CUDA tensors, got {device} (CPU tensors with TRITON_INTERPRET=1, when forced)"


BACKEND = backends.Backend(
    name="triton",
    refuses=refuses,
    forward=partial(chunked.forward, passes=TritonPasses()),
    backward=partial(chunked.backward, passes=TritonPasses()),
)
