"""The three matrix products of a chunk of R rows, by torch's libraries; no sum is rounded on its way.

Logits stand vocabulary first, [V, R]: the product with a weight [V, H] that way round measured 1.3 times as
fast as [R, V] (torch 2.13, MKL), slices of the vocabulary are contiguous, and the pitch is R, which a chunk
chooses, instead of V = 30522, which is no multiple of 8.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Of one slice of a half-precision weight in float32: it stays in the caches, and a call holds one at a time.
SLICE_BYTES = 8 << 20
# Half-precision gradients of logits, at most 1, keep their small ones as normal numbers: 2^14 < 65504.
FLOAT16_SCALE = 2.0**14
# addmm with out_dtype takes a float32 sum since torch 2.10.
ADDS_IN_FLOAT32 = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


class WideProducts:
    """In the dtype of the sums: float64, float32, and half precision where no product returns float32.

    A half-precision weight is widened slice by slice. torch's half-precision products on the CPU round their
    result, which the accuracy law does not allow for a d_weight summed over chunks.
    """

    scale = 1.0

    def __init__(self, weight: Tensor, sum_dtype: torch.dtype) -> None:
        self.weight, self.sum_dtype = weight, sum_dtype
        self.operand_dtype = (
            sum_dtype  # of rows of hidden and of gradients of logits, as the products take them
        )

    def slices(self) -> Iterator[tuple[slice, Tensor]]:
        vocabulary, width = self.weight.shape
        if self.weight.dtype == self.sum_dtype:
            yield slice(0, vocabulary), self.weight
            return
        step = max(1, SLICE_BYTES // (width * self.sum_dtype.itemsize))
        for first in range(0, vocabulary, step):
            part = slice(first, min(first + step, vocabulary))
            yield part, self.weight[part].to(self.sum_dtype)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """W hidden^T into out [V, R]."""
        for part, weight in self.slices():
            torch.mm(weight, hidden.t(), out=out[part])
        return out

    def d_hidden(self, d_logits: Tensor) -> Tensor:
        """d_logits^T W: [R, H]."""
        total = d_logits.new_empty(d_logits.shape[1], self.weight.shape[1])
        for part, weight in self.slices():
            total.addmm_(d_logits[part].t(), weight, beta=float(part.start > 0))
        return total

    def add_d_weight(self, total: Tensor, d_logits: Tensor, hidden: Tensor, first: bool) -> None:
        """total [V, H] += d_logits hidden, or = where this is the first: total then holds nothing yet."""
        total.addmm_(d_logits, hidden, beta=float(not first))


class TensorCoreProducts:
    """bfloat16 and float16 on CUDA: half-precision operands, float32 sums and results (cuBLAS)."""

    def __init__(self, weight: Tensor, sum_dtype: torch.dtype) -> None:
        self.weight, self.sum_dtype = weight, sum_dtype
        self.operand_dtype = weight.dtype
        self.scale = FLOAT16_SCALE if weight.dtype == torch.float16 else 1.0

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        return torch.mm(self.weight, hidden.t(), out_dtype=self.sum_dtype, out=out)

    def d_hidden(self, d_logits: Tensor) -> Tensor:
        return torch.mm(d_logits.t(), self.weight, out_dtype=self.sum_dtype)

    def add_d_weight(self, total: Tensor, d_logits: Tensor, hidden: Tensor, first: bool) -> None:
        if first:
            torch.mm(d_logits, hidden, out_dtype=self.sum_dtype, out=total)
        elif ADDS_IN_FLOAT32:
            torch.addmm(total, d_logits, hidden, out_dtype=self.sum_dtype, out=total)
        else:
            total += torch.mm(d_logits, hidden, out_dtype=self.sum_dtype)


Products = WideProducts | TensorCoreProducts


def products_for(weight: Tensor, sum_dtype: torch.dtype) -> Products:
    if takes_narrow_operands(weight):
        return TensorCoreProducts(weight, sum_dtype)
    return WideProducts(weight, sum_dtype)


def takes_narrow_operands(weight: Tensor) -> bool:
    """Whether gradients of logits are copied to half precision for the products."""
    return weight.dtype in (torch.bfloat16, torch.float16) and sums_in_float32(weight.device)


def sums_in_float32(device: torch.device) -> bool:
    """Whether the library multiplies half precision into a float32 result: torch.mm with out_dtype."""
    return device.type == "cuda"
