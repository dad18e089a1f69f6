"""StreamedTable: the results of the whole table, from windows of it, within the memory of a window."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import realm_kernels as rk
from realm_kernels.testing import assert_same_topk

D = 8


def write(path, rows, shard_rows):
    with rk.TableWriter(path, dim=rows.shape[1], dtype=rows.dtype, shard_rows=shard_rows) as writer:
        writer.append(rows)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**20))
def test_a_streamed_search_has_the_bits_of_the_whole(tmp_path_factory, data, seed):
    path = tmp_path_factory.mktemp("t")
    draw = torch.Generator().manual_seed(seed)
    count = data.draw(st.integers(1, 60))
    rows = torch.randint(-2, 3, (count, D), generator=draw).float()  # every tie is real
    special = data.draw(st.sampled_from([None, torch.nan, torch.inf, -torch.inf]))
    if special is not None:
        rows[torch.rand(count, generator=draw) < 0.2] = special
    write(
        path,
        rows.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16]))),
        data.draw(st.integers(1, 70)),
    )
    if data.draw(st.booleans()) and count > 3:
        with rk.TableEditor(path, shard_rows=9) as editor:
            editor.tombstone([0, 2])
            if data.draw(st.booleans()):
                editor.compact()
    whole = rk.ShardedTable.open(path)
    table = rk.StreamedTable(path, window_bytes=data.draw(st.integers(1, 1200)))
    n = whole.num_rows
    queries = torch.randint(-2, 3, (data.draw(st.integers(0, 4)), D), generator=draw).float()
    k = data.draw(st.integers(1, n))
    exclude = torch.randint(-1, n, (len(queries), 3), generator=draw) if data.draw(st.booleans()) else None
    mask = torch.rand(n, generator=draw) < 0.7 if data.draw(st.booleans()) else None
    expected = rk.mips_topk(queries, whole, k, exclude=exclude, row_mask=mask)
    found = table.mips_topk(queries, k, exclude=exclude, row_mask=mask)
    assert_same_topk(found, expected)
    assert torch.equal(table.ids(found.indices), whole.ids(found.indices))
    assert torch.equal(table.rows(found.indices).nan_to_num(9), whole.rows(found.indices).nan_to_num(9))


def test_gradients_reach_the_queries(tmp_path):
    rows = torch.randn(40, D)
    write(tmp_path, rows, 13)
    weights, gradients = torch.randn(3, 5), []
    queries = torch.randn(3, D)
    for search in (
        rk.StreamedTable(tmp_path, window_bytes=7 * D * 4).mips_topk,
        lambda q, k: rk.mips_topk(q, rows, k),
    ):
        leaf = queries.clone().requires_grad_()
        (search(leaf, 5).scores * weights).sum().backward()
        gradients.append(leaf.grad)
    # The same sum of the same five rows; windows add them in another order.
    torch.testing.assert_close(
        *gradients, rtol=0, atol=5 * 2**-23 * float(weights.abs().sum(1).max() * rows.abs().max())
    )


def test_a_streamed_table_holds_its_version(tmp_path):
    write(tmp_path, torch.ones(9, D), 4)
    table = rk.StreamedTable(tmp_path)
    write(tmp_path, torch.zeros(9, D), 4)
    assert table.mips_topk(torch.ones(1, D), 9).scores.eq(D).all() and table.version == 1
    del table
    write(tmp_path, torch.zeros(9, D), 4)
    assert len([name for name in os.listdir(tmp_path) if name.startswith("shard")]) == 3


def test_bad_arguments_are_those_of_mips_topk(tmp_path):
    write(tmp_path, torch.randn(9, D), 4)
    table = rk.StreamedTable(tmp_path)
    for arguments, message in [
        ({"k": 10}, r"k must be in \[1, N=9\], got 10"),
        ({"queries": torch.zeros(2, 3)}, r"table must be \[N, D\] = \[any, 3\]"),
        ({"exclude": torch.full((2, 1), 9)}, r"exclude must hold row ids in \[0, N=9\)"),
        ({"row_mask": torch.ones(4, dtype=torch.bool)}, r"row_mask must be \[N\] = \[9\]"),
    ]:
        with pytest.raises(ValueError, match="^mips_topk: " + message):
            table.mips_topk(**{"queries": torch.randn(2, D), "k": 3} | arguments)
    with pytest.raises(
        ValueError, match=r"StreamedTable.rows: indices must be in \[0, N=9\) or -1, got 3 to 9"
    ):
        table.rows(torch.tensor([3, 9]))


def test_a_table_four_times_the_memory_allowed_is_searched_within_it(tmp_path):
    """By the kernel's count of resident pages, anonymous and of files; and under a limit that it enforces."""
    write(tmp_path, torch.randn(1 << 17, 128).half().float(), 1 << 15)  # 64 MiB
    program = """
import resource, sys, torch, realm_kernels as rk
from benchmarks.memory import peak_of, resident
torch.set_num_threads(1)
torch.manual_seed(0)
table, queries = rk.StreamedTable(sys.argv[1], window_bytes=4 << 20), torch.randn(2, 128)
table.mips_topk(queries, 8)
streamed, peak = peak_of(lambda: table.mips_topk(queries, 8))
whole, peak_of_whole = peak_of(lambda: rk.mips_topk(queries, rk.ShardedTable.open(sys.argv[1]), 8))
assert torch.equal(streamed.indices, whole.indices) and torch.equal(streamed.scores, whole.scores)
del whole
resource.setrlimit(resource.RLIMIT_AS, (resident("VmSize") + (16 << 20), -1))
limited = table.mips_topk(queries, 8)
assert torch.equal(streamed.indices, limited.indices) and torch.equal(streamed.scores, limited.scores)
try:
    rk.ShardedTable.open(sys.argv[1])
except OSError as error:
    assert "cannot map this shard" in str(error)
    print(peak, peak_of_whole)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    peak, peak_of_whole = map(int, done.stdout.split())
    assert peak <= 16 << 20, f"{peak >> 20} MiB more than before the search, of 16 allowed"
    assert peak_of_whole >= 60 << 20  # the measure sees mapped pages
