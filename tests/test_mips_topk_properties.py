"""Laws of mips_topk over drawn inputs: nothing but the rows, the queries and the filters decides a result."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import realm_kernels as rk
from realm_kernels.backends import valid_names
from realm_kernels.testing import assert_same_topk

INSTRUCTION_SETS = [name for name in valid_names() if name.startswith("cpu:")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")

# Every form in which a table is searched. Codes are made from the rows and may change nothing but the time.
FORMS = {
    "tensor": lambda table: table,
    "shards": lambda table: rk.ShardedTable.from_tensors(table.tensor_split(3)),
    "int8": lambda table: rk.ShardedTable.from_tensors(table.tensor_split(2)).quantize("int8"),
}
CAN_QUANTIZE = hasattr(rk.ShardedTable, "quantize")
needs_quantize = pytest.mark.skipif(not CAN_QUANTIZE, reason="ShardedTable has no quantize()")
every_form = pytest.mark.parametrize(
    "form",
    [
        "tensor",
        "shards",
        pytest.param("int8", marks=needs_quantize),
    ],
)

# What one dtype, one scale or a code of 8 bits makes hard: ties, NaN and infinities, values out of scale.
VALUES = {
    "normal": lambda rows: rows,
    "ties": lambda rows: rows.round().clamp(-2, 2),
    "one value": lambda rows: torch.ones_like(rows),
    "zeros": lambda rows: torch.zeros_like(rows),
    "mean of 3 sigma": lambda rows: rows + 3,
    "outlier rows": lambda rows: torch.where(rows[:, :1] > 1.5, rows * 4096, rows),
    "outlier columns": lambda rows: rows * torch.linspace(0, 4, rows.shape[1]).exp2().exp2(),
    "constant rows": lambda rows: rows[:, :1].expand_as(rows).contiguous(),
    "huge": lambda rows: rows * 1e19,
    "tiny": lambda rows: rows * 1e-40,
    "special": lambda rows: torch.where(rows > 2.2, NAN, torch.where(rows.abs() > 2, rows * INF, rows)),
}


@dataclass
class Search:
    queries: Tensor
    table: Tensor
    k: int
    exclude: Tensor | None
    row_mask: Tensor | None
    told: str

    def __repr__(self) -> str:
        return self.told

    def run(self, table: object = None, *, queries: slice = slice(None), k: int | None = None) -> rk.TopK:
        exclude = None if self.exclude is None else self.exclude[queries]
        table = self.table if table is None else table
        return rk.mips_topk(
            self.queries[queries], table, k or self.k, exclude=exclude, row_mask=self.row_mask
        )

    def expected(self) -> rk.TopK:
        with rk.use_backend("reference"):
            return self.run()


@st.composite
def searches(draw: st.DrawFn) -> Search:
    B, N, D = draw(st.integers(0, 20)), draw(st.integers(1, 300)), draw(st.integers(1, 300))
    k = draw(st.integers(1, N) | st.integers(1, min(N, 12)))
    values, query_values = (
        draw(st.sampled_from(list(VALUES))),
        draw(st.sampled_from(["normal", "ties", "special"])),
    )
    dtype, query_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    excluded, masked = draw(st.integers(0, 5)), draw(st.sampled_from([None, 0.0, 0.1, 0.9]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    return Search(
        VALUES[query_values](torch.randn(B, D, generator=generator)).to(query_dtype),
        VALUES[values](torch.randn(N, D, generator=generator)).to(dtype),
        k,
        torch.randint(-1, N, (B, excluded), generator=generator) if excluded > 0 else None,
        None if masked is None else torch.rand(N, generator=generator) < masked,
        f"{B=} {N=} {D=} {k=} {values} {dtype}, queries {query_values} {query_dtype}, "
        f"{excluded=} {masked=} {seed=}",
    )


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_form
@settings(max_examples=40, deadline=None)
@given(search=searches(), num_threads=st.integers(1, 5))
def test_instruction_sets_and_threads_do_not_matter(form, search, num_threads):
    table, expected = FORMS[form](search.table), search.expected()
    for name in INSTRUCTION_SETS:
        with rk.use_backend(name):
            for count in (1, num_threads):
                torch.set_num_threads(count)
                assert_same_topk(search.run(table), expected)


@every_form
@settings(max_examples=40, deadline=None)
@given(search=searches(), data=st.data())
def test_a_part_of_the_batch_or_of_k_is_that_part_of_the_result(form, search, data):
    table = FORMS[form](search.table)
    scores, indices = search.run(table)
    k = data.draw(st.integers(1, search.k))
    assert_same_topk(search.run(table, k=k), (scores[:, :k], indices[:, :k]))
    B = search.queries.shape[0]
    first = data.draw(st.integers(0, B))
    for part in (slice(first, first + 1), slice(0, first)):
        assert_same_topk(search.run(table, queries=part), (scores[part], indices[part]))


@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=needs_quantize)], ids=["rows", "int8"])
@settings(max_examples=30, deadline=None)
@given(search=searches(), data=st.data())
def test_the_split_into_shards_does_not_matter(quantized, search, data):
    N = search.table.shape[0]
    edges = sorted(data.draw(st.lists(st.integers(0, N), max_size=5)))
    table = rk.ShardedTable.from_tensors(search.table.tensor_split(edges))
    if quantized:
        table = table.quantize("int8")
    assert_same_topk(search.run(table), search.run())


@every_form
@pytest.mark.parametrize("k", [1, 31, 32, 33, 64, 65])
def test_ties_at_the_last_place_across_every_edge(form, k):
    """All rows tie, or all but one in the middle: the smallest ids win, whatever edge lies between."""
    table = torch.ones(257, 9)
    for best in (None, 200):
        if best is not None:
            table[best] = 2.0
        ids = ([best] if best is not None else []) + list(range(k))
        found = rk.mips_topk(torch.ones(3, 9), FORMS[form](table), k).indices
        assert found.tolist() == [ids[:k]] * 3


@every_form
def test_rows_that_are_repeated_in_another_shard(form):
    rows = torch.randn(60, 20)
    queries, table = torch.randn(5, 20), torch.cat([rows, rows, rows[:7]])
    scores, indices = rk.mips_topk(queries, FORMS[form](table), 30)
    with rk.use_backend("reference"):
        assert_same_topk((scores, indices), rk.mips_topk(queries, table, 30))
    assert torch.equal(table[indices[:, 0]], table[indices[:, 1]]) and (indices[:, 0] < indices[:, 1]).all()


def test_ids_beyond_two_to_the_thirty_one():
    """A row id has 64 bits. Nothing is allocated: one row is expanded, and unwritten zeros take no memory."""
    many = 2**31
    shards = [torch.ones(1, 8).expand(many, 8), torch.tensor([[1.0], [3.0], [2.0]]).repeat(1, 8)]
    row_mask = torch.from_numpy(np.zeros(many + 3, dtype=bool))
    row_mask[5], row_mask[-3:] = True, True
    scores, indices = rk.mips_topk(
        torch.ones(1, 8), rk.ShardedTable.from_tensors(shards), 5, row_mask=row_mask
    )
    assert indices.tolist() == [[many + 1, many + 2, 5, many, -1]]
    assert scores.tolist() == [[24.0, 16.0, 8.0, 8.0, -INF]]


@every_form
def test_a_query_alone_is_that_query_among_512(form):
    queries, table = torch.randn(512, 33), FORMS[form](torch.randn(1500, 33))
    whole = rk.mips_topk(queries, table, 100)
    for b in (0, 255, 511):
        alone = rk.mips_topk(queries[b : b + 1], table, 10)
        assert_same_topk(alone, (whole.scores[b : b + 1, :10], whole.indices[b : b + 1, :10]))


@every_form
def test_two_threads_may_search_at_once(form):
    queries, table = torch.randn(20, 32), FORMS[form](torch.randn(5000, 32).round())
    expected = rk.mips_topk(queries, table, 20)
    results = [[] for _ in range(2)]

    def search(found):
        torch.set_num_threads(2)
        for _ in range(5):
            found.append(rk.mips_topk(queries, table, 20))

    workers = [threading.Thread(target=search, args=(found,)) for found in results]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [len(found) for found in results] == [5, 5]
    for found in results:
        for result in found:
            assert_same_topk(result, expected)


class SearchingDataset(Dataset):
    """What a data loader's worker does that looks its negatives up itself, in every form of the table."""

    def __init__(self, table: Tensor, queries: Tensor) -> None:
        self.table, self.queries = table, queries

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, i: int) -> list[rk.TopK]:
        forms = [form for name, form in FORMS.items() if name != "int8" or CAN_QUANTIZE]
        return [rk.mips_topk(self.queries[i : i + 1], form(self.table), 7) for form in forms]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_search(start):
    """A forked worker has one thread (torch's data loader sees to it), after a parent that used several."""
    torch.set_num_threads(2)
    queries, table = torch.randn(4, 16), torch.randn(2000, 16)
    expected = rk.mips_topk(queries, table, 7)
    loader = DataLoader(
        SearchingDataset(table, queries),
        batch_size=None,
        num_workers=1,
        multiprocessing_context=start,
        timeout=120,
    )
    for i, forms in enumerate(loader):
        for found in forms:
            assert_same_topk(found, (expected.scores[i : i + 1], expected.indices[i : i + 1]))
    assert i == 3 and len(forms) >= 2
