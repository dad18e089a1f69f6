"""rk.mips_topk: exact maximum-inner-product search as a differentiable op."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..backends import explained_by
from ..table.streamed import StreamedTable
from . import distributed, plan
from .checks import check, codes_of, is_across_ranks

if TYPE_CHECKING:
    from ..table import DistributedTable, ShardedTable

__all__ = ["TopK", "mips_topk"]


class TopK(NamedTuple):
    """scores float32 [B, k], descending; indices int64 [B, k], row ids, -1 beyond the rows there are."""

    scores: Tensor
    indices: Tensor


@explained_by(plan.explain)
def mips_topk(
    queries: Tensor,
    table: Tensor | ShardedTable | StreamedTable | DistributedTable,
    k: int,
    *,
    exclude: Tensor | None = None,
    row_mask: Tensor | None = None,
) -> TopK:
    """The k rows of `table` with the largest inner product with each query: exact, fused and differentiable.

    This is REALM's retrieval (Guu et al. 2020, section 3.2): the k most relevant documents by
    f(x, z) = Embed_input(x)^T Embed_doc(z). The order is total: score descending, then row id ascending.
    Scores are canonical (a fixed float64 sum, rounded once to float32), so every backend, batch size, k,
    thread count and split into shards returns the same ids and the same bits. The [B, N] score matrix is
    never held.

    queries: [B, D] float32, bfloat16 or float16.
    table: [N, D] tensor of any of these dtypes on the same device, or a ShardedTable, quantised or not, or
        a StreamedTable, larger than memory and searched from its files; or a DistributedTable
        or a DTensor placed Shard(0), whose rows are spread over ranks. Then the call is collective: every
        rank brings queries of its own (B may differ and be 0) and gets their results as plain tensors.
    k: in [1, N].
    exclude: int64 [B, E], global row ids never returned for that query; -1 pads.
    row_mask: bool [N]; rows with False are never returned. Across ranks: [n], of this rank's rows.

    Returns TopK(scores, indices). Rows that score NaN are never returned. Where fewer than k rows may be
    returned the rest has id -1 and score -inf: use `doc_mask = indices >= 0`. Gradients flow from scores to
    queries and to a table that is a plain tensor or a DTensor, summed in a fixed order.

    Raises TypeError or ValueError naming the argument for a wrong type, shape, dtype or device, for k
    outside [1, N], and on the CPU for an exclude id outside [-1, N). Across ranks also RuntimeError where
    another rank refused its arguments, or was lost.

    >>> import torch, realm_kernels as rk
    >>> scores, indices = rk.mips_topk(torch.randn(4, 128), torch.randn(1000, 128), 8)
    """
    if isinstance(table, StreamedTable):
        return table.mips_topk(queries, k, exclude=exclude, row_mask=row_mask)
    if is_across_ranks(table):
        return TopK(*distributed.search(queries, table, k, exclude, row_mask))
    shards = check(queries, table, k, exclude, row_mask)
    return_rows = torch.is_grad_enabled() and queries.requires_grad
    codes = codes_of(table)
    scores, indices, _ = torch.ops.realm_kernels.mips_topk(
        queries, shards, k, exclude, row_mask, return_rows, [] if codes is None else codes.tensors()
    )
    return TopK(scores, indices)
