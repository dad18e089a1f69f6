"""The C++ backend of mips_topk: a float32 scan, canonical rescoring (csrc/cpu/mips_topk*)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native
from ..backends import Backend, forced_variant
from ..table import quantized
from ..validation import dtype_name


@dataclass(frozen=True)
class SearchCounters:
    """What the CPU searches of this process did: calls, queries, and rows that the scan could not exclude."""

    searches: int = 0
    queries: int = 0
    rescored: int = 0


_counters = SearchCounters()
_lock = threading.Lock()


def search_counters() -> SearchCounters:
    """The CPU searches of this process so far: subtract two readings for what happened between them.

    `rescored` rows were scored in float64 from the table, over all queries: what the scan, of rows or of
    their int8 codes, could not exclude. A search that rescores many rows a query is exact all the same, but
    slow: of a table of nearly equal rows, or one whose codes say little.
    """
    return _counters


def _count(queries: int, rescored: int) -> None:
    global _counters
    with _lock:
        before = _counters
        _counters = SearchCounters(before.searches + 1, before.queries + queries, before.rescored + rescored)


def refuses(
    queries: Tensor,
    shards: list[Tensor],
    k: int,
    exclude: Tensor | None,
    row_mask: Tensor | None,
    codes: Sequence[Tensor] = (),
) -> str | None:
    if queries.device.type != "cpu":
        return f"the arguments are on {queries.device}"
    if native.cpu is None:
        return native.cpu_missing
    if len({shard.dtype for shard in shards}) > 1:
        return "the shards differ in dtype"
    return None


def forward(
    queries: Tensor,
    shards: list[Tensor],
    k: int,
    exclude: Tensor | None,
    row_mask: Tensor | None,
    codes: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    assert native.cpu is not None
    batch, dim = queries.shape
    if codes and not (quantized.are_for_the_cpu(codes) and quantized.are_of(codes, shards)):
        codes = ()
    # The kernel steps from row to row by a stride, but reads a row as it lies.
    rows = [shard if shard.stride(1) == 1 or dim == 1 else shard.contiguous() for shard in shards]
    queries = queries.float().contiguous()
    if exclude is not None:
        exclude = exclude.sort(dim=1).values.contiguous()
    if row_mask is not None:
        row_mask = row_mask.contiguous()
    scores = torch.empty(batch, k, dtype=torch.float32)
    indices = torch.empty(batch, k, dtype=torch.int64)
    rescored = native.cpu.mips_topk(
        queries.data_ptr(),
        [(shard.data_ptr(), shard.shape[0], shard.stride(0)) for shard in rows],
        [(c.data_ptr(), bounds.data_ptr()) for c, bounds in zip(codes[2::2], codes[3::2], strict=True)],
        codes[0].data_ptr() if codes else 0,
        dtype_name(shards[0].dtype),
        batch,
        dim,
        k,
        0 if exclude is None else exclude.data_ptr(),
        0 if exclude is None else exclude.shape[1],
        0 if row_mask is None else row_mask.data_ptr(),
        scores.data_ptr(),
        indices.data_ptr(),
        torch.get_num_threads(),
        forced_variant(),
    )
    _count(batch, rescored)
    return scores, indices


BACKEND = Backend(name="cpu", refuses=refuses, forward=forward)
