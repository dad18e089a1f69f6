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
from .gpu import repair_counter
from .triton_plan import ALIGNMENT, CODE_TERMS, RESCORE_REGISTERS, RESCORE_ROWS, Plan, ceil_div, sort_keys
from .triton_rescore import repair_kernel, rescore_kernel
from .triton_scan import INTERPRETED, prepare_kernel, scan_kernel
from .triton_select import bound_kernel, finish_kernel, lower_kernel, select_kernel, shrink_kernel

BOUND_PART = 1024  # groups whose bounds a program forms: eight a thread
LOWER_ROWS = 1024  # rows a program looks at to lower bounds: eight a thread


@dataclass(frozen=True)
class Codes:
    """int8 codes of the rows of a piece, as table/device_codes.py makes them."""

    mean: Tensor  # [D]
    codes: Tensor  # [N / G, G, D32]
    bounds: Tensor  # [N / G, 3]


@dataclass(frozen=True)
class Piece:
    """The arguments of the op for rows [first_row, first_row + N) of the table."""

    queries: Tensor  # [B, D]
    rows: Tensor  # [N, D]
    first_row: int
    exclude: Tensor  # [B, E]
    row_mask: Tensor | None  # [N]
    codes: Codes | None = None

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
        self.ceiling = self._take(torch.int64, batch)
        self.terms = self._take(torch.float32, CODE_TERMS, batch)
        self.held_selected, self.held_keys = (
            self._take(torch.int64, batch, width) for width in triton_plan.held_widths(plan)
        )
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
        self._piece = piece
        self._plan = plan
        self._space = workspace
        self._start = start
        self._batch = stop - start
        self._gather = piece.gather_arguments(start, stop)
        # Where U comes from, for select and repair.
        self._bounds: dict[str, Any] = dict(
            group_max=workspace.group_max,
            group_norm=workspace.group_norm,
            slope=workspace.slope,
            offset=workspace.offset,
        )
        self._ceiling: Tensor | None = None
        self._codes: dict[str, Any] = dict(
            terms=None,
            codes=None,
            bounds=None,
            num_queries=self._batch,
            stride_code=0,
            float32_error=0.0,
            BLOCK_D=1,
        )
        workspace.begin_keys()

    def answer(self, scores: Tensor, indices: Tensor) -> None:
        """Fill scores [b, k] and indices [b, k]."""
        plan, space, k = self._plan, self._space, scores.shape[1]
        self.scan()
        if plan.lowers:
            self._begin_passes()
        for _ in range(plan.early):
            self.rescore(self.select())
            self.lower()
        for first in range(0, k, plan.top):
            of_pass = slice(first, min(first + plan.top, k))
            self.finish(self.rescore(self.select()), scores[:, of_pass], indices[:, of_pass])
            self.repair(scores[:, of_pass], indices[:, of_pass])
            if of_pass.stop < k:
                space.ceiling.copy_(space.kth)
                self.lower()

    def _begin_passes(self) -> None:
        """Bounds are to be lowered: form them where the maxima are. No row has been returned yet."""
        plan, space = self._plan, self._space
        if self._bounds["group_norm"] is not None:
            bound_kernel[(self._batch, ceil_div(plan.num_groups, BOUND_PART))](
                **self._bounds, num_groups=plan.num_groups, PART=BOUND_PART
            )
            self._bounds |= dict(group_norm=None, slope=None, offset=None)
        space.ceiling.fill_(torch.iinfo(torch.int64).max)
        self._ceiling = space.ceiling

    def lower(self) -> None:
        """U of the groups selected last: the best of what is left in them."""
        plan, space = self._plan, self._space
        slots = max(1, LOWER_ROWS // plan.group)
        lower_kernel[(self._batch, ceil_div(plan.selected, slots))](
            keys=space.held_keys,
            selected=space.held_selected,
            ceiling=space.ceiling,
            group_max=space.group_max,
            num_groups=plan.num_groups,
            num_slots=plan.selected,
            SLOTS=slots,
            GROUP=plan.group,
        )
        space.left_out.fill_(torch.iinfo(torch.int64).min)
        space.begin_keys()

    def scan(self) -> None:
        plan, space, gather = self._plan, self._space, self._gather
        query_blocks = ceil_div(self._batch, plan.scan.block_b)
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
        scan_kernel[
            (
                query_blocks,
                min(tiles, ceil_div(scan_programs(space.device, plan.scan.programs_per_sm), query_blocks)),
            )
        ](
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
            BLOCK_B=plan.scan.block_b,
            BLOCK_N=plan.block_n,
            GROUP=plan.group,
            HAS_MASK=gather["HAS_MASK"],
            UPCAST=INTERPRETED,
            STAGES=plan.scan.stages,
            num_warps=plan.scan.warps,
        )

    def select(self) -> Tensor:
        """Keys of (U, group) of the groups to rescore [B, m]."""
        plan, space = self._plan, self._space
        part, keep = triton_plan.select_part(plan.num_groups, plan.selected)
        parts = ceil_div(plan.num_groups, part)
        best = space.keys(self._batch, parts * keep)
        select_kernel[(self._batch, parts)](
            **self._bounds,
            ceiling=self._ceiling,
            best=best,
            left_out=space.left_out,
            num_groups=plan.num_groups,
            PART=part,
            TOP=plan.selected,
            KEEP=keep,
            GROUP=plan.group,
            num_warps=triton_plan.sort_warps(part),
            maxnreg=triton_plan.sort_registers(part),
        )
        return self._shrink(best, plan.selected, to_one_list=True, group=plan.group)

    def rescore(self, selected: Tensor) -> Tensor:
        """Keys of (canonical score, row) of the rows of the selected groups [B, m * G]."""
        space, plan = self._space, self._plan
        if plan.lowers:
            space.held_selected[: self._batch].copy_(selected)
            keys = space.held_keys[: self._batch]
        else:
            keys = space.keys(self._batch, selected.shape[1] * plan.group)
        launch_rescore(self._gather, selected, keys, ceiling=self._ceiling)
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
            stride_out=scores.stride(0),
            PART=sort,
            TOP=plan.top,
            REPAIRED=repaired,
            num_warps=triton_plan.sort_warps(sort),
            maxnreg=triton_plan.sort_registers(sort),
        )

    def repair(self, scores: Tensor, indices: Tensor) -> None:
        plan, space = self._plan, self._space
        best = space.keys(self._batch, plan.repair_parts * plan.top)
        repair_kernel[(self._batch, plan.repair_parts)](
            **self._gather,
            **self._bounds,
            **self._codes,
            ceiling=self._ceiling,
            flags=space.flags,
            kth=space.kth,
            best=best,
            num_groups=plan.num_groups,
            GROUP=plan.group,
            PART=triton_plan.REPAIR_LOOK,
            TOP=plan.top,
            num_warps=triton_plan.repair_warps(plan.top),
            maxnreg=triton_plan.repair_registers(plan.top),
        )
        self.finish(best, scores, indices, repaired=True)

    def _shrink(
        self,
        keys: Tensor,
        top: int,
        to_one_list: bool = False,
        group: int | None = None,
        only_flagged: bool = False,
    ) -> Tensor:
        """The `top` largest; with `group`, of the indices' rows, the largest of the others is noted."""
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
                NOTE=group is not None,
                GROUP=group or 1,
                ONLY_FLAGGED=only_flagged,
                num_warps=triton_plan.sort_warps(sort),
                maxnreg=triton_plan.sort_registers(sort),
            )
            keys = best
        return keys


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory a program may have."""
    if device.type == "cpu":
        return triton_plan.SHARED_BYTES
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


@functools.cache
def scan_programs(device: torch.device, per_sm: int) -> int:
    """Scan programs that run at once; the interpreter has two, so that they share tiles as on a GPU."""
    if device.type == "cpu":
        return 2
    return per_sm * torch.cuda.get_device_properties(device).multi_processor_count


def launch_rescore(
    gather: dict[str, Any],
    selected: Tensor | None,
    keys: Tensor,
    first_row: int = 0,
    ceiling: Tensor | None = None,
    staged: Tensor | None = None,
) -> None:
    """Fill keys [B, n] with the rows of selected groups [B, m], or with the n rows from first_row on.

    staged: [B, n, D], the rows themselves, where a kernel cannot read them in their place.
    """
    if staged is not None:
        gather = gather | dict(rows=staged, stride_row=staged.stride(1), stride_d=1)
    batch, positions = keys.shape
    rescore_kernel[(batch, ceil_div(positions, RESCORE_ROWS))](
        **gather,
        selected=selected,
        ceiling=ceiling,
        keys=keys,
        num_positions=positions,
        first_position=first_row,
        GROUP=1 if selected is None else positions // selected.shape[1],
        BLOCK_R=RESCORE_ROWS,
        SELECTED=selected is not None,
        STAGED=staged is not None,
        maxnreg=RESCORE_REGISTERS,
    )


def value_of(keys: Tensor) -> Tensor:
    """The values of keys, as value_of() of triton_keys.py."""
    high = (keys >> 32).int()
    values = torch.where(high < 0, high ^ 0x7FFFFFFF, high).view(torch.float32)
    return values.masked_fill(keys == torch.iinfo(torch.int64).min, -torch.inf)


def index_of(keys: Tensor) -> Tensor:
    """The indices of keys, 0 where there is none."""
    indices = 0x7FFFFFFF - (keys & 0x7FFFFFFF)
    return indices.masked_fill(keys == torch.iinfo(torch.int64).min, 0)


def key_with(indices: Tensor) -> Tensor:
    """Keys of value 0 with these indices."""
    return indices ^ 0x7FFFFFFF


def decoded(keys: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """Scores and global ids of keys; -inf and -1 for none."""
    missing = keys == torch.iinfo(torch.int64).min
    return value_of(keys), (first_row + index_of(keys)).masked_fill(missing, -1)
