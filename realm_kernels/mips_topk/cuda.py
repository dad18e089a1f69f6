"""The CUDA C++ backend of mips_topk: TMA and wgmma on Hopper (csrc/cuda/mips_topk*, docs/hopper_scan.md).

Reached by use_backend("cuda") only: it is compiled, and its kernels run on a model of a GPU, but not yet on a
GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native
from ..backends import Backend
from ..table import quantized
from ..validation import dtype_name
from . import gpu
from .gpu import PIECE_ROWS, WORKSPACE_BYTES
from .merging import merge

MAX_K = 2048  # keys that a block keeps in shared memory
MAX_DIM = 8192  # a query in float64 stays there too
TMA_BYTES = 16  # rows must start on multiples of as many
HOPPER = (9, 0)


def refuses(
    queries: Tensor,
    shards: list[Tensor],
    k: int,
    exclude: Tensor | None,
    row_mask: Tensor | None,
    codes: Sequence[Tensor] = (),
) -> str | None:
    refused = gpu.refuses(queries, native.cuda_unusable(), "9.0", lambda capability: capability == HOPPER)
    if refused:
        return refused
    elsewhere = [shard.device for shard in shards if shard.device != queries.device]
    if elsewhere:
        return f"the table must be on {queries.device}, got {elsewhere[0]}"
    return refuses_layout(queries, shards, k, codes)


def refuses_layout(
    queries: Tensor, shards: Sequence[Tensor], k: int, codes: Sequence[Tensor] = ()
) -> str | None:
    """What of `refuses` depends on shapes, dtypes and addresses alone."""
    dim = queries.shape[1]
    if k > MAX_K:
        return f"k must be at most {MAX_K}, got {k}"
    if dim > MAX_DIM:
        return f"D must be at most {MAX_DIM}, got {dim}"
    if any(shard.stride(1) != 1 and dim > 1 for shard in shards):
        return "the elements of a row must be contiguous"
    if _device_codes(codes, shards):
        return None
    for shard in shards:
        if shard.dtype == torch.float32:
            return "rows of float32 are scanned by their int8 codes only (table.quantize)"
        if shard.dtype == torch.float16 and queries.dtype != torch.float16:
            return f"rows of float16 need queries of float16, got {dtype_name(queries.dtype)}"
        row_bytes = shard.stride(0) * shard.element_size()
        if shard.shape[0] > 0 and row_bytes < dim * shard.element_size():
            return f"rows must not overlap, got a stride of {row_bytes} bytes"
        if shard.data_ptr() % TMA_BYTES != 0 or row_bytes % TMA_BYTES != 0:
            return f"rows must start on multiples of {TMA_BYTES} bytes, got a stride of {row_bytes}"
    return None


@dataclass(frozen=True)
class Piece:
    """Rows [first_row, first_row + N) of the table, with their codes where it is quantised."""

    rows: Tensor  # [N, D]
    first_row: int
    row_mask: Tensor | None  # [N]
    codes: tuple[Tensor, Tensor, Tensor] | None = None  # mean [D], codes [groups, G, D32], bounds [groups, 3]

    @property
    def code_group(self) -> int:
        return 0 if self.codes is None else self.codes[1].shape[1]

    def scanned(self) -> str:
        return "int8" if self.codes is not None else dtype_name(self.rows.dtype)


def forward(
    queries: Tensor,
    shards: list[Tensor],
    k: int,
    exclude: Tensor | None,
    row_mask: Tensor | None,
    codes: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    row_mask = None if row_mask is None else row_mask.contiguous()
    result: tuple[Tensor, Tensor] | None = None
    with torch.cuda.device(queries.device):
        for piece in _pieces(shards, row_mask, _device_codes(codes, shards)):
            found = _search(queries, piece, k, exclude)
            result = found if result is None else merge(result, found)
    assert result is not None  # 1 <= k <= N: some shard has rows
    return result


def _device_codes(codes: Sequence[Tensor], shards: Sequence[Tensor]) -> Sequence[Tensor]:
    """The codes, Int8Codes.tensors(), if they are of the rows as they are, and lie as a GPU scans them."""
    if not codes or quantized.are_for_the_cpu(codes) or codes[0].device != shards[0].device:
        return ()
    return codes if quantized.are_of(codes, shards) else ()


def _pieces(shards: Sequence[Tensor], row_mask: Tensor | None, codes: Sequence[Tensor]) -> Iterator[Piece]:
    first_row = 0
    for number, shard in enumerate(shards):
        for start in range(0, shard.shape[0], PIECE_ROWS):
            rows = shard[start : start + PIECE_ROWS]
            mask = None if row_mask is None else row_mask[first_row : first_row + rows.shape[0]]
            of_piece = None
            if codes:
                found, bounds = codes[2 + 2 * number : 4 + 2 * number]
                groups = slice(start // found.shape[1], -(-(start + rows.shape[0]) // found.shape[1]))
                of_piece = codes[0], found[groups], bounds[groups]
            yield Piece(rows, first_row, mask, of_piece)
            first_row += rows.shape[0]


class Processors(NamedTuple):
    """What a plan asks of a device."""

    multiprocessors: int
    large_clusters: int  # of four blocks of the scan, that run at once


def plan_for(
    batch: int,
    piece: Piece,
    dim: int,
    k: int,
    excluded: int,
    query_dtype: torch.dtype,
    processors: Processors,
) -> dict[str, Any]:
    """What the C++ plan is: batch and bytes of a pass, shape of the scan, kept, selected, and so on."""
    assert native.cuda is not None
    shape = _shape(batch, piece, dim, k, excluded, query_dtype, processors)
    plan: dict[str, Any] = native.cuda.mips_topk_plan(shape)
    return plan


def _shape(
    batch: int,
    piece: Piece,
    dim: int,
    k: int,
    excluded: int,
    query_dtype: torch.dtype,
    processors: Processors,
) -> tuple[Any, ...]:
    sizes = [batch, piece.rows.shape[0], dim, k, excluded]
    is_exact = piece.codes is None and query_dtype == piece.rows.dtype
    return sizes, piece.scanned(), is_exact, piece.code_group, *processors, WORKSPACE_BYTES


def _search(queries: Tensor, piece: Piece, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, dim = queries.shape
    scores = queries.new_empty((batch, k), dtype=torch.float32)
    indices = queries.new_empty((batch, k), dtype=torch.int64)
    if batch == 0:
        return scores, indices
    excluded = 0 if exclude is None else exclude.shape[1]
    plan = plan_for(batch, piece, dim, k, excluded, queries.dtype, load(queries.device))
    workspace = queries.new_empty(plan["bytes"], dtype=torch.uint8)
    for start in range(0, batch, plan["batch"]):
        block = slice(start, min(start + plan["batch"], batch))
        launch(
            queries[block],
            piece,
            None if exclude is None else exclude[block],
            scores[block],
            indices[block],
            workspace,
            batch,
        )
    return scores, indices


def launch(
    queries: Tensor,
    piece: Piece,
    exclude: Tensor | None,
    scores: Tensor,
    indices: Tensor,
    workspace: Tensor,
    batch: int,
    *,
    with_maxima: bool = True,
    whole: bool = True,
) -> None:
    """One pass, on the current stream: queries [b, D] of a batch that was planned as one of `batch` queries.

    whole=False ends with the scan, and with_maxima=False takes no maxima in it: for benchmarks.
    """
    assert native.cuda is not None
    dim, k = queries.shape[1], scores.shape[1]
    excluded = 0 if exclude is None else exclude.shape[1]
    codes = (0, 0, 0, 0)
    if piece.codes is not None:
        mean, found, bounds = piece.codes
        codes = (found.data_ptr(), found.shape[2], mean.data_ptr(), bounds.data_ptr())
    native.cuda.mips_topk(
        _shape(batch, piece, dim, k, excluded, queries.dtype, load(queries.device)),
        (
            queries.data_ptr(),
            queries.shape[0],
            dtype_name(queries.dtype),
            queries.stride(0),
            queries.stride(1),
        ),
        (piece.rows.data_ptr(), dtype_name(piece.rows.dtype), piece.rows.stride(0), piece.first_row),
        0 if piece.row_mask is None else piece.row_mask.data_ptr(),
        (0, 0, 0) if exclude is None else (exclude.data_ptr(), exclude.stride(0), exclude.stride(1)),
        codes,
        (scores.data_ptr(), indices.data_ptr(), gpu.repair_counter(queries.device).data_ptr()),
        workspace.data_ptr(),
        with_maxima,
        whole,
        torch.cuda.current_stream(queries.device).cuda_stream,
    )


@functools.cache
def load(device: torch.device) -> Processors:
    """Loads every kernel to the device, which is current, and makes its counter of repairs.

    Neither is for a capture: CUDA loads kernels when they are first used, which may wait for the device
    ("Lazy Loading" in its programming guide), and a counter made there would be cleared by every replay.
    After this searches of any shape can be captured.
    """
    assert native.cuda is not None
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"mips_topk: the first search on {device} loads the kernels of the CUDA backend, which cannot be "
            "captured in a CUDA graph: search once before the capture, for whatever"
        )
    gpu.repair_counter(device)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return Processors(multiprocessors, native.cuda.mips_topk_load())


BACKEND = Backend(name="cuda", refuses=refuses, forward=forward, default=False)
