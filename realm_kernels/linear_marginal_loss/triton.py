"""The Triton backend of linear_marginal_loss: its passes over logits, between the products of cuBLAS.

"triton:epilogue", by use_backend() only and unmeasured, makes the first product and its statistics in one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends, native
from . import chunked
from .passes import Passes, Statistics
from .problem import Problem
from .products import Products

# A tile of statistics stays in registers, 32 numbers a thread: one read, and no loop that carries a maximum.
STATISTICS_V, STATISTICS_R, STATISTICS_WARPS = 64, 128, 8
COMBINE_S, COMBINE_R, COMBINE_WARPS = 64, 8, 8
# 16 words: V = 30522 makes 1908 programs, 14 for each of 132 multiprocessors, which take 6 at a time.
GRADIENT_V, GRADIENT_R, GRADIENT_WARPS = 16, 128, 4
# A tile of the first product fills half the registers of a multiprocessor: the larger it is, the less often
# the L2 is read. Half as wide where the compiler would spill: odd pitches and widths, and from sm_100 on.
PRODUCT_V, PRODUCT_V_NARROW, PRODUCT_R, PRODUCT_H, PRODUCT_WARPS = 256, 128, 128, 64, 8
PRODUCT_STAGES, PRODUCT_GROUP = 3, 8


class TritonPasses(Passes):
    """Of float32 logits; gradients take the place of the logits they were made of, whatever their dtype."""

    in_place = True
    bias_in_logits = False  # as score_ leaves them

    def statistics_(self, logits: Tensor, bias: Tensor | None, targets: Tensor) -> Statistics:
        from . import triton_kernels as kernels

        vocabulary, count = logits.shape
        parts = _blocks(vocabulary, STATISTICS_V)
        peaks, sums = logits.new_empty(2, parts, count)
        if count > 0:
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
        return _combined(logits, bias, targets, peaks, sums)

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
                None if self.bias_in_logits else bias,
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


class EpiloguePasses(TritonPasses):
    """The first product is ours, and leaves the parts of rows that statistics would read all logits for.

    It puts the bias into the logits, where the passes behind it find it.
    """

    bias_in_logits = True

    def score_(
        self, products: Products, hidden: Tensor, logits: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Statistics:
        from . import triton_kernels as kernels

        weight = products.weight
        (vocabulary, width), count = weight.shape, hidden.shape[0]
        block = product_words(weight.device, count, width)
        parts = _blocks(vocabulary, block)
        peaks, sums = logits.new_empty(2, parts, count)
        if parts > 0 and count > 0:
            with _on_device(logits.device):
                kernels.linear_marginal_loss_product_kernel[(parts * _blocks(count, PRODUCT_R),)](
                    weight.contiguous(),
                    hidden.contiguous(),
                    logits.new_zeros(vocabulary) if bias is None else bias,
                    targets,
                    logits,
                    peaks,
                    sums,
                    vocabulary,
                    count,
                    H=width,
                    BLOCK_V=block,
                    BLOCK_R=PRODUCT_R,
                    BLOCK_H=PRODUCT_H,
                    GROUP=PRODUCT_GROUP,
                    STAGES=PRODUCT_STAGES,
                    num_warps=PRODUCT_WARPS,
                )
        return _combined(logits, None, targets, peaks, sums)


def product_words(device: torch.device, rows: int, width: int) -> int:
    """Words of a tile of the first product: wide where its registers suffice, whole rows copied at once."""
    generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    is_aligned = rows % 16 == 0 and width % PRODUCT_H == 0
    return PRODUCT_V if is_aligned and generation in (8, 9) else PRODUCT_V_NARROW


def _combined(
    logits: Tensor, bias: Tensor | None, targets: Tensor, peaks: Tensor, sums: Tensor
) -> Statistics:
    """The statistics of rows from those of their parts [S, R]."""
    from . import triton_kernels as kernels

    parts, count = peaks.shape
    log_p, total = logits.new_empty(2, count, dtype=torch.float64)
    statistics = Statistics(log_p, total, logits.new_empty(count))
    if count > 0:
        with _on_device(logits.device):
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
    if device.type == "cpu" and backends.forced_backend() in PASSES:
        from . import triton_kernels

        if triton_kernels.INTERPRETED:
            return None
    return f"it serves CUDA tensors, got {device} (CPU tensors with TRITON_INTERPRET=1, when forced)"


def refuses_epilogue(problem: Problem) -> str | None:
    if problem.hidden.dtype == torch.float32:
        return "its first product takes bfloat16 and float16, got float32"
    return refuses(problem)


PASSES: dict[str, TritonPasses] = {"triton": TritonPasses(), "triton:epilogue": EpiloguePasses()}


def _backend(name: str, refuses: Callable[[Problem], str | None], default: bool = True) -> backends.Backend:
    passes = PASSES[name]
    forward, backward = (partial(f, passes=passes) for f in (chunked.forward, chunked.backward))
    return backends.Backend(name, refuses, forward, backward, default)


BACKEND = _backend("triton", refuses)
EPILOGUE = _backend("triton:epilogue", refuses_epilogue, default=False)
BACKENDS = (BACKEND, EPILOGUE)
