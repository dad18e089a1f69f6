"""The tables and queries that mips_topk is measured on: random, in adverse orders, and of adverse values."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import realm_kernels as rk

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A table of codes with the float32 rows behind them.
INT8 = "int8"
CAN_QUANTIZE = hasattr(rk.ShardedTable, "quantize")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# One table of a shape at a time, in every dtype: a million rows of 128 floats are half a gigabyte.
@functools.lru_cache(maxsize=4)
def table(num_rows: int, dim: int, dtype: str, order: str = "random") -> Tensor | rk.ShardedTable:
    if dtype == INT8:
        return rk.ShardedTable.from_tensors([table(num_rows, dim, "float32", order)]).quantize("int8")
    if dtype != "float32":
        return table(num_rows, dim, "float32", order).to(DTYPES[dtype])
    return ORDERS[order](torch.randn(num_rows, dim, generator=generator(0)))


def queries(batch: int, dim: int) -> Tensor:
    return torch.randn(batch, dim, generator=generator(1))


def alike_queries(batch: int, dim: int) -> Tensor:
    """Queries near each other, so that one order of the rows is an order of the scores of them all."""
    return axis(dim) + 0.2 * queries(batch, dim)


def axis(dim: int) -> Tensor:
    return torch.randn(dim, generator=generator(2))


def ascending(rows: Tensor) -> Tensor:
    return rows[(rows @ axis(rows.shape[1])).argsort()]


def organ_pipe(rows: Tensor) -> Tensor:
    rows = ascending(rows)
    return torch.cat([rows[::2], rows[1::2].flip(0)])


def block_shuffled(rows: Tensor, block: int = 1000) -> Tensor:
    blocks = ascending(rows).split(block)
    return torch.cat([blocks[i] for i in torch.randperm(len(blocks), generator=generator(3)).tolist()])


def clustered(rows: Tensor, rows_per_cluster: int = 1000) -> Tensor:
    clusters = -(-rows.shape[0] // rows_per_cluster)
    centres = torch.randn(clusters, rows.shape[1], generator=generator(4))
    return 0.2 * rows + centres.repeat_interleave(rows_per_cluster, 0)[: rows.shape[0]]


ORDERS = {
    "random": lambda rows: rows,
    "ascending": ascending,
    "descending": lambda rows: ascending(rows).flip(0),
    "organ-pipe": organ_pipe,
    "block-shuffled": block_shuffled,
    "clustered": clustered,
    "mean of 3 sigma": lambda rows: rows + 3.0,
    "all equal": lambda rows: rows[:1].repeat(rows.shape[0], 1),
    # A hundred different rows, each as often as the others.
    "all duplicates": lambda rows: rows[:100].repeat(-(-rows.shape[0] // 100), 1)[: rows.shape[0]],
}
