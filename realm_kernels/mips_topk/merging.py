"""How the results of a table's pieces merge: what searches a table piece by piece shares."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(earlier: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The k first of two results [B, k] by score, then id, then nothing; all ids of `later` are larger."""
    scores = torch.cat([earlier[0], later[0]], dim=1)  # [B, 2k]
    indices = torch.cat([earlier[1], later[1]], dim=1)
    bits = scores.view(torch.int32)
    high = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(indices < 0, -(1 << 31))
    order = high.sort(dim=1, descending=True, stable=True).indices[:, : earlier[0].shape[1]]
    return scores.gather(1, order), indices.gather(1, order)
