"""int8 codes as the Triton backend scans them: the ids and bits of the rows, whatever the codes say."""

import mips_topk_triton_cases
import pytest
import torch
from mips_topk_triton_cases import (
    DEVICE,
    INF,
    NAN,
    ORDERS,
    QUIET,
    check,
    integers,
    planner,
    search,
    small_sorts,  # noqa: F401, a fixture
)
from test_mips_topk_codes import ROWS

import realm_kernels as rk
from realm_kernels.mips_topk import gpu, reference, triton_launch, triton_plan, triton_search
from realm_kernels.mips_topk import triton as backend
from realm_kernels.mips_topk.triton_coded import CodedBlock
from realm_kernels.table import device_codes, device_stream, quantized
from realm_kernels.testing import assert_same_topk

pytestmark = QUIET


def codes_of(table, group=8):
    """Int8Codes.tensors() of shards, as a GPU scans them."""
    where = mips_topk_triton_cases.ROWS_ON[-1]
    shards = [shard.to(where) for shard in (table if isinstance(table, list) else [table])]
    codes, bounds = device_codes.empty(shards, torch.device(DEVICE), group)
    made = quantized.Int8Codes(
        torch.empty(shards[0].shape[1], device=DEVICE),
        torch.full((len(shards), 2), -1),
        tuple(codes),
        tuple(bounds),
    )
    quantized.refresh(shards, made.tensors())
    return made.tensors()


def coded(queries, table, k, exclude=None, row_mask=None, plan_for=None):
    check(queries, table, k, exclude, row_mask, plan_for, codes_of(table))


@pytest.fixture(params=["readable", "gathered"])
def rows(request, monkeypatch):
    """Rows that a kernel can read, and rows that the host gathers for it."""
    if request.param == "gathered":
        rows_stay_on_the_host(monkeypatch)
    return request.param


def rows_stay_on_the_host(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_search, "is_on_host", lambda *args: True)
    monkeypatch.setattr(mips_topk_triton_cases, "ROWS_ON", ["cpu"])


@pytest.mark.parametrize("kind", ROWS)
def test_codes_do_not_change_a_result(kind, rows):
    table, queries = ROWS[kind](90, 20), torch.randn(3, 20)
    queries[1], queries[2] = 0.0, queries[2] * torch.logspace(-6, 0, 20)
    coded(queries, table, 5)


@pytest.mark.parametrize("order", ORDERS)
def test_adversarial_orders(order, rows):
    table = torch.ones(117, 8)
    table[:, 0] = ORDERS[order](117).float()
    queries = torch.zeros(2, 8)
    queries[:, 0] = torch.tensor([1.0, -3.0])
    coded(queries, table.bfloat16(), 7)


@pytest.mark.parametrize("queries", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shards_ties_excluded_and_masked_rows(queries, rows):
    table, questions = integers(130, 5), integers(2, 5).to(queries)
    exclude, row_mask = torch.randint(-1, 130, (2, 4)), torch.rand(130) < 0.6
    row_mask[40:60] = False
    for k in (1, 9, 130):
        coded(questions, [table[:41], table[:0], table[41:]], k, exclude, row_mask)


@pytest.mark.parametrize("N,k", [(1, 1), (7, 6), (8, 8), (9, 3), (33, 31)])
def test_sizes_around_groups_and_tiles(N, k):
    coded(torch.randn(2, 9), torch.randn(N, 9), k)


def test_wide_rows_go_through_the_scan_in_blocks():
    coded(torch.randn(2, 300), torch.randn(60, 300), 5)
    coded(torch.randn(2, 90), torch.randn(60, 90), 5)


def test_nan_infinities_and_overflow(rows):
    queries, table = torch.randn(5, 6), torch.randn(70, 6)
    table[3], table[40, 2], table[41, 1] = NAN, INF, -INF
    table[42], table[60] = INF, -INF
    queries[1, 4], queries[2, 0], queries[3], queries[4] = NAN, INF, 0.0, 3e38
    coded(queries, table, 6)
    coded(torch.randn(2, 6) * 1e-42, torch.randn(70, 6).clamp(-1, 1) * 3e38, 6)


def test_a_subnormal_residual_counts():
    """Residuals of a few units of 2^-149 decide, under a query of 2^99."""
    unit = 2.0**-149
    table = torch.zeros(96, 2)
    table[:32, 1] = 2 * unit
    table[64:72] = unit
    coded(torch.tensor([[1.0, 0.9]]) * 2.0**99, table, 1)


def test_few_rows_are_read_and_nothing_is_repaired():
    table, queries = torch.randn(400, 64) + 3.0, torch.randn(4, 64)
    plan = triton_plan.plan_for(4, 400, 64, 3, 0, torch.float32, torch.float32, code_group=8)
    assert plan.kept <= 32 and plan.scan_dtype == torch.int8
    before = gpu.repairs(DEVICE)
    coded(queries, table, 3, plan_for=planner(slack=12))
    assert gpu.repairs(DEVICE) == before


def test_a_repair_reads_what_the_codes_do_not_exclude(rows):
    before = gpu.repairs(DEVICE)
    table = torch.randn(200, 16)
    queries = torch.cat([torch.randn(2, 16), torch.zeros(1, 16)])
    coded(queries, table, 12, plan_for=planner(selected=2))
    assert gpu.repairs(DEVICE) == before + 2  # ties at 0 go to the groups that were selected
    coded(queries, table, 12, plan_for=planner(slack=30, kept=16, top=16))


@pytest.mark.parametrize("scale", [1.0, 1e-38, 1e4])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_the_bounds_hold_for_every_group_and_row_and_are_tight(scale, mean):
    queries, table = torch.randn(4, 40), (torch.randn(64, 40) + mean) * scale
    tensors = codes_of(table)
    codes = triton_launch.Codes(tensors[0], *tensors[2:])
    none = torch.empty(4, 0, dtype=torch.int64, device=DEVICE)
    piece = triton_launch.Piece(queries.to(DEVICE), table.to(DEVICE), 0, none, None, codes)
    plan = planner(selected=8)(4, 64, 40, 3, 0, queries.dtype, table.dtype, code_group=8)
    space = triton_launch.Workspace(plan, piece.queries)
    block = CodedBlock(piece, plan, space, 0, 4)
    block.scan()
    scores = reference.canonical_scores(queries[:, None], table[None]).view(4, 8, 8).double().to(DEVICE)
    bound = space.group_max.double()
    assert (bound >= scores.amax(2)).all()
    step, residual, norm = codes.bounds.double().T[:, None, :]
    queries = queries.double().to(DEVICE)
    rounding = queries.abs().amax(1, keepdim=True) / 127 * 40**0.5 / 2  # of the query's codes, at most
    of_row = queries.norm(dim=1, keepdim=True) * (residual + 50 * 2.0**-22 * (norm + 3 * scale * 40**0.5))
    assert (bound - scores.amax(2) <= 2 * (rounding * norm + of_row) + 2.0**-120).all()
    groups = triton_launch.key_with(torch.arange(8, device=DEVICE)).expand(4, 8).contiguous()
    keys = torch.empty(4, 64, dtype=torch.int64, device=DEVICE)
    block._refine(block._gather, 0, groups, keys)
    bound = triton_launch.value_of(keys).view(4, 8, 8).double()
    assert (bound >= scores).all()
    assert (bound - scores <= 2 * of_row[:, :, None] + 2.0**-120).all()


def test_rows_of_the_host_without_codes_come_in_windows(monkeypatch):
    rows_stay_on_the_host(monkeypatch)
    monkeypatch.setattr(device_stream, "WINDOW_BYTES", 4 * 6 * 20)
    queries, table = integers(2, 6), integers(130, 6)
    exclude, row_mask = torch.randint(-1, 130, (2, 4)), torch.rand(130) < 0.6
    for k in (3, 25):
        check(queries, [table[:41], table[:0], table[41:]], k, exclude, row_mask)
    # With too many rows wanted for one pass, codes are of no use to rows of the host.
    monkeypatch.setattr(triton_plan, "MAX_K", 4)
    coded(queries, table, 9)


def test_rows_written_in_place_are_encoded_anew():
    rows, queries = torch.randn(60, 16, device=DEVICE), torch.randn(2, 16, device=DEVICE)
    codes = codes_of(rows)
    rows.copy_(torch.randn(60, 16) * 7)
    expected = reference.forward(queries, [rows], 5, None, None)
    assert not quantized.are_of(codes, [rows])
    with rk.use_backend("triton"):  # codes that fell behind are not read
        assert_same_topk(backend.forward(queries, [rows], 5, None, None, codes), expected)
    quantized.refresh([rows], codes)
    assert_same_topk(search(queries, rows, 5, codes=codes), expected)


def test_codes_for_another_device_are_not_read():
    table = rk.ShardedTable.from_tensors([torch.randn(60, 16)])
    queries = torch.randn(2, 16)
    with rk.use_backend("triton" if DEVICE == "cpu" else None):
        expected = rk.mips_topk(queries, table, 5)
        if quantized.refuses(table.shards, torch.device("cpu")) is None:
            assert_same_topk(rk.mips_topk(queries, table.quantize(), 5), expected)


def test_encoding_keeps_its_promises():
    rows = torch.randn(70, 12) * torch.logspace(-30, 30, 70)[:, None]
    mean, _, codes, bounds = codes_of(rows)
    step, residual, norm = bounds.double().T[:, :, None]
    found = codes[:, :, :12].double() * step[:, :, None]
    x = torch.nn.functional.pad(rows.double(), (0, 0, 0, 2)).view(9, 8, 12).to(DEVICE)
    error = (x - mean.double() - found).norm(dim=2)
    error.view(-1)[70:] = 0  # what pads the last group
    assert (error <= residual).all() and (found.norm(dim=2) <= norm).all()
    assert (codes[:, :, 12:] == 0).all() and (codes[-1, 6:] == 0).all()
    assert codes.abs().max() == 127
    assert (residual[:, 0] <= step[:, 0] * 12**0.5 / 2 * (1 + 1e-5) + 1e-12 * norm[:, 0]).all()


def test_what_cannot_be_quantised_says_why():
    table = rk.ShardedTable.from_tensors([torch.randn(4, 8)])
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        table.quantize(device="meta")
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="device is cuda, and torch finds no GPU"):
            table.quantize(device="cuda")
        with pytest.raises(ValueError, match="torch finds no GPU"):
            table.pin_memory()
