"""int8 codes as a GPU scans them: whole groups of rows in row order, and the bounds of their error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_STEP = 2.0**-60  # of the codes: products of two steps stay normal numbers
SMALLEST_BOUND = 2.0**-126  # a bound that is not zero is a normal number, so its roundings are relative
ROUND_UP = 1 + 2.0**-20  # covers the float64 sums of the norms and the conversion to float32
CHUNK_ELEMENTS = 1 << 22  # encoded at once: 32 MiB in float64, and a few of these
RESCORED_GROUPS = 64  # of a query, about as many as k = 8 needs


def group_rows(num_rows: int, dim: int) -> int:
    """G, as triton_plan.py balances it: a query's maxima, 8 N / G bytes, against codes looked at again."""
    balanced = math.log2(max(1.0, 8 * num_rows / (RESCORED_GROUPS * dim))) / 2
    return 1 << min(7, max(5, round(balanced)))


def empty(
    shards: Sequence[Tensor], device: torch.device, group: int | None = None
) -> tuple[list[Tensor], ...]:
    """Uninitialised codes int8 [groups, G, D32] and bounds float32 [groups, 3] of each shard.

    D32 is D rounded up to 32, what a tensor core takes at once.
    """
    dim = shards[0].shape[1]
    group = group or group_rows(sum(shard.shape[0] for shard in shards), dim)
    groups = [-(-shard.shape[0] // group) for shard in shards]
    width = -(-dim // 32) * 32
    codes = [torch.empty(count, group, width, dtype=torch.int8, device=device) for count in groups]
    bounds = [torch.empty(count, 3, device=device) for count in groups]
    return codes, bounds


def encode(shard: Tensor, mean: Tensor, codes: Tensor, bounds: Tensor) -> None:
    """Fill codes and bounds of one shard: x = mean + s c + e with |c| <= 127, a step s for each group.

    bounds of a group: s, at least ||e|| and at least ||s c|| of each of its rows. A row with NaN is never
    returned: its codes are 0, and it has no part in the bounds. A row with an infinity makes ||e|| infinite.
    """
    groups, group, _ = codes.shape
    dim = shard.shape[1]
    step = max(1, CHUNK_ELEMENTS // (group * dim))
    for first in range(0, groups, step):
        after = min(first + step, groups)
        rows = shard[first * group : after * group].to(codes.device, non_blocking=True).double()
        centred = rows - mean.double()
        centred = torch.where(rows.isnan().any(dim=1, keepdim=True), 0.0, centred)
        missing = (after - first) * group - centred.shape[0]
        centred = torch.nn.functional.pad(centred, (0, 0, 0, missing)).view(-1, group, dim)
        largest = centred.abs().amax(dim=(1, 2))  # [groups]
        is_finite = largest.isfinite()
        scale = torch.where(is_finite, (largest / 127).clamp(min=SMALLEST_STEP), 1.0).float()[:, None, None]
        scale = scale.double()
        found = torch.where(centred.isfinite(), (centred / scale).round().clamp(-127, 127), 0.0)
        error = centred - scale * found
        # What float64 lost in forming the difference is a 2^-52 of what was centred.
        residual = error.norm(dim=2).amax(1) + 2.0**-50 * centred.norm(dim=2).amax(1)
        norm = (scale * found).norm(dim=2).amax(1)
        codes[first:after, :, :dim] = found.to(torch.int8)
        codes[first:after, :, dim:] = 0
        residual = torch.where(is_finite, residual, torch.inf)
        bounds[first:after] = torch.stack([scale[:, 0, 0].float(), _up(residual), _up(norm)], dim=1)


def _up(value: Tensor) -> Tensor:
    """float32, no smaller; zero stays zero."""
    return torch.where(value > 0, (value * ROUND_UP).clamp(min=SMALLEST_BOUND), 0.0).float()
