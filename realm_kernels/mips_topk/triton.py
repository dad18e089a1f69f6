"""The Triton backend of mips_topk: workspace and launches. Plans are made in triton_plan.py."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends, native
from . import triton_plan
from .triton_plan import ALIGNMENT, MAX_K, WORKSPACE_BYTES, Plan, ceil_div, sort_keys

PIECE_ROWS = 1 << 30  # a shard is searched in pieces of so many rows: row numbers fit 32 bits
RESCORE_ROWS = 128  # of a program: one a thread
RESCORE_REGISTERS = 96  # of a thread: left alone, the assembler aims for 64 and spills one
DENSE_ROWS = 1 << 16  # at least so many rows are scored at once where k is beyond the fused search
PROGRAMS_PER_SM = 2

Planner = Callable[..., Plan]


def refuses(
    queries: Tensor, shards: list[Tensor], k: int, exclude: Tensor | None, row_mask: Tensor | None
) -> str | None:
    missing = native.triton_missing()
    if missing:
        return missing
    if queries.device.type == "cuda":
        if torch.version.hip is not None or torch.cuda.get_device_capability(queries.device) < (8, 0):
            return "it needs an NVIDIA GPU of compute capability 8.0 or higher"
        return None
    if queries.device.type == "cpu" and backends.forced_backend() == "triton":
        from . import triton_kernels

        if triton_kernels.INTERPRETED:
            return None
    return f"it serves CUDA tensors, got {queries.device} (CPU tensors with TRITON_INTERPRET=1, when forced)"


def forward(
    queries: Tensor, shards: list[Tensor], k: int, exclude: Tensor | None, row_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    return search(queries, shards, k, exclude, row_mask)


def search(
    queries: Tensor,
    shards: list[Tensor],
    k: int,
    exclude: Tensor | None = None,
    row_mask: Tensor | None = None,
    planner: Planner = triton_plan.plan_for,
) -> tuple[Tensor, Tensor]:
    """(scores [B, k], indices [B, k]) as the contract defines them; `planner` makes the plan of each
    piece."""
    scores = queries.new_full((queries.shape[0], k), -torch.inf, dtype=torch.float32)
    indices = torch.full_like(scores, -1, dtype=torch.int64)
    if queries.shape[0] == 0:
        return scores, indices
    with _on_device(queries.device):
        for number, piece in enumerate(_pieces(queries, shards, exclude, row_mask)):
            if k <= MAX_K:
                found = _search_piece(piece, k, planner)
            else:
                found = _search_densely(piece, k)
            scores, indices = found if number == 0 else merge((scores, indices), found)
    return scores, indices


def merge(earlier: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The k first of two results [B, k], where all ids of `later` are larger: by score, then id, then
    nothing."""
    scores = torch.cat([earlier[0], later[0]], dim=1)  # [B, 2k]
    indices = torch.cat([earlier[1], later[1]], dim=1)
    bits = scores.view(torch.int32)
    high = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(indices < 0, -(1 << 31))
    order = high.sort(dim=1, descending=True, stable=True).indices[:, : earlier[0].shape[1]]
    return scores.gather(1, order), indices.gather(1, order)


_repairs: dict[torch.device, Tensor] = {}


def _repair_counter(device: torch.device) -> Tensor:
    if device not in _repairs:
        _repairs[device] = torch.zeros(1, dtype=torch.int64, device=device)
    return _repairs[device]


def repairs(device: torch.device | str) -> int:
    """How many queries of this process had to be repaired on `device`. Waits for the device."""
    return int(_repair_counter(torch.device(device)))


@dataclass(frozen=True)
class _Piece:
    """The arguments of the op for rows [first_row, first_row + N) of the table."""

    queries: Tensor  # [B, D]
    rows: Tensor  # [N, D]
    first_row: int
    exclude: Tensor  # [B, E]
    row_mask: Tensor | None  # [N]

    def gather_arguments(self, start: int, stop: int) -> dict[str, Any]:
        """What a kernel needs to score chosen rows for queries [start, stop)."""
        return dict(
            queries=self.queries[start:stop],
            rows=self.rows,
            row_mask=self.row_mask,
            exclude=self.exclude[start:stop],
            num_rows=self.rows.shape[0],
            first_row=self.first_row,
            num_excluded=self.exclude.shape[1],
            stride_query_b=self.queries.stride(0),
            stride_query_d=self.queries.stride(1),
            stride_row=self.rows.stride(0),
            stride_d=self.rows.stride(1),
            stride_mask=0 if self.row_mask is None else self.row_mask.stride(0),
            stride_exclude_b=self.exclude.stride(0),
            stride_exclude=self.exclude.stride(1),
            DIM=self.rows.shape[1],
            HAS_MASK=self.row_mask is not None,
        )


def _pieces(
    queries: Tensor, shards: list[Tensor], exclude: Tensor | None, row_mask: Tensor | None
) -> Iterator[_Piece]:
    if exclude is None:
        exclude = queries.new_empty((queries.shape[0], 0), dtype=torch.int64)
    first_row = 0
    for shard in shards:
        for rows in shard.split(PIECE_ROWS):
            if rows.shape[0] > 0:
                mask = None if row_mask is None else row_mask[first_row : first_row + rows.shape[0]]
                yield _Piece(queries, rows, first_row, exclude, mask)
                first_row += rows.shape[0]


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device's current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _search_piece(piece: _Piece, k: int, planner: Planner) -> tuple[Tensor, Tensor]:
    batch, dim = piece.queries.shape
    plan = planner(
        batch,
        piece.rows.shape[0],
        dim,
        k,
        piece.exclude.shape[1],
        piece.queries.dtype,
        piece.rows.dtype,
        _shared_bytes(piece.queries.device),
    )
    scores = piece.queries.new_empty((batch, k), dtype=torch.float32)
    indices = piece.queries.new_empty((batch, k), dtype=torch.int64)
    workspace = _Workspace(plan, piece.queries)
    for start in range(0, batch, plan.batch):
        stop = min(start + plan.batch, batch)
        block = _Block(piece, plan, workspace, start, stop)
        block.scan()
        block.finish(block.rescore(block.select()), scores[start:stop], indices[start:stop])
        block.repair(scores[start:stop], indices[start:stop])
    return scores, indices


def _shared_bytes(device: torch.device) -> int:
    """Shared memory a program may have."""
    if device.type == "cpu":
        return triton_plan.SHARED_BYTES
    import triton

    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


class _Workspace:
    """One allocation, cut into the arrays of a query block; the allocator ties it to the current stream."""

    def __init__(self, plan: Plan, queries: Tensor) -> None:
        dim = queries.shape[1]
        self._memory = queries.new_empty(triton_plan.workspace_bytes(plan, dim), dtype=torch.uint8)
        self._taken = 0
        batch, groups = plan.batch, plan.num_groups
        even, odd = triton_plan.scratch_widths(plan)
        self.group_max = self._take(torch.float32, batch, groups)
        self.group_norm = self._take(torch.float32, groups)
        self.scanned = self._take(plan.scan_dtype, batch, plan.dim_padded(dim))
        self.slope = self._take(torch.float32, batch)
        self.offset = self._take(torch.float32, batch)
        self.left_out = self._take(torch.int64, batch)
        self.flags = self._take(torch.int32, batch)
        self.kth = self._take(torch.int64, batch)
        self._keys = [self._take(torch.int64, batch * even), self._take(torch.int64, batch * odd)]

    def _take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        start = self._taken
        stop = start + dtype.itemsize * math.prod(shape)
        self._taken = ceil_div(stop, ALIGNMENT) * ALIGNMENT
        return self._memory[start:stop].view(dtype).view(shape)

    def begin_keys(self) -> None:
        """The next keys() is the first of a sequence in the order of scratch_widths()."""
        self._keys_given = 0

    def keys(self, batch: int, width: int) -> Tensor:
        """The next key array [batch, width]; it overwrites the last but one."""
        buffer = self._keys[self._keys_given % 2]
        self._keys_given += 1
        return buffer[: batch * width].view(batch, width)


class _Block:
    """The launches that answer queries [start, stop) over one piece, in the order of their definition."""

    def __init__(self, piece: _Piece, plan: Plan, workspace: _Workspace, start: int, stop: int) -> None:
        from . import triton_kernels

        self._kernels = triton_kernels
        self._plan = plan
        self._space = workspace
        self._batch = stop - start
        self._gather = piece.gather_arguments(start, stop)
        workspace.begin_keys()

    def scan(self) -> None:
        plan, space, gather = self._plan, self._space, self._gather
        query_blocks = ceil_div(self._batch, plan.block_b)
        dims = dict(DIM=gather["DIM"], D_PADDED=plan.dim_padded(gather["DIM"]), BLOCK_D=plan.block_d)
        self._kernels.prepare_kernel[(self._batch,)](
            queries=gather["queries"],
            scanned=space.scanned,
            slope=space.slope,
            offset=space.offset,
            left_out=space.left_out,
            stride_b=gather["stride_query_b"],
            stride_d=gather["stride_query_d"],
            relative=plan.relative,
            **dims,
            num_warps=1,
        )
        tiles = ceil_div(gather["num_rows"], plan.block_n)
        self._kernels.scan_kernel[(query_blocks, min(tiles, self._row_splits(query_blocks)))](
            scanned=space.scanned,
            rows=gather["rows"],
            row_mask=gather["row_mask"],
            group_max=space.group_max,
            group_norm=space.group_norm,
            num_queries=self._batch,
            num_rows=gather["num_rows"],
            num_groups=plan.num_groups,
            stride_row=gather["stride_row"],
            stride_d=gather["stride_d"],
            stride_mask=gather["stride_mask"],
            norm_scale=triton_plan.norm_scale(gather["DIM"]),
            **dims,
            BLOCK_B=plan.block_b,
            BLOCK_N=plan.block_n,
            GROUP=plan.group,
            HAS_MASK=gather["HAS_MASK"],
            UPCAST=self._kernels.INTERPRETED,
            STAGES=triton_plan.SCAN_STAGES,
            num_warps=triton_plan.scan_warps(plan.block_b),
        )

    def _row_splits(self, query_blocks: int) -> int:
        device = self._space.group_max.device
        if device.type == "cpu":
            return 2
        programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
        return ceil_div(programs, query_blocks)

    def select(self) -> Tensor:
        """Keys of (U, group) of the groups to rescore [B, m]."""
        plan, space = self._plan, self._space
        part, keep = triton_plan.select_part(plan.num_groups, plan.selected)
        parts = ceil_div(plan.num_groups, part)
        best = space.keys(self._batch, parts * keep)
        self._kernels.select_kernel[(self._batch, parts)](
            group_max=space.group_max,
            group_norm=space.group_norm,
            slope=space.slope,
            offset=space.offset,
            best=best,
            left_out=space.left_out,
            num_groups=plan.num_groups,
            PART=part,
            TOP=plan.selected,
            KEEP=keep,
            num_warps=triton_plan.sort_warps(part),
        )
        return self._shrink(best, plan.selected, to_one_list=True, note=True)

    def rescore(self, selected: Tensor) -> Tensor:
        """Keys of (canonical score, row) of the rows of the selected groups [B, m * G]."""
        positions = selected.shape[1] * self._plan.group
        keys = self._space.keys(self._batch, positions)
        self._kernels.rescore_kernel[(self._batch, ceil_div(positions, RESCORE_ROWS))](
            **self._gather,
            selected=selected,
            keys=keys,
            num_positions=positions,
            first_position=0,
            GROUP=self._plan.group,
            BLOCK_R=RESCORE_ROWS,
            SELECTED=True,
            maxnreg=RESCORE_REGISTERS,
        )
        return keys

    def finish(self, keys: Tensor, scores: Tensor, indices: Tensor, repaired: bool = False) -> None:
        plan, space = self._plan, self._space
        keys = self._shrink(keys, plan.top, only_flagged=repaired)
        sort = sort_keys(keys.shape[1], plan.top)
        self._kernels.finish_kernel[(self._batch,)](
            keys=keys,
            left_out=space.left_out,
            flags=space.flags,
            kth=space.kth,
            repairs=_repair_counter(keys.device),
            scores=scores,
            indices=indices,
            num_keys=keys.shape[1],
            first_row=self._gather["first_row"],
            k=scores.shape[1],
            PART=sort,
            TOP=plan.top,
            GROUP=plan.group,
            REPAIRED=repaired,
            num_warps=triton_plan.sort_warps(sort),
        )

    def repair(self, scores: Tensor, indices: Tensor) -> None:
        plan, space = self._plan, self._space
        best = space.keys(self._batch, plan.repair_parts * plan.top)
        self._kernels.repair_kernel[(self._batch, plan.repair_parts)](
            **self._gather,
            group_max=space.group_max,
            group_norm=space.group_norm,
            slope=space.slope,
            offset=space.offset,
            flags=space.flags,
            kth=space.kth,
            best=best,
            num_groups=plan.num_groups,
            GROUP=plan.group,
            PART=triton_plan.REPAIR_LOOK,
            TOP=plan.top,
            num_warps=triton_plan.repair_warps(plan.top),
        )
        self.finish(best, scores, indices, repaired=True)

    def _shrink(
        self,
        keys: Tensor,
        top: int,
        to_one_list: bool = False,
        note: bool = False,
        only_flagged: bool = False,
    ) -> Tensor:
        for width in triton_plan.rounds(keys.shape[1], top, to_one_list)[1:]:
            best = self._space.keys(self._batch, width)
            sort = sort_keys(keys.shape[1], top)
            self._kernels.shrink_kernel[(self._batch, width // top)](
                keys=keys,
                best=best,
                left_out=self._space.left_out,
                flags=self._space.flags,
                num_keys=keys.shape[1],
                PART=sort,
                TOP=top,
                NOTE=note,
                ONLY_FLAGGED=only_flagged,
                num_warps=triton_plan.sort_warps(sort),
            )
            keys = best
        return keys


def _search_densely(piece: _Piece, k: int) -> tuple[Tensor, Tensor]:
    """Every row rescored, a chunk at a time, and merged by the library: for k beyond the fused search."""
    from . import triton_kernels

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
        best = indices.new_full((stop - start, k), triton_kernels.NOTHING.value)
        for first in range(0, num_rows, chunk):
            keys = indices.new_empty((stop - start, min(chunk, num_rows - first)))
            triton_kernels.rescore_kernel[(stop - start, ceil_div(keys.shape[1], RESCORE_ROWS))](
                **gather,
                selected=None,
                keys=keys,
                num_positions=keys.shape[1],
                first_position=first,
                GROUP=1,
                BLOCK_R=RESCORE_ROWS,
                SELECTED=False,
                maxnreg=RESCORE_REGISTERS,
            )
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


BACKEND = backends.Backend(name="triton", refuses=refuses, forward=forward)
