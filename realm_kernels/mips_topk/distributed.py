"""mips_topk over rows spread over ranks: gather the queries, search here, exchange k candidates each.

Every rank brings B queries of its own (B may differ, and be 0) and holds n rows. What travels:
  1. a header of sizes, in which all ranks also learn whether one of them refuses its arguments;
  2. all queries and excluded ids to all ranks, padded to the largest B and E;
  3. k candidates of each rank, 12 bytes of score and id, back to the rank that asked; never scores of rows;
  4. only where a gradient is wanted: the chosen ids to all ranks, the chosen rows to the rank that asked.
With the chosen rows at hand the gradient of the queries is computed where they are, as in one process, and
its backward pass exchanges nothing. That of a DTensor gathers d_scores and is computed where the rows are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ranks import Ranks, pack, unpack
from ..table.distributed import DistributedTable, fetch_rows
from ..validation import FLOAT_DTYPES, dtype_name
from . import op
from .checks import OP, check_call, check_values

MASK_LEGEND = "[n], one for each of this rank's rows,"


@dataclass(frozen=True)
class Rows:
    """The rows of all ranks, as this one sees them."""

    ranks: Ranks
    shards: list[Tensor]  # here, [n, D] together
    num_rows: int  # of all ranks
    version: int
    takes_gradient: bool  # it is a DTensor
    requires_grad: bool  # and wants d_table


@dataclass(frozen=True)
class Call:
    """What all ranks know of a call once the headers have been exchanged."""

    rows: Rows
    k: int
    batches: list[int]  # B of each rank
    excludes: list[int]  # E of each rank
    rank_rows: list[int]  # n of each rank
    any_gradient: bool  # some rank will ask for d_queries, or all for d_table

    @property
    def first_row(self) -> int:
        return sum(self.rank_rows[: self.rows.ranks.rank])


def search(
    queries: Tensor, table: Any, k: int, exclude: Tensor | None, row_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(scores [B, k], indices [B, k]) of this rank's queries over the rows of all ranks."""
    rows = rows_of(table)
    call = _agree(rows, queries, k, exclude, row_mask)
    if rows.requires_grad or (torch.is_grad_enabled() and queries.requires_grad):
        return _Differentiable.apply(queries, rows.shards[0], call, exclude, row_mask)
    found = _search(queries.detach(), call, exclude, row_mask)
    return found.scores, found.indices


def rows_of(table: Any) -> Rows:
    """The rows behind a DistributedTable, or behind a DTensor spread by rows over a mesh of one axis."""
    if isinstance(table, DistributedTable):
        shards = list(table.local.shards)
        requires_grad = any(shard.requires_grad for shard in shards)
        ranks = table.ranks.serving(OP)
        return Rows(ranks, shards, table.num_rows, table.version, False, requires_grad)
    mesh = table.device_mesh
    if mesh.ndim != 1 or not table.placements[0].is_shard(0):
        raise ValueError(
            f"{OP}: table must be a DTensor placed Shard(0) on a mesh of one axis, got {table.placements} "
            f"on a mesh of {mesh.ndim}"
        )
    if table.dim() != 2:
        raise ValueError(f"{OP}: table must be [N, D], 2 axes, got a DTensor {list(table.shape)}")
    local = table.to_local()
    requires_grad = torch.is_grad_enabled() and table.requires_grad
    return Rows(Ranks(OP, mesh.get_group(), local.device), [local], table.shape[0], 0, True, requires_grad)


def _agree(rows: Rows, queries: Tensor, k: int, exclude: Tensor | None, row_mask: Tensor | None) -> Call:
    """Check this rank's arguments, then those of all ranks against each other."""
    header, problem = [0] * 8, None
    try:
        check_call(queries, rows.shards, k, exclude, row_mask, rows.num_rows, MASK_LEGEND)
        check_values(rows.num_rows, exclude)
        if rows.requires_grad and not rows.takes_gradient:
            raise ValueError(
                f"{OP}: table must be a DTensor to receive a gradient, got a DistributedTable that requires "
                "one"
            )
        # A backend that cannot serve says so here, before the others wait.
        op.backend_for(queries, rows.shards, k, exclude, row_mask)
        header = [
            k,
            FLOAT_DTYPES.index(queries.dtype),
            rows.version,
            int(rows.requires_grad),
            queries.shape[0],
            0 if exclude is None else exclude.shape[1],
            sum(shard.shape[0] for shard in rows.shards),
            int(rows.requires_grad or (torch.is_grad_enabled() and queries.requires_grad)),
        ]
    except (TypeError, ValueError) as error:
        problem = error
    headers = rows.ranks.agree("mips_topk", header, problem)
    kinds = [
        f"k={k}, queries {dtype_name(FLOAT_DTYPES[dtype])}, table of version {version} that "
        f"{'wants a' if wants else 'wants no'} gradient"
        for k, dtype, version, wants, *_ in headers
    ]
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"{OP}: k, the dtype of queries, and the table's version and gradient must be the same on "
                f"all ranks, got {kinds[0]} on rank 0 and {kind} on rank {rank}"
            )
    batches, excludes, rank_rows, gradients = [list(column) for column in zip(*headers, strict=True)][4:]
    if sum(rank_rows) != rows.num_rows:
        raise ValueError(
            f"{OP}: table must have N={rows.num_rows} rows, as it says, on its ranks together, got "
            f"{rank_rows}"
        )
    return Call(rows, k, batches, excludes, rank_rows, any(gradients))


@dataclass(frozen=True)
class Found:
    """What a search leaves for the caller and for the backward pass."""

    scores: Tensor  # [B, k]
    indices: Tensor  # [B, k]
    all_queries: Tensor  # [sum of B, D], of all ranks in their order
    all_indices: Tensor | None = None  # [sum of B, k]; None where no rank wants a gradient
    rows: Tensor | None = None  # [B, k, D]


def _search(queries: Tensor, call: Call, exclude: Tensor | None, row_mask: Tensor | None) -> Found:
    ranks, k, batch = call.rows.ranks, call.k, queries.shape[0]
    all_queries, all_excluded = _gather_queries(queries, exclude, call)
    candidates = pack(*_search_here(all_queries, all_excluded, row_mask, call))
    # Each rank gets back what was found for its own queries, so this is a W-th of an all-gather.
    candidates = ranks.exchange(candidates, call.batches, [batch] * ranks.size, "candidates")
    found_scores, found_indices = unpack(candidates, (torch.float32, k), (torch.int64, k))  # [W B, k]
    scores, indices = first_k(found_scores, found_indices, ranks.size)
    if not call.any_gradient:
        return Found(scores, indices, all_queries)
    all_indices = ranks.gather(indices, call.batches, "the chosen ids")  # [sum of B, k]
    places = [count * k for count in call.batches]
    rows = fetch_rows(
        ranks, call.rows.shards, call.rank_rows, indices.flatten(), all_indices.flatten(), places
    )
    return Found(scores, indices, all_queries, all_indices, rows.view(batch, k, queries.shape[1]))


def _gather_queries(queries: Tensor, exclude: Tensor | None, call: Call) -> tuple[Tensor, Tensor | None]:
    """The queries [sum of B, D] and excluded global ids [sum of B, E] of all ranks, E the largest of any."""
    width, widest = queries.shape[1], max(call.excludes)
    padded = queries.new_full((queries.shape[0], widest), -1, dtype=torch.int64)
    if exclude is not None:
        padded[:, : exclude.shape[1]] = exclude
    packed = call.rows.ranks.gather(pack(queries, padded), call.batches, "queries")
    all_queries, all_excluded = unpack(packed, (queries.dtype, width), (torch.int64, widest))
    return all_queries, all_excluded if widest > 0 else None


def _search_here(
    queries: Tensor, excluded: Tensor | None, row_mask: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    """The k best of the rows here for all queries, with global ids; -1 and -inf where there are fewer."""
    first, rows_here = call.first_row, call.rank_rows[call.rows.ranks.rank]
    scores = queries.new_full((queries.shape[0], call.k), -torch.inf, dtype=torch.float32)
    indices = torch.full_like(scores, -1, dtype=torch.int64)
    k = min(call.k, rows_here)
    if k > 0:
        if excluded is not None:
            inside = (excluded >= first) & (excluded < first + rows_here)
            excluded = torch.where(inside, excluded - first, -1)
        shards = [shard.detach() for shard in call.rows.shards]
        found, ids, _ = torch.ops.realm_kernels.mips_topk(queries, shards, k, excluded, row_mask, False, [])
        scores[:, :k] = found
        indices[:, :k] = torch.where(ids >= 0, ids + first, -1)
    return scores, indices


def first_k(scores: Tensor, indices: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    """The k first of W results by score, then id, then nothing: [W B, k] -> [B, k].

    A stable sort of the scores is enough: each result is sorted, and the ids of later ranks are larger.
    """
    k = scores.shape[1]
    scores = scores.view(num_ranks, -1, k).transpose(0, 1).flatten(1)  # [B, W k]
    indices = indices.view(num_ranks, -1, k).transpose(0, 1).flatten(1)
    # Floats in their order as integers, which have a number below -inf for what is no row at all.
    bits = scores.view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(indices < 0, -(1 << 31))
    order = order.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), indices.gather(1, order)


class _Differentiable(torch.autograd.Function):
    """The search with its gradients: what travels, around the op's own backward formula."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, rows: Tensor, call: Call, exclude: Tensor | None, row_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        found = _search(queries, call, exclude, row_mask)
        ctx.ranks, ctx.batches, ctx.first_row = call.rows.ranks, call.batches, call.first_row
        ctx.rows_here, ctx.table_dtype = call.rank_rows[call.rows.ranks.rank], rows.dtype
        for_table = (found.all_queries, found.all_indices) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(queries, found.indices, found.rows, *for_table)
        ctx.mark_non_differentiable(found.indices)
        return found.scores, found.indices

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor, _d_indices: Tensor) -> tuple[Any, ...]:
        queries, indices, rows, all_queries, all_indices = ctx.saved_tensors
        backward = torch.ops.realm_kernels.mips_topk_bwd
        d_queries = d_rows = None
        if ctx.needs_input_grad[0]:
            d_queries, _ = backward(d_scores, queries, indices, rows, 0, ctx.table_dtype, True, False)
        if ctx.needs_input_grad[1]:
            all_d_scores = ctx.ranks.gather(d_scores.contiguous(), ctx.batches, "gradients of the scores")
            here = (all_indices >= ctx.first_row) & (all_indices < ctx.first_row + ctx.rows_here)
            # In the order of ranks, queries and places: the one in which one process adds them up.
            chosen = all_indices[here][:, None] - ctx.first_row  # [c, 1], c places that chose a row here
            d_chosen = all_d_scores[here][:, None]
            by = all_queries[here.nonzero()[:, 0]]  # [c, D]
            if len(chosen) > 0:
                _, d_rows = backward(d_chosen, by, chosen, rows, ctx.rows_here, ctx.table_dtype, False, True)
            else:
                d_rows = rows.new_zeros(ctx.rows_here, rows.shape[2])
        return d_queries, d_rows, None, None, None
