"""The launches of the Triton backend of mips_topk, and the memory they share."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_plan
from .triton_plan import ALIGNMENT, RESCORE_REGISTERS, RESCORE_ROWS, Plan, ceil_div, sort_keys
from .triton_rescore import repair_kernel, rescore_kernel
from .triton_scan import INTERPRETED, prepare_kernel, scan_kernel
from .triton_select import finish_kernel, select_kernel, shrink_kernel

PROGRAMS_PER_SM = 2


@dataclass(frozen=True)
class Piece:
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


class Workspace:
    """One allocation, cut into the arrays of a query block; the allocator ties it to the current stream."""

    def __init__(self, plan: Plan, queries: Tensor) -> None:
        dim = queries.shape[1]
        self.device = queries.device
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


class Block:
    """The launches that answer queries [start, stop) over one piece, in the order of their definition."""

    def __init__(self, piece: Piece, plan: Plan, workspace: Workspace, start: int, stop: int) -> None:
        self._plan = plan
        self._space = workspace
        self._batch = stop - start
        self._gather = piece.gather_arguments(start, stop)
        workspace.begin_keys()

    def scan(self) -> None:
        plan, space, gather = self._plan, self._space, self._gather
        query_blocks = ceil_div(self._batch, plan.block_b)
        dims = dict(DIM=gather["DIM"], D_PADDED=plan.dim_padded(gather["DIM"]), BLOCK_D=plan.block_d)
        prepare_kernel[(self._batch,)](
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
        scan_kernel[(query_blocks, min(tiles, ceil_div(_programs(space.device), query_blocks)))](
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
            UPCAST=INTERPRETED,
            STAGES=triton_plan.SCAN_STAGES,
            num_warps=triton_plan.scan_warps(plan.block_b),
        )

    def select(self) -> Tensor:
        """Keys of (U, group) of the groups to rescore [B, m]."""
        plan, space = self._plan, self._space
        part, keep = triton_plan.select_part(plan.num_groups, plan.selected)
        parts = ceil_div(plan.num_groups, part)
        best = space.keys(self._batch, parts * keep)
        select_kernel[(self._batch, parts)](
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
        keys = self._space.keys(self._batch, selected.shape[1] * self._plan.group)
        launch_rescore(self._gather, selected, keys)
        return keys

    def finish(self, keys: Tensor, scores: Tensor, indices: Tensor, repaired: bool = False) -> None:
        plan, space = self._plan, self._space
        keys = self._shrink(keys, plan.top, only_flagged=repaired)
        sort = sort_keys(keys.shape[1], plan.top)
        finish_kernel[(self._batch,)](
            keys=keys,
            left_out=space.left_out,
            flags=space.flags,
            kth=space.kth,
            repairs=repair_counter(keys.device),
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
        repair_kernel[(self._batch, plan.repair_parts)](
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
            shrink_kernel[(self._batch, width // top)](
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


_repairs: dict[torch.device, Tensor] = {}


def repair_counter(device: torch.device) -> Tensor:
    if device not in _repairs:
        _repairs[device] = torch.zeros(1, dtype=torch.int64, device=device)
    return _repairs[device]


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory a program may have."""
    if device.type == "cpu":
        return triton_plan.SHARED_BYTES
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


@functools.cache
def _programs(device: torch.device) -> int:
    """Scan programs that run at once; the interpreter has two, so that they share tiles as on a GPU."""
    if device.type == "cpu":
        return 2
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def launch_rescore(gather: dict[str, Any], selected: Tensor | None, keys: Tensor, first_row: int = 0) -> None:
    """Fill keys [B, n] with the rows of selected groups [B, m], or with the n rows from first_row on."""
    batch, positions = keys.shape
    rescore_kernel[(batch, ceil_div(positions, RESCORE_ROWS))](
        **gather,
        selected=selected,
        keys=keys,
        num_positions=positions,
        first_position=first_row,
        GROUP=1 if selected is None else positions // selected.shape[1],
        BLOCK_R=RESCORE_ROWS,
        SELECTED=selected is not None,
        maxnreg=RESCORE_REGISTERS,
    )
