"""The bytes and flops of mips_topk: what explain() tells and what the benchmarks divide by."""

from __future__ import annotations

from torch import Tensor

from ..backends import Explanation
from ..ranks import HEADER_BYTES
from ..table import device_stream
from ..table.quantized import are_for_the_cpu
from . import op
from .checks import OP, check, check_call, codes_of, is_across_ranks
from .distributed import MASK_LEGEND, rows_of


def cost(batch: int, num_rows: int, dim: int, k: int, row_bytes: int, query_bytes: int) -> tuple[int, int]:
    """Least (bytes, flops): rows and queries read once, k scores and ids written, D multiply-adds a score."""
    bytes_moved = num_rows * dim * row_bytes + batch * dim * query_bytes + batch * k * (4 + 8)
    return bytes_moved, 2 * batch * num_rows * dim


def traffic(
    world: int,
    batch: int,
    dim: int,
    k: int,
    query_bytes: int,
    excluded: int = 0,
    row_bytes: int | None = None,
) -> int:
    """Bytes that each of W ranks receives from the others in a search, where each brings B queries.

    Headers, queries with their excluded ids, and 12 bytes a candidate. With row_bytes, of an element of a
    row: also what the gradient of the queries needs, the chosen ids and, were they spread evenly, the rows.
    """
    received = HEADER_BYTES + batch * (dim * query_bytes + excluded * 8) + batch * k * 12
    if row_bytes is not None:
        received += batch * k * 8 + batch * k * dim * row_bytes // world
    return (world - 1) * received


def explain(
    queries: Tensor,
    table: object,
    k: int,
    *,
    exclude: Tensor | None = None,
    row_mask: Tensor | None = None,
) -> Explanation:
    if is_across_ranks(table):
        return _explain_across_ranks(queries, table, k, exclude, row_mask)
    shards = check(queries, table, k, exclude, row_mask)
    backend = op.backend_for(queries, shards, k, exclude, row_mask)
    batch, dim = queries.shape
    num_rows = sum(shard.shape[0] for shard in shards)
    codes = codes_of(table)
    if codes is not None and (
        backend.name == "reference"
        or codes.device != queries.device
        or are_for_the_cpu(codes.tensors()) != (backend.name == "cpu")
    ):
        codes = None
    row_bytes = shards[0].element_size() if codes is None else 1
    bytes_moved, flops = cost(batch, num_rows, dim, k, row_bytes, queries.element_size())
    certified = "" if codes is None else "; scans their int8 codes, rescores what these cannot exclude"
    if shards[0].device != queries.device:
        pinned = device_stream.is_pinned(shards)
        certified += f"; rows in {'pinned' if pinned else 'pageable'} host memory"
        certified += "" if codes is not None else ", copied to the GPU a window at a time"
    return Explanation(
        op=OP,
        backend=backend.name,
        plan=f"B={batch} N={num_rows} D={dim} k={k} over {len(shards)} shard(s), rows {shards[0].dtype}"
        f"{certified}",
        bytes=bytes_moved,
        flops=flops,
        limit="the larger of bytes / read bandwidth and flops / multiply-add rate of the scan precision",
    )


def _explain_across_ranks(
    queries: Tensor, table: object, k: int, exclude: Tensor | None, row_mask: Tensor | None
) -> Explanation:
    """This rank's part, as if all ranks brought as many queries: asking them would be a call of its own."""
    rows = rows_of(table)
    check_call(queries, rows.shards, k, exclude, row_mask, rows.num_rows, MASK_LEGEND)
    backend = op.backend_for(queries, rows.shards, k, exclude, row_mask)
    batch, dim = queries.shape
    world, rows_here = rows.ranks.size, sum(shard.shape[0] for shard in rows.shards)
    row_bytes, query_bytes = rows.shards[0].element_size(), queries.element_size()
    bytes_moved, flops = cost(world * batch, rows_here, dim, k, row_bytes, query_bytes)
    received = traffic(world, batch, dim, k, query_bytes, 0 if exclude is None else exclude.shape[1])
    return Explanation(
        op=OP,
        backend=backend.name,
        plan=f"B={batch} on each of {world} ranks, N={rows.num_rows} with {rows_here} here, D={dim} k={k}, "
        f"rows {rows.shards[0].dtype}; receives {received:,} bytes over {rows.ranks.backend}",
        bytes=bytes_moved,
        flops=flops,
        limit="the larger of bytes / read bandwidth and flops / multiply-add rate on the slowest rank, then "
        "the network",
    )
