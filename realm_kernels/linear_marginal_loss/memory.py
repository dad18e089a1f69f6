"""Large results: fresh memory, and a scale on the way into it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..backends import forced_variant

HUGE_BYTES = 4 << 20  # two huge pages at least; less is not worth the call
PART_ROWS = 256  # scaled at a time where the dtype changes: they stay in a cache


def fresh(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Contiguous memory that holds nothing, on the device of `like`."""
    tensor = like.new_empty(shape, dtype=dtype)
    if tensor.device.type == "cpu" and tensor.nbytes >= HUGE_BYTES and native.cpu is not None:
        native.cpu.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def scale_into(out: Tensor, values: Tensor, scale: Tensor) -> None:
    """out [rows, width] = scale values, rounded to its dtype."""
    if out.dtype == values.dtype or out.device.type != "cpu":
        torch.mul(values, scale, out=out)
        return
    if out.dtype == torch.bfloat16 and native.cpu is not None:
        native.cpu.scale_into_bfloat16(
            values.data_ptr(),
            scale.item(),
            out.data_ptr(),
            out.numel(),
            torch.get_num_threads(),
            forced_variant(),
        )
        return
    # torch would make a product of the whole size first.
    product = values.new_empty(min(PART_ROWS, values.shape[0]), values.shape[1])
    for first in range(0, out.shape[0], PART_ROWS):
        part = values[first : first + PART_ROWS]
        out[first : first + PART_ROWS].copy_(torch.mul(part, scale, out=product[: len(part)]))
