"""What others do for the same job. A peer that is not installed is left out, and the report says so."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Search = Callable[[Tensor, int], object]  # queries [B, D] float32, k

INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("faiss", "usearch", "scann")}

ROWS_PER_CHUNK = 65536  # of chunked torch: its scores stay a few hundred megabytes at any N


def missing() -> list[str]:
    return [name for name, installed in INSTALLED.items() if not installed]


def chunked_torch_topk(
    queries: Tensor, table: Tensor, k: int, rows_per_chunk: int = ROWS_PER_CHUNK
) -> tuple[Tensor, Tensor]:
    """What most trainers do: a matrix product and topk for each chunk of rows, then topk over the winners.

    The product is in the dtype of the queries; a table of another one is converted chunk by chunk.
    """
    scores, indices = [], []
    for first in range(0, table.shape[0], rows_per_chunk):
        rows = table[first : first + rows_per_chunk].to(queries.dtype)
        chunk = queries @ rows.T  # [B, rows]
        best = chunk.topk(min(k, chunk.shape[1]), dim=1)
        scores.append(best.values)
        indices.append(best.indices + first)
    best = torch.cat(scores, dim=1).topk(k, dim=1)
    return best.values, torch.cat(indices, dim=1).gather(1, best.indices)


def faiss_search(table: Tensor) -> Search:
    """faiss-cpu IndexFlatIP."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(table.shape[1])
    index.add(table.numpy())
    return lambda queries, k: index.search(queries.numpy(), k)


def usearch_search(table: Tensor) -> Search:
    """usearch's exact search, inner products."""
    from usearch.index import MetricKind, search

    rows, threads = table.numpy(), torch.get_num_threads()
    return lambda queries, k: search(
        rows, queries.numpy(), k, metric=MetricKind.IP, exact=True, threads=threads
    )


def _scann_search(searcher, **settings: int) -> Search:
    """ScaNN shares the queries of a batch out among its threads."""
    searcher.set_num_threads(torch.get_num_threads())

    def search(queries: Tensor, k: int):
        share = -(-queries.shape[0] // torch.get_num_threads())
        return searcher.search_batched_parallel(
            queries.numpy(), final_num_neighbors=k, batch_size=share, **settings
        )

    return search


def _scann_builder(table: Tensor):
    import scann

    return scann.scann_ops_pybind.builder(table.numpy(), 10, "dot_product").set_n_training_threads(
        torch.get_num_threads()
    )


def scann_brute_force(table: Tensor) -> Search:
    return _scann_search(_scann_builder(table).score_brute_force().build())


@dataclass(frozen=True)
class Tuned:
    """An approximate search and the recall it reached on queries of the same kind."""

    search: Search
    recall: float
    settings: str


class ScannTuner:
    """ScaNN as its authors advise, with and without a partition of the rows: 4-bit codes of pairs of
    dimensions, anisotropic loss, the best candidates reordered by float32 rows."""

    def __init__(self, table: Tensor) -> None:
        self.num_rows = table.shape[0]
        self.leaves = int(self.num_rows**0.5)
        tree = _scann_builder(table).tree(self.leaves, self.leaves, training_sample_size=self.num_rows // 4)
        self.searchers = {
            "no tree": self._coded(_scann_builder(table)),
            f"{self.leaves} leaves": self._coded(tree),
        }

    @staticmethod
    def _coded(builder):
        return builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100).build()

    def tune(self, queries: Tensor, wanted: Tensor, least_recall: float) -> Tuned | None:
        """The quickest settings whose recall against the true ids [B, k] is enough; None where none is."""
        k = wanted.shape[1]
        best: tuple[float, Tuned] | None = None
        for name, searcher in self.searchers.items():
            shares = [None] if name == "no tree" else [16, 8, 4, 2, 1]  # of the leaves that are searched
            for share in shares:
                settings = {} if share is None else {"leaves_to_search": self.leaves // share}
                reorder = 2 * k
                while reorder <= self.num_rows:
                    search = _scann_search(searcher, pre_reorder_num_neighbors=reorder, **settings)
                    start = time.perf_counter()
                    found = search(queries, k)
                    seconds = time.perf_counter() - start
                    if best is not None and seconds > 2 * best[0]:
                        break
                    recall = recall_of(torch.from_numpy(found[0].astype("int64")), wanted)
                    if recall >= least_recall:
                        told = ", ".join([name, *(f"{n} {v}" for n, v in settings.items())])
                        tuned = Tuned(search, recall, f"{told}, reorder {reorder}")
                        best = min(
                            [best, (seconds, tuned)] if best else [(seconds, tuned)], key=lambda x: x[0]
                        )
                        break
                    reorder *= 2
        return None if best is None else best[1]


def recall_of(found: Tensor, wanted: Tensor) -> float:
    """The share of the true ids [B, k] that were found [B, k]."""
    return (wanted[:, :, None] == found[:, None, :]).any(2).double().mean().item()
