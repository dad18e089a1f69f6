"""ShardedTable: rows by global id, whatever the split; the same search results for every split."""

import pytest
import torch
from optional_hypothesis import given, settings, st

import realm_kernels as rk
from realm_kernels.table import sharded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def split(rows, sizes):
    """`rows` cut into tensors with these sizes, each in a memory of its own."""
    return [piece.clone() for piece in rows.split(sizes)]


def table_of(rows, sizes):
    return rk.ShardedTable.from_tensors(split(rows, sizes))


def sizes_summing_to(total):
    cuts = st.lists(st.integers(0, total), max_size=6).map(sorted)
    return cuts.map(lambda cut: [b - a for a, b in zip([0, *cut], [*cut, total], strict=True)])


def test_a_table_tells_its_sizes():
    table = table_of(torch.randn(10, 4).bfloat16(), [3, 0, 7])
    assert (table.num_rows, len(table), table.dim, table.dtype) == (10, 10, 4, torch.bfloat16)
    assert (table.version, table.device, len(table.shards)) == (0, torch.device("cpu"), 3)
    assert repr(table) == "ShardedTable(num_rows=10, dim=4, dtype=bfloat16, shards=3, device=cpu, version=0)"


def test_from_tensors_shares_the_storage():
    rows = torch.randn(5, 3)
    table = rk.ShardedTable.from_tensors([rows])
    rows[2] = 7.0
    assert torch.equal(table.shards[0], rows)


@settings(max_examples=30, deadline=None)
@given(sizes=sizes_summing_to(17), seed=st.integers(0, 2**20))
def test_rows_are_those_of_the_whole_tensor_for_every_split(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(17, 3, generator=generator)
    indices = torch.randint(-1, 17, (2, 5), generator=generator)
    padded = torch.cat([rows, torch.zeros(1, 3)])  # -1 is its last row
    table = table_of(rows, sizes)
    assert torch.equal(table.rows(indices), padded[indices])
    assert torch.equal(sharded.gather_without_sync(table.shards, indices), padded[indices])


@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 3), (2, 0, 3), (1, 2, 1, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_take_indices_of_any_shape(shape, dtype):
    table = table_of(torch.randn(9, 4).to(dtype), [4, 5])
    indices = torch.randint(-1, 9, shape)
    rows = table.rows(indices)
    assert rows.shape == (*shape, 4) and rows.dtype == dtype
    assert torch.equal(rows, sharded.gather_without_sync(table.shards, indices))


def test_rows_take_strided_indices_and_shards():
    rows = torch.randn(8, 12)[:, ::3]  # [8, 4], strided
    table = rk.ShardedTable.from_tensors([rows[::2], rows[1::2]])
    indices = torch.arange(8).view(2, 4).T
    assert torch.equal(table.rows(indices), torch.cat([rows[::2], rows[1::2]])[indices])


def test_rows_of_an_empty_table_are_zeros():
    table = rk.ShardedTable.from_tensors([torch.empty(0, 4)])
    indices = torch.full((2, 3), -1)
    assert torch.equal(table.rows(indices), torch.zeros(2, 3, 4))
    assert torch.equal(sharded.gather_without_sync(table.shards, indices), torch.zeros(2, 3, 4))


def test_an_id_out_of_range_is_nan_where_a_look_would_synchronise():
    table = table_of(torch.randn(6, 2), [2, 4])
    rows = sharded.gather_without_sync(table.shards, torch.tensor([-2, -1, 5, 6]))
    assert rows.isnan().all(dim=1).tolist() == [True, False, False, True]


def test_nan_rows_do_not_leak_into_others():
    rows = torch.full((4, 2), torch.nan)
    rows[1] = 1.0
    table = table_of(rows, [2, 2])
    for got in (
        table.rows(torch.tensor([1, -1])),
        sharded.gather_without_sync(table.shards, torch.tensor([1, -1])),
    ):
        assert torch.equal(got, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))


@settings(max_examples=25, deadline=None)
@given(sizes=sizes_summing_to(40), k=st.integers(1, 40), integers=st.booleans(), seed=st.integers(0, 2**20))
def test_search_gives_the_same_bits_for_every_split(sizes, k, integers, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, queries = torch.randn(40, 8, generator=generator), torch.randn(3, 8, generator=generator)
    if integers:  # every tie is real
        rows, queries = rows.round(), queries.round()
    exclude = torch.randint(-1, 40, (3, 4), generator=generator)
    row_mask = torch.rand(40, generator=generator) < 0.9
    whole = rk.mips_topk(queries, rows, k, exclude=exclude, row_mask=row_mask)
    sharded_top = rk.mips_topk(queries, table_of(rows, sizes), k, exclude=exclude, row_mask=row_mask)
    assert torch.equal(whole.indices, sharded_top.indices)
    assert torch.equal(whole.scores.view(torch.int32), sharded_top.scores.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_search_over_a_table_sends_the_same_gradient_to_the_queries(dtype):
    rows, weight = torch.randn(30, 8).to(dtype), torch.randn(3, 5)
    gradients = []
    for table in (rows, table_of(rows, [0, 11, 0, 19])):
        queries = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (rk.mips_topk(queries, table, 5).scores * weight).sum().backward()
        gradients.append(queries.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_scores_are_those_of_the_rows_returned():
    table, queries = table_of(torch.randint(-3, 4, (20, 8)).float(), [7, 13]), torch.randn(4, 8).round()
    top = rk.mips_topk(queries, table, 6)
    assert torch.equal(top.scores, torch.einsum("bd,bkd->bk", queries, table.rows(top.indices)) + 0.0)


def test_explain_takes_a_table():
    explanation = rk.explain(rk.mips_topk, torch.randn(2, 8), table_of(torch.randn(20, 8), [7, 13]), 6)
    assert "2 shard(s)" in explanation.plan


def test_to_the_same_device_shares_the_shards():
    table = table_of(torch.randn(6, 2), [2, 4])
    table.version = 3
    moved = table.to("cpu")
    assert moved.version == 3
    assert [a.data_ptr() for a in moved.shards] == [a.data_ptr() for a in table.shards]


@pytest.mark.parametrize(
    ("shards", "error", "message"),
    [
        (torch.randn(4, 2), TypeError, r"shards must be a sequence of tensors \[n, D\], got float32\[4, 2\]"),
        ([], ValueError, "shards must hold at least one tensor"),
        ([[1.0]], TypeError, r"shards\[0\] must be a Tensor"),
        ([torch.randn(4)], ValueError, r"shards\[0\] must be \[n, D\], 2 axes, got float32\[4\]"),
        ([torch.randn(4, 0)], ValueError, "D >= 1"),
        ([torch.randn(4, 2), torch.randn(4, 3)], ValueError, r"shards\[1\] must be \[n, D\] = \[any, 2\]"),
        ([torch.randn(4, 2), torch.randn(4, 2).half()], ValueError, r"shards\[1\] must be of dtype float32"),
        ([torch.randn(4, 2).double()], ValueError, "must be of dtype float32, bfloat16, float16"),
        ([torch.randn(4, 2, requires_grad=True)], ValueError, "must not require a gradient"),
        ([torch.randn(4, 2), torch.randn(4, 2, device="meta")], ValueError, "must be on cpu"),
    ],
    ids=lambda value: "",
)
def test_from_tensors_refuses(shards, error, message):
    with pytest.raises(error, match="^ShardedTable: .*" + message):
        rk.ShardedTable.from_tensors(shards)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 1], TypeError, "indices must be a Tensor, got list"),
        (torch.tensor([0], dtype=torch.int32), ValueError, r"indices must be int64 on cpu, got int32\[1\]"),
        (torch.tensor([0.0]), ValueError, "indices must be int64"),
        (torch.tensor([3, -2]), ValueError, r"indices must be in \[0, N=6\) or -1, got -2 to 3"),
        (torch.tensor([[6]]), ValueError, r"indices must be in \[0, N=6\) or -1, got 6 to 6"),
    ],
    ids=["list", "int32", "float", "below", "above"],
)
def test_rows_refuse(indices, error, message):
    with pytest.raises(error, match=r"^ShardedTable.rows: " + message):
        table_of(torch.randn(6, 2), [2, 4]).rows(indices)


@pytest.mark.gpu
def test_rows_on_a_gpu_are_captured_in_a_graph():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows = torch.randn(10, 4)
    table = table_of(rows, [3, 0, 7]).to("cuda")
    indices = torch.zeros(5, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    table.rows(indices)
    with torch.cuda.graph(graph):
        captured = table.rows(indices)
    indices.copy_(torch.tensor([9, -1, 2, 3, 0]))
    graph.replay()
    assert torch.equal(captured.cpu(), table_of(rows, [10]).rows(indices.cpu()))
