"""The launches of the Triton backend of mips_topk where rows have int8 codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..table.device_stream import refuse_capture
from . import triton_plan
from .triton_codes import prepare_codes_kernel, refine_kernel, scan_codes_kernel
from .triton_launch import (
    Block,
    Piece,
    Workspace,
    decoded,
    index_of,
    key_with,
    launch_rescore,
    scan_programs,
    value_of,
)
from .triton_plan import RESCORE_ROWS, Plan, ceil_div

STAGED_BYTES = 16 << 20  # of rows that a repair reads from the host at once, at most
REFINE_COLUMNS = 32  # of a row's codes that a thread holds at once


class CodedBlock(Block):
    """Block whose scan reads codes, and which reads only the rows that their codes do not exclude."""

    def __init__(self, piece: Piece, plan: Plan, workspace: Workspace, start: int, stop: int) -> None:
        super().__init__(piece, plan, workspace, start, stop)
        assert piece.codes is not None
        self._of_rows = piece.codes
        self._bounds |= dict(group_norm=None, slope=None, offset=None)  # the scan stores U itself
        self._codes |= dict(
            terms=workspace.terms,
            codes=piece.codes.codes,
            bounds=piece.codes.bounds,
            stride_code=piece.codes.codes.shape[2],
            float32_error=triton_plan.float32_error(piece.queries.shape[1]),
            BLOCK_D=REFINE_COLUMNS,
        )

    def scan(self) -> None:
        plan, space, gather, codes = self._plan, self._space, self._gather, self._of_rows
        dim = gather["DIM"]
        padded = plan.dim_padded(dim)
        prepare_codes_kernel[(self._batch,)](
            queries=gather["queries"],
            mean=codes.mean,
            scanned=space.scanned,
            terms=space.terms,
            left_out=space.left_out,
            num_queries=self._batch,
            stride_b=gather["stride_query_b"],
            stride_d=gather["stride_query_d"],
            float64_error=triton_plan.float64_error(dim),
            DIM=dim,
            D_PADDED=padded,
            BLOCK_D=plan.block_d,
            num_warps=1,
        )
        query_blocks = ceil_div(self._batch, plan.scan.block_b)
        tiles = ceil_div(gather["num_rows"], plan.block_n)
        scan_codes_kernel[
            (
                query_blocks,
                min(tiles, ceil_div(scan_programs(space.device, plan.scan.programs_per_sm), query_blocks)),
            )
        ](
            scanned=space.scanned,
            terms=space.terms,
            codes=codes.codes,
            bounds=codes.bounds,
            row_mask=gather["row_mask"],
            group_max=space.group_max,
            num_queries=self._batch,
            num_rows=gather["num_rows"],
            num_groups=plan.num_groups,
            stride_row=codes.codes.shape[2],
            stride_mask=gather["stride_mask"],
            D_PADDED=padded,
            BLOCK_B=plan.scan.block_b,
            BLOCK_N=plan.block_n,
            BLOCK_D=plan.block_d,
            GROUP=plan.group,
            HAS_MASK=gather["HAS_MASK"],
            STAGES=plan.scan.stages,
            num_warps=plan.scan.warps,
        )

    def select(self) -> Tensor:
        """Keys of (U, row) of the rows to read [B, kept]."""
        plan = self._plan
        assert plan.kept is not None
        selected = super().select()
        keys = self._space.keys(self._batch, selected.shape[1] * plan.group)
        self._refine(self._gather, 0, selected, keys)
        return self._shrink(keys, plan.kept, to_one_list=True, group=1)

    def rescore(self, selected: Tensor) -> Tensor:
        keys = self._space.keys(*selected.shape)
        launch_rescore(self._gather, selected, keys)
        return keys

    def _refine(self, gather: dict[str, Any], first_query: int, selected: Tensor, keys: Tensor) -> None:
        """Fill keys [b, m * G] with (U, row) of the rows of selected groups [b, m], from first_query on."""
        batch, positions = keys.shape
        refine_kernel[(batch, ceil_div(positions, RESCORE_ROWS))](
            **{name: value for name, value in gather.items() if name not in UNREAD},
            **self._codes | dict(terms=self._space.terms.view(-1)[first_query:]),
            selected=selected,
            keys=keys,
            num_positions=positions,
            GROUP=self._plan.group,
            BLOCK_R=RESCORE_ROWS,
        )


UNREAD = ("rows", "stride_row", "stride_d")  # what the closer look at the codes does not need


class StagedBlock(CodedBlock):
    """CodedBlock over rows that only the host can read: it waits to know which, and gathers them."""

    def __init__(self, piece: Piece, plan: Plan, workspace: Workspace, start: int, stop: int) -> None:
        refuse_capture()
        super().__init__(piece, plan, workspace, start, stop)

    def rescore(self, selected: Tensor) -> Tensor:
        keys = self._space.keys(*selected.shape)
        launch_rescore(self._gather, selected, keys, staged=self._staged(selected))
        return keys

    def repair(self, scores: Tensor, indices: Tensor) -> None:
        """For each flagged query, all rows whose bound reaches the k-th score, some groups at a time."""
        plan, space = self._plan, self._space
        for query in space.flags[: self._batch].nonzero().flatten().tolist():
            last = space.kth[query]
            gather = self._piece.gather_arguments(self._start + query, self._start + query + 1)
            bound = space.group_max[query]
            groups = ((bound >= value_of(last)) & (bound > -torch.inf)).nonzero().flatten()
            best = last.new_empty(0)
            at_once = min(STAGED_BYTES // plan.staged_bytes, triton_plan.MAX_POSITIONS)
            for some in groups.split(max(1, at_once // plan.group)):
                looked_at = last.new_empty(1, some.numel() * plan.group)
                self._refine(gather, query, key_with(some)[None], looked_at)
                rows = looked_at[(looked_at >> 32) >= (last >> 32)][None]
                keys = torch.empty_like(rows)
                if rows.numel() > 0:
                    launch_rescore(gather, rows, keys, staged=self._staged(rows))
                best = torch.cat([best, keys.flatten()])
                best = best.topk(min(plan.top, best.numel())).values
            found = best[: scores.shape[1]]
            scores[query, : found.numel()], indices[query, : found.numel()] = decoded(
                found, self._piece.first_row
            )

    def _staged(self, selected: Tensor) -> Tensor:
        """The rows of these keys [b, n]: [b, n, D] on the GPU."""
        rows, on_gpu = self._piece.rows, selected.device.type == "cuda"
        wanted = index_of(selected).flatten().cpu()
        staging = torch.empty(wanted.numel(), rows.shape[1], dtype=rows.dtype, pin_memory=on_gpu)
        torch.index_select(rows, 0, wanted, out=staging)
        return staging.to(selected.device, non_blocking=True).view(*selected.shape, -1)
