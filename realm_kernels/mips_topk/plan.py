"""The bytes and flops of mips_topk: what explain() tells and what the benchmarks divide by."""

from __future__ import annotations

from torch import Tensor

from ..backends import Explanation
from . import op
from .checks import OP, check


def cost(batch: int, num_rows: int, dim: int, k: int, row_bytes: int, query_bytes: int) -> tuple[int, int]:
    """Least (bytes, flops): rows and queries read once, k scores and ids written, D multiply-adds a score."""
    bytes_moved = num_rows * dim * row_bytes + batch * dim * query_bytes + batch * k * (4 + 8)
    return bytes_moved, 2 * batch * num_rows * dim


def explain(
    queries: Tensor,
    table: object,
    k: int,
    *,
    exclude: Tensor | None = None,
    row_mask: Tensor | None = None,
) -> Explanation:
    shards = check(queries, table, k, exclude, row_mask)
    backend = op.backend_for(queries, shards, k, exclude, row_mask)
    batch, dim = queries.shape
    num_rows = sum(shard.shape[0] for shard in shards)
    bytes_moved, flops = cost(batch, num_rows, dim, k, shards[0].element_size(), queries.element_size())
    return Explanation(
        op=OP,
        backend=backend.name,
        plan=f"B={batch} N={num_rows} D={dim} k={k} over {len(shards)} shard(s), rows {shards[0].dtype}",
        bytes=bytes_moved,
        flops=flops,
        limit="the larger of bytes / read bandwidth and flops / multiply-add rate of the scan precision",
    )
