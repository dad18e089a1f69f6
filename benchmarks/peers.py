"""What others do for the same job. A peer that is not installed is left out, and the report says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

ROWS_PER_CHUNK = 65536  # of chunked torch: its scores stay a few hundred megabytes at any N


def chunked_torch_topk(queries: Tensor, table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What most trainers do: a matrix product and topk for each chunk of rows, then topk over the winners.

    The product is in the dtype of the queries; a table of another one is converted chunk by chunk.
    """
    scores, indices = [], []
    for first in range(0, table.shape[0], ROWS_PER_CHUNK):
        rows = table[first : first + ROWS_PER_CHUNK].to(queries.dtype)
        chunk = queries @ rows.T  # [B, rows]
        best = chunk.topk(min(k, chunk.shape[1]), dim=1)
        scores.append(best.values)
        indices.append(best.indices + first)
    best = torch.cat(scores, dim=1).topk(k, dim=1)
    return best.values, torch.cat(indices, dim=1).gather(1, best.indices)


def faiss_search(table: Tensor) -> Callable[[Tensor, int], object] | None:
    """faiss-cpu IndexFlatIP over the table, or None where faiss is not installed."""
    if importlib.util.find_spec("faiss") is None:
        return None
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(table.shape[1])
    index.add(table.float().numpy())
    return lambda queries, k: index.search(queries.float().numpy(), k)
