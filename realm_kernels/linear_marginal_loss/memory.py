"""Large results: fresh memory, and a scale on the way into it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..backends import forced_variant
from ..marginal_loss.cpu import array

_NATIVE = {torch.float32, torch.bfloat16}
PART_ROWS = 256  # scaled at a time where the dtype changes: they stay in a cache


def fresh(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Contiguous memory that holds nothing, on the device of `like`."""
    tensor = like.new_empty(shape, dtype=dtype)
    if tensor.device.type == "cpu" and native.cpu is not None:
        native.cpu.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def scale_into(outs: Sequence[Tensor], values: Sequence[Tensor], scale: Tensor) -> None:
    """Each out = scale values, rounded once to its dtype; all contiguous. scale: one number."""
    if native.cpu is None or not all(x.is_cpu and x.dtype in _NATIVE for x in (*outs, *values)):
        for out, part in zip(outs, values, strict=True):
            _scale_by_torch(out, part, scale)
        return
    native.cpu.scale(
        [(array(part), array(out), out.numel()) for out, part in zip(outs, values, strict=True)],
        scale.item(),
        torch.get_num_threads(),
        forced_variant(),
    )


def _scale_by_torch(out: Tensor, values: Tensor, scale: Tensor) -> None:
    if out.dtype == values.dtype or not out.is_cpu or out.dim() == 1:
        torch.mul(values, scale, out=out)
        return
    # torch would make a product of the whole size first.
    values, out = values.flatten(0, -2), out.flatten(0, -2)
    product = values.new_empty(min(PART_ROWS, values.shape[0]), *values.shape[1:])
    for first in range(0, out.shape[0], PART_ROWS):
        part = values[first : first + PART_ROWS]
        out[first : first + PART_ROWS].copy_(torch.mul(part, scale, out=product[: len(part)]))
