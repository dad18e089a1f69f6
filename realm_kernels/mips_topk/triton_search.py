"""A search of the Triton backend of mips_topk: pieces of shards, blocks of queries, and how they merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..table import device_stream, quantized
from . import triton_plan
from .gpu import PIECE_ROWS, WORKSPACE_BYTES, on_device
from .merging import merge
from .triton_coded import CodedBlock, StagedBlock
from .triton_keys import NOTHING
from .triton_launch import Block, Codes, Piece, Workspace, decoded, launch_rescore, shared_bytes
from .triton_plan import Plan
from .triton_tuning import configured

DENSE_ROWS = 1 << 16  # at least so many rows are scored at once where every row is

Planner = Callable[..., Plan]


def search(
    queries: Tensor,
    shards: list[Tensor],
    k: int,
    exclude: Tensor | None = None,
    row_mask: Tensor | None = None,
    codes: Sequence[Tensor] = (),
    planner: Planner = triton_plan.plan_for,
) -> tuple[Tensor, Tensor]:
    """(scores [B, k], indices [B, k]) as the contract defines them; `planner` plans the search of a piece.

    Shards may be in host memory. codes: quantized.Int8Codes.tensors() on the queries' device, or none.
    """
    if queries.shape[0] == 0:
        return queries.new_empty((0, k), dtype=torch.float32), queries.new_empty((0, k), dtype=torch.int64)
    if exclude is None:
        exclude = queries.new_empty((queries.shape[0], 0), dtype=torch.int64)
    with on_device(queries.device):
        plans = _plans(queries, shards, k, exclude.shape[1], codes, planner)
        result: tuple[Tensor, Tensor] | None = None
        for first, rows, piece_codes, plan in plans:
            mask = None if row_mask is None else row_mask[first : first + rows.shape[0]]
            piece = Piece(queries, rows, first, exclude, mask, piece_codes)
            found = _search_piece(piece, k, plan)
            result = found if result is None else merge(result, found)
    assert result is not None  # 1 <= k <= N: some shard has rows
    return result


def _plans(
    queries: Tensor,
    shards: list[Tensor],
    k: int,
    num_excluded: int,
    codes: Sequence[Tensor],
    planner: Planner,
) -> Iterator[tuple[int, Tensor, Codes | None, Plan]]:
    """(first row, rows, codes, plan) of each piece. Rows of the host come in windows, unless codes serve."""
    batch, dim = queries.shape

    def plan_of(rows: Tensor, **more: Any) -> Plan:
        shape = (batch, rows.shape[0], dim, k, num_excluded, queries.dtype, rows.dtype)
        return planner(*shape, shared_bytes(queries.device), **more)

    on_host = is_on_host(queries, shards)
    if codes and quantized.are_for_the_cpu(codes):
        codes = ()
    for first, shard, codes_of_shard in _with_codes(shards, codes):
        pieces = list(_split(first, shard, codes_of_shard))
        for start, rows, piece_codes in pieces:
            plan = None
            if piece_codes is not None:
                group = piece_codes.codes.shape[1]
                staged = dim * rows.element_size() if on_host and not device_stream.is_pinned([rows]) else 0
                plan = plan_of(rows, code_group=group, staged_bytes=staged)
                if plan.kept is None:
                    plan = None
            if plan is not None:
                yield start, rows, piece_codes, plan
            elif on_host:
                workspace = WORKSPACE_BYTES - device_stream.BUFFERS * device_stream.WINDOW_BYTES
                for window_start, window in device_stream.windows([(start, rows)], queries.device):
                    yield window_start, window, None, plan_of(window, workspace=workspace)
            else:
                yield start, rows, None, plan_of(rows)


def is_on_host(queries: Tensor, shards: Sequence[Tensor]) -> bool:
    return shards[0].device != queries.device


def _with_codes(shards: list[Tensor], codes: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, Codes | None]]:
    """(first row, shard, its codes) of the shards that have rows."""
    for number, (first, shard) in enumerate(device_stream.spans(shards)):
        if shard.shape[0] > 0:
            of_shard = Codes(codes[0], *codes[2 + 2 * number : 4 + 2 * number]) if codes else None
            yield first, shard, of_shard


def _split(first: int, shard: Tensor, codes: Codes | None) -> Iterator[tuple[int, Tensor, Codes | None]]:
    for start in range(0, shard.shape[0], PIECE_ROWS):
        rows = shard[start : start + PIECE_ROWS]
        if codes is not None:
            group = codes.codes.shape[1]
            groups = slice(start // group, start // group + triton_plan.ceil_div(rows.shape[0], group))
            yield first + start, rows, Codes(codes.mean, codes.codes[groups], codes.bounds[groups])
        else:
            yield first + start, rows, None


def _search_piece(piece: Piece, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
    if triton_plan.scores_all(plan, piece.rows.shape[0]):
        return _search_densely(piece, k)
    batch = piece.queries.shape[0]
    scores = piece.queries.new_empty((batch, k), dtype=torch.float32)
    indices = piece.queries.new_empty((batch, k), dtype=torch.int64)
    workspace = Workspace(plan, piece.queries)
    kind = Block if piece.codes is None else StagedBlock if plan.staged_bytes else CodedBlock
    first = min(plan.batch, batch)
    plan = configured(
        plan,
        piece.queries.device,
        (piece.rows.shape[0], piece.queries.shape[1]),
        lambda tried: kind(piece, tried, workspace, 0, first).scan(),
    )
    for start in range(0, batch, plan.batch):
        stop = min(start + plan.batch, batch)
        kind(piece, plan, workspace, start, stop).answer(scores[start:stop], indices[start:stop])
    return scores, indices


def _dense_rows(num_rows: int, k: int) -> int:
    """Rows that are scored at once: no more than a grid takes, however many are wanted."""
    return min(num_rows, max(k, DENSE_ROWS), triton_plan.MAX_POSITIONS)


def _search_densely(piece: Piece, k: int) -> tuple[Tensor, Tensor]:
    """Every row scored, a chunk at a time, and merged by the library."""
    batch, num_rows = piece.queries.shape[0], piece.rows.shape[0]
    chunk = _dense_rows(num_rows, k)
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
        scores[start:stop], indices[start:stop] = decoded(best, piece.first_row)
    return scores, indices
