"""The specification of mips_topk in plain torch: every score, the canonical sum, one total order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Backend

LANES = 8  # of the canonical sum: one AVX-512 register of float64
ROWS_PER_CHUNK = 4096  # keeps [B, rows, D] float64 products small


def canonical_scores(queries: Tensor, rows: Tensor) -> Tensor:
    """Inner products as the contract defines them (design, section 4): [..., D] x [..., D] -> float32 [...].

    p_j sums the float64 products of the dimensions d = j (mod 8) in increasing d; the score is
    ((p0+p4)+(p2+p6)) + ((p1+p5)+(p3+p7)), rounded once to float32, with -0 becoming +0. Broadcasts over
    the leading axes.
    """
    products = queries.double() * rows.double()  # [..., D]
    products = torch.nn.functional.pad(products, (0, -products.shape[-1] % LANES))
    p = torch.zeros_like(products[..., :LANES])
    for first in range(0, products.shape[-1], LANES):
        p = p + products[..., first : first + LANES]
    total = ((p[..., 0] + p[..., 4]) + (p[..., 2] + p[..., 6])) + (
        (p[..., 1] + p[..., 5]) + (p[..., 3] + p[..., 7])
    )
    return total.float() + 0.0


def eligible_rows(scores: Tensor, exclude: Tensor | None, row_mask: Tensor | None) -> Tensor:
    """Which rows may be returned to which query, bool [B, N]: none that scores NaN, masked or excluded."""
    eligible = ~scores.isnan()
    if row_mask is not None:
        eligible = eligible & row_mask
    if exclude is not None and exclude.shape[1] > 0:
        # An id outside [0, N) names no row; scatter needs an index all the same: one spare column.
        num_rows = scores.shape[1]
        spare = torch.where((exclude >= 0) & (exclude < num_rows), exclude, num_rows)
        excluded = eligible.new_zeros(scores.shape[0], num_rows + 1).scatter(1, spare, True)
        eligible = eligible & ~excluded[:, :num_rows]
    return eligible


def select(scores: Tensor, eligible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k eligible rows, by score descending, then id ascending; id -1 and score -inf beyond them."""
    scores = scores.masked_fill(~eligible, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices  # ties: smaller id first
    # A row that really scores -inf is still a row: it comes before those that may not be returned.
    order = order.gather(1, (~eligible).gather(1, order).sort(dim=1, stable=True).indices)[:, :k]
    found = eligible.gather(1, order)
    return scores.gather(1, order), order.masked_fill(~found, -1)


def gather_rows(shards: list[Tensor], indices: Tensor) -> Tensor:
    """Rows by global id over the shards, zeros for id -1: [..., D]."""
    rows = shards[0].new_zeros(*indices.shape, shards[0].shape[1])
    first = 0
    for shard in shards:
        if shard.shape[0] > 0:
            inside = (indices >= first) & (indices < first + shard.shape[0])
            # Every place reads some row of the shard: picking those inside would cost a synchronisation.
            candidates = shard[(indices - first).clamp(0, shard.shape[0] - 1)]
            rows = torch.where(inside[..., None], candidates, rows)
        first += shard.shape[0]
    return rows


def forward(
    queries: Tensor,
    shards: list[Tensor],
    k: int,
    exclude: Tensor | None,
    row_mask: Tensor | None,
    codes: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    chunks = [chunk for shard in shards for chunk in shard.split(ROWS_PER_CHUNK)]
    scores = torch.cat([canonical_scores(queries[:, None], chunk[None]) for chunk in chunks], dim=1)  # [B, N]
    return select(scores, eligible_rows(scores, exclude, row_mask), k)


def refuses(queries: Tensor, shards: list[Tensor], *rest: object) -> str | None:
    if shards[0].device != queries.device:
        return f"the table is on {shards[0].device}, the queries are on {queries.device}"
    return None


BACKEND = Backend(name="reference", refuses=refuses, forward=forward)
