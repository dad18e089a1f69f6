"""Tables with int8 codes: a search over them is that over the rows, whatever the codes say of them."""

import pytest
import torch
from test_mips_topk import CPU, NAN, integers

import realm_kernels as rk
from realm_kernels.testing import assert_same_topk

pytestmark = pytest.mark.skipif(not CPU, reason="needs the C++ module")


def one_huge_row(n, d):
    rows = torch.randn(n, d)
    rows[n // 3] *= 1e6
    return rows


ROWS = {
    "normal": torch.randn,
    "a mean of three sigma": lambda n, d: torch.randn(n, d) + 3.0,
    "one huge row": one_huge_row,
    "huge values in one column": lambda n, d: torch.randn(n, d) * torch.tensor([1e4] + [1.0] * (d - 1)),
    "clusters": lambda n, d: 10 * torch.randn(5, d)[torch.arange(n) % 5] + 1e-3 * torch.randn(n, d),
    "constant rows": lambda n, d: torch.arange(n).float()[:, None].expand(n, d) / n,
    "all zero": torch.zeros,
    "all equal": lambda n, d: torch.randn(1, d).expand(n, d),
    "integers with ties": integers,
    "subnormal": lambda n, d: torch.randn(n, d) * 1e-40,
    "near overflow": lambda n, d: torch.randn(n, d).clamp(-1, 1) * 3e38,
    "a panel of NaN": lambda n, d: torch.where(torch.arange(n)[:, None] // 32 == 1, NAN, torch.randn(n, d)),
}


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("kind", ROWS)
def test_codes_do_not_change_a_result(kind, backend):
    for dim in (8, 20, 65):
        table, queries = ROWS[kind](500, dim), torch.randn(9, dim)
        queries[4], queries[5] = 0.0, queries[5] * torch.logspace(-6, 0, dim)
        with rk.use_backend(backend):
            for dtype in (torch.float32, torch.bfloat16):
                plain = rk.ShardedTable.from_tensors([table[:130].to(dtype), table[130:].to(dtype)])
                expected = rk.mips_topk(queries, plain, 12)
                assert_same_topk(rk.mips_topk(queries, plain.quantize("int8"), 12), expected)


def test_few_rows_are_rescored():
    table = rk.ShardedTable.from_tensors([torch.randn(20000, 64) + 1.0]).quantize()
    before = rk.search_counters()
    rk.mips_topk(torch.randn(50, 64), table, 8)
    after = rk.search_counters()
    assert (after.searches - before.searches, after.queries - before.queries) == (1, 50)
    # Each thread rescores its own first rows; of the rest a bound that held nothing back would admit all.
    assert 8 * 50 <= after.rescored - before.rescored <= 0.02 * 20000 * 50


def test_rows_written_in_place_are_encoded_anew():
    rows, queries = torch.randn(300, 16), torch.randn(4, 16)
    table = rk.ShardedTable.from_tensors([rows]).quantize()
    rk.mips_topk(queries, table, 5)
    rows.copy_(torch.randn(300, 16) * 7)
    assert_same_topk(rk.mips_topk(queries, table, 5), rk.mips_topk(queries, rows, 5))
    # A compiled graph does not encode: codes that fell behind are not read.
    rows.copy_(torch.randn(300, 16) * 7)
    compiled = torch.compile(lambda q: rk.mips_topk(q, table, 5), fullgraph=True, backend="aot_eager")
    assert_same_topk(rk.TopK(*compiled(queries)), rk.mips_topk(queries, rows, 5))


def test_codes_made_in_inference_mode_can_be_made_anew():
    rows, queries = torch.randn(300, 16), torch.randn(4, 16)
    with torch.inference_mode():
        table = rk.ShardedTable.from_tensors([rows]).quantize()
    rows.mul_(-3)
    assert_same_topk(rk.mips_topk(queries, table, 5), rk.mips_topk(queries, rows, 5))


@pytest.mark.parametrize("backend", CPU)
def test_a_subnormal_residual_counts(backend):
    """Residuals of a few units of 2^-149 decide, under a query of 2^99."""
    unit = 2.0**-149
    rows = torch.zeros(3200, 2)
    rows[:32, 1] = 2 * unit
    rows[64:96] = unit
    queries = torch.tensor([[1.0, 0.9]]) * 2.0**99
    table = rk.ShardedTable.from_tensors([rows]).quantize()
    with rk.use_backend(backend):
        assert rk.mips_topk(queries, table, 1).indices.tolist() == [[64]]


@pytest.mark.parametrize("backend", CPU)
def test_cancellation_that_float64_rounds_counts(backend):
    """Products of the query and the mean cancel to their last bits: in another order their sum is off."""
    unit, half = 2.0**-23, 8192
    # The first half's products exceed one by less than 2^-41, the second half's fall short of minus one.
    units = torch.arange(2**23, 2**24)
    exact = ((units[(2**47 + more) % units == 0], more) for more in range(63, 30, -1))
    above, more = next((int(found[0]), more) for found, more in exact if len(found) > 0)
    mean = torch.cat([torch.full((half,), above * unit), torch.full((half,), 1 + 5 * unit)])
    below = (2**47 + more) // above / 2**24
    query = torch.cat([torch.full((half,), below), torch.full((half,), -(1 - 5 * unit))])[None]
    rows = torch.full((128, 2 * half), NAN)
    rows[96:] = 0.0
    rows[96:, 0] = -float("inf")
    rows[40] = rows[96] = mean
    table = rk.ShardedTable.from_tensors([rows]).quantize()
    with rk.use_backend(backend):
        assert rk.mips_topk(query, table, 1).indices.tolist() == [[40]]


def test_rows_mapped_from_disk_are_rescored_there(tmp_path):
    rows, queries = torch.randn(500, 24), torch.randn(6, 24)
    rk.ShardedTable.from_tensors([rows]).save(tmp_path / "table", shard_rows=130)
    table = rk.ShardedTable.open(tmp_path / "table", mmap=True).quantize()
    assert_same_topk(rk.mips_topk(queries, table, 7), rk.mips_topk(queries, rows, 7))


def test_a_quantised_table_keeps_what_a_table_has():
    table = rk.ShardedTable.from_tensors([torch.randn(40, 16), torch.randn(0, 16)])
    quantised = table.quantize("int8")
    assert table.codes is None and quantised.codes is not None
    assert quantised.shards[0] is table.shards[0] and quantised.to("cpu").codes is quantised.codes
    assert "codes=int8" in repr(quantised) and "codes" not in repr(table)
    explanation = rk.explain(rk.mips_topk, torch.randn(2, 16), quantised, 3)
    plain = rk.explain(rk.mips_topk, torch.randn(2, 16), table, 3)
    assert explanation.bytes < plain.bytes and "int8" in explanation.plan


def test_gradients_and_graphs_are_those_of_the_rows():
    queries = torch.randn(4, 16, requires_grad=True)
    table = rk.ShardedTable.from_tensors([torch.randn(90, 16)])
    quantised = table.quantize()

    def step(queries, table):
        return rk.mips_topk(queries, table, 5).scores.square().sum()

    (expected,) = torch.autograd.grad(step(queries, table), queries)
    (found,) = torch.autograd.grad(step(queries, quantised), queries)
    assert torch.equal(found, expected)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(queries, quantised), queries)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(grad):
    table = rk.ShardedTable.from_tensors([torch.randn(20, 8), torch.randn(10, 8)]).quantize()
    queries = torch.randn(4, 8, requires_grad=grad)
    arguments = (queries, list(table.shards), 5, None, None, grad, table.codes.tensors())
    torch.library.opcheck(torch.ops.realm_kernels.mips_topk.default, arguments)


def test_what_cannot_be_quantised_says_why():
    table = rk.ShardedTable.from_tensors([torch.randn(4, 8)])
    with pytest.raises(ValueError, match=r"scheme must be \"int8\", got str 'int4'"):
        table.quantize("int4")
    with pytest.raises(ValueError, match="D must be at most 16384, got 16385"):
        rk.ShardedTable.from_tensors([torch.zeros(2, 16385)]).quantize()
    with torch.inference_mode():
        frozen = rk.ShardedTable.from_tensors([torch.randn(4, 8)])
    with pytest.raises(ValueError, match=r"pass shard.clone\(\)"):
        frozen.quantize()


def test_the_widest_rows_do_not_overflow():
    """Sums of 16384 products of the largest codes."""
    table = rk.ShardedTable.from_tensors([torch.full((3, 16384), -5.0), torch.full((40, 16384), 7.0)])
    queries = torch.cat([torch.ones(1, 16384), -torch.ones(1, 16384)])
    assert_same_topk(rk.mips_topk(queries, table.quantize(), 4), rk.mips_topk(queries, table, 4))
