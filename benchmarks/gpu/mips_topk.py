"""mips_topk on a GPU beside its peers. Bytes and flops: realm_kernels/mips_topk/plan.py.

To measure another kind of table add a line to TABLES or, where a few shapes are enough, to HOST_TABLES.
Another backend is found in the op's BACKENDS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import realm_kernels as rk
from realm_kernels.mips_topk import gpu, plan
from realm_kernels.mips_topk import op as mips_op

from .. import mips_topk_tables, roofline
from . import peers, served
from .rows import OURS, Call, Row
from .served import forced_backends, served_by

WIKIPEDIA = 13_353_718  # REALM's blocks
BATCHES = (1, 16, 64, 128, 256, 512, 1024, 4096)
KS = (8, 100)
# Rows and width, the most important first.
SHAPES = ((WIKIPEDIA, 128), (1_000_000, 768), (1_000_000, 128), (10_000, 128))
ORDER_ROWS, ORDER_BATCH = 1_000_000, 64
CHECKED = 2  # queries held against the reference

Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kind:
    """A kind of table, and what limits a scan of it."""

    make: Callable[[Tensor], object]  # from bfloat16 rows [N, D] on the GPU
    element_bytes: int  # that a scan reads at least
    dtype: torch.dtype  # that it multiplies
    from_host: bool = False  # these bytes come from the host


def of_shards(rows: Tensor) -> rk.ShardedTable:
    return rk.ShardedTable.from_tensors([rows])


TABLES = {
    "bfloat16": Kind(lambda rows: rows, 2, torch.bfloat16),
    "int8": Kind(lambda rows: of_shards(rows).quantize("int8"), 1, torch.int8),
}
# Tables larger than the GPU: codes there and rows in pinned memory, and rows that stream by.
HOST_TABLES = {
    "int8 of pinned rows": Kind(
        lambda rows: of_shards(rows.cpu()).pin_memory().quantize("int8", device=rows.device), 1, torch.int8
    ),
    "streamed bfloat16": Kind(
        lambda rows: of_shards(rows.cpu()).pin_memory(), 2, torch.bfloat16, from_host=True
    ),
}
KINDS = TABLES | HOST_TABLES
HOST_BATCHES, HOST_K = (1, 64, 512), 8


@functools.lru_cache(maxsize=1)
def rows_on_gpu(num_rows: int, dim: int, order: str | None) -> Tensor:
    """bfloat16 [N, D]: random, made on the GPU, or in one of ORDERS, made on the CPU."""
    made.cache_clear()
    expected.cache_clear()
    if order is not None:
        return mips_topk_tables.table(num_rows, dim, "float32", order).bfloat16().to(served.GPU)
    generator = torch.Generator(served.GPU).manual_seed(0)
    rows = torch.empty(num_rows, dim, dtype=torch.bfloat16, device=served.GPU)
    for part in rows.split(1 << 20):
        part.normal_(generator=generator)
    return rows


@functools.lru_cache(maxsize=4)
def made(make: Callable[[Tensor], object], num_rows: int, dim: int, order: str | None) -> object:
    """What an implementation searches: its table, or a peer's index."""
    return make(rows_on_gpu(num_rows, dim, order))


@functools.lru_cache(maxsize=1)
def expected(num_rows: int, dim: int, order: str | None) -> rk.TopK:
    """The specification's answer to the first queries, by every canonical score."""
    with rk.use_backend("reference"):
        asked = queries_for(CHECKED, dim, order)
        return rk.mips_topk(asked, rows_on_gpu(num_rows, dim, order), min(max(KS), num_rows))


def queries_for(batch: int, dim: int, order: str | None) -> Tensor:
    """bfloat16 [B, D]; alike where the rows are ordered, so that their order is one for all."""
    make = mips_topk_tables.queries if order is None else mips_topk_tables.alike_queries
    return make(max(BATCHES), dim)[:batch].bfloat16().to(served.GPU)


def group_of(num_rows: int, dim: int, kind: str, batch: int, k: int) -> str:
    return f"mips_topk {kind} N={num_rows} D={dim} B={batch} k={k}"


def limit_seconds(num_rows: int, dim: int, kind: str, batch: int, k: int) -> float:
    element_bytes, dtype = KINDS[kind].element_bytes, KINDS[kind].dtype
    moved, flops = plan.cost(batch, num_rows, dim, k, element_bytes, 2)
    least = roofline.limit_seconds(moved, flops, dtype, served.GPU)
    return max(least, moved / roofline.measure_host_bandwidth()) if KINDS[kind].from_host else least


def our_row(
    num_rows: int,
    dim: int,
    kind: str,
    batch: int,
    k: int,
    order: str | None = None,
    backend: str | None = None,
) -> Row:
    make = KINDS[kind].make

    def prepare() -> Call:
        table, asked = made(make, num_rows, dim, order), queries_for(batch, dim, order)

        def check(found: rk.TopK) -> None:
            """One query or two against every canonical score: no speed of a wrong answer."""
            for mine, right in zip(found, expected(num_rows, dim, order), strict=True):
                if not torch.equal(mine[:CHECKED], right[:batch, :k]):
                    raise AssertionError("the answer differs from the specification's")

        return Call(
            served_by(backend, lambda: rk.mips_topk(asked, table, k)),
            lambda: limit_seconds(num_rows, dim, kind, batch, k),
            check,
            repairs=lambda: gpu.repairs(asked.device),
            is_replayed=True,
        )

    group = group_of(num_rows, dim, kind, batch, k)
    told: dict = {"shape": {"op": "mips_topk", "N": num_rows, "D": dim, "B": batch, "k": k, "dtype": kind}}
    told["compare"] = {
        f"ours {other}": group_of(num_rows, dim, other, batch, k) for other in TABLES if other != kind
    }
    if kind != "bfloat16":
        told["peers_of"] = group_of(num_rows, dim, "bfloat16", batch, k)
    if order is not None:
        told["order"] = {"order": order, "of": group}
        group = f"{group} {order}"
    return Row(group, OURS if backend is None else f"ours {backend}", prepare, told)


def peer_row(num_rows: int, dim: int, name: str, batch: int, k: int) -> Row:
    peer = peers.SEARCHES[name]

    def prepare() -> Call:
        search, asked = made(peer.make, num_rows, dim, None), queries_for(batch, dim, None)
        return Call(
            lambda: search(asked, k),
            lambda: limit_seconds(num_rows, dim, "bfloat16", batch, k),
            is_replayed=peer.package == "torch",
            owns_its_memory=peer.owns_its_memory,
        )

    shape = {"op": "mips_topk", "N": num_rows, "D": dim, "B": batch, "k": k, "dtype": "bfloat16"}
    return Row(group_of(num_rows, dim, "bfloat16", batch, k), name, prepare, {"shape": shape})


def shape_rows(num_rows: int, dim: int, batches: tuple[int, ...]) -> list[Row]:
    """Ours beside torch, shape by shape; then each other peer, whose index is built once for all shapes."""
    jobs = [(batch, k) for k in KS for batch in batches]
    found = []
    for batch, k in jobs:
        for kind in TABLES:
            for backend in [None, *forced_backends(mips_op.BACKENDS)]:
                found.append(our_row(num_rows, dim, kind, batch, k, backend=backend))
        found.append(peer_row(num_rows, dim, "torch", batch, k))
    others = [name for name in peers.installed(peers.SEARCHES) if name != "torch"]
    return found + [peer_row(num_rows, dim, name, batch, k) for name in others for batch, k in jobs]


def host_rows(num_rows: int, dim: int, batches: tuple[int, ...]) -> list[Row]:
    return [our_row(num_rows, dim, kind, batch, HOST_K) for kind in HOST_TABLES for batch in batches]


def order_rows(num_rows: int) -> list[Row]:
    return [
        our_row(num_rows, 128, kind, ORDER_BATCH, 8, order)
        for order in mips_topk_tables.ORDERS
        for kind in TABLES
    ]


def rows(op: str, quick: bool) -> list[Row]:
    if quick:
        shape, batches = (20_000, 128), (1, ORDER_BATCH)
        return shape_rows(*shape, batches) + host_rows(*shape, batches) + order_rows(shape[0])
    largest, *others, smallest = (shape_rows(*shape, BATCHES) for shape in SHAPES)
    in_order = [largest, host_rows(*SHAPES[0], HOST_BATCHES), *others, order_rows(ORDER_ROWS), smallest]
    return [row for rows in in_order for row in rows]


def absent(op: str) -> list[str]:
    return peers.missing(peers.SEARCHES)
