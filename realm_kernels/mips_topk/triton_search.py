"""A search of the Triton backend of mips_topk: pieces of shards, blocks of queries, and how they merge."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import triton_plan
from .merging import merge
from .triton_keys import NOTHING
from .triton_launch import Block, Piece, Workspace, launch_rescore, shared_bytes
from .triton_plan import MAX_K, WORKSPACE_BYTES, Plan

PIECE_ROWS = 1 << 30  # a shard is searched in pieces of so many rows: row numbers fit 32 bits
DENSE_ROWS = 1 << 16  # at least so many rows are scored at once where k is beyond the fused search

Planner = Callable[..., Plan]


def search(
    queries: Tensor,
    shards: list[Tensor],
    k: int,
    exclude: Tensor | None = None,
    row_mask: Tensor | None = None,
    planner: Planner = triton_plan.plan_for,
) -> tuple[Tensor, Tensor]:
    """(scores [B, k], indices [B, k]) as the contract defines them; `planner` plans the search of a piece."""
    if queries.shape[0] == 0:
        return queries.new_empty((0, k), dtype=torch.float32), queries.new_empty((0, k), dtype=torch.int64)
    result: tuple[Tensor, Tensor] | None = None
    with _on_device(queries.device):
        for piece in _pieces(queries, shards, exclude, row_mask):
            found = _search_piece(piece, k, planner) if k <= MAX_K else _search_densely(piece, k)
            result = found if result is None else merge(result, found)
    assert result is not None  # 1 <= k <= N: some shard has rows
    return result


def _pieces(
    queries: Tensor, shards: list[Tensor], exclude: Tensor | None, row_mask: Tensor | None
) -> Iterator[Piece]:
    if exclude is None:
        exclude = queries.new_empty((queries.shape[0], 0), dtype=torch.int64)
    first_row = 0
    for shard in shards:
        for rows in shard.split(PIECE_ROWS):
            if rows.shape[0] > 0:
                mask = None if row_mask is None else row_mask[first_row : first_row + rows.shape[0]]
                yield Piece(queries, rows, first_row, exclude, mask)
                first_row += rows.shape[0]


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device's current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _search_piece(piece: Piece, k: int, planner: Planner) -> tuple[Tensor, Tensor]:
    batch, dim = piece.queries.shape
    plan = planner(
        batch,
        piece.rows.shape[0],
        dim,
        k,
        piece.exclude.shape[1],
        piece.queries.dtype,
        piece.rows.dtype,
        shared_bytes(piece.queries.device),
    )
    scores = piece.queries.new_empty((batch, k), dtype=torch.float32)
    indices = piece.queries.new_empty((batch, k), dtype=torch.int64)
    workspace = Workspace(plan, piece.queries)
    for start in range(0, batch, plan.batch):
        stop = min(start + plan.batch, batch)
        block = Block(piece, plan, workspace, start, stop)
        block.scan()
        block.finish(block.rescore(block.select()), scores[start:stop], indices[start:stop])
        block.repair(scores[start:stop], indices[start:stop])
    return scores, indices


def _search_densely(piece: Piece, k: int) -> tuple[Tensor, Tensor]:
    """Every row rescored, a chunk at a time, and merged by the library: for k beyond the fused search."""
    batch, num_rows = piece.queries.shape[0], piece.rows.shape[0]
    chunk = min(num_rows, max(k, DENSE_ROWS))
    # Keys of the chunk and of the rows kept, once more side by side, and twice that for the library's sort.
    a_query = 8 * (chunk + 3 * (chunk + k))
    step = max(1, min(batch, WORKSPACE_BYTES // a_query))
    scores = piece.queries.new_empty((batch, k), dtype=torch.float32)
    indices = piece.queries.new_empty((batch, k), dtype=torch.int64)
    for start in range(0, batch, step):
        stop = min(start + step, batch)
        gather = piece.gather_arguments(start, stop)
        best = indices.new_full((stop - start, k), NOTHING.value)
        for first in range(0, num_rows, chunk):
            keys = indices.new_empty((stop - start, min(chunk, num_rows - first)))
            launch_rescore(gather, None, keys, first)
            best = torch.cat([best, keys], dim=1).topk(k, dim=1).values
        scores[start:stop], indices[start:stop] = _decoded(best, piece.first_row)
    return scores, indices


def _decoded(keys: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """Scores and global ids of keys, as value_of() and index_of() of triton_keys.py."""
    missing = keys == torch.iinfo(torch.int64).min
    high = (keys >> 32).int()
    scores = torch.where(high < 0, high ^ 0x7FFFFFFF, high).view(torch.float32)
    indices = first_row + 0x7FFFFFFF - (keys & 0x7FFFFFFF)
    return scores.masked_fill(missing, -torch.inf), indices.masked_fill(missing, -1)
