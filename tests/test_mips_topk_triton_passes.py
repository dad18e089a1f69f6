"""More rows, or more excluded rows, than one pass of the Triton backend takes."""

import pytest
import torch
from mips_topk_triton_cases import (
    DEVICE,
    INF,
    NAN,
    QUIET,
    check,
    integers,
    planner,
    search,
    small_sorts,  # noqa: F401, a fixture
)

from realm_kernels.mips_topk import gpu, triton_plan, triton_search

pytestmark = QUIET


@pytest.fixture(autouse=True)
def small_passes(monkeypatch):
    monkeypatch.setattr(triton_plan, "MAX_K", 4)
    monkeypatch.setattr(triton_plan, "MAX_SELECTED", 8)
    monkeypatch.setattr(triton_search, "DENSE_ROWS", 16)


def passes(queries, table, k, exclude=None, row_mask=None, **changes):
    """check() by passes alone, however many rows they rescore."""
    wanted = planner(**changes)

    def plan_for(*args, **more):
        plan = wanted(*args, **more)
        assert plan.lowers
        return plan

    check(queries, table, k, exclude, row_mask, plan_for)


@pytest.fixture
def never_all(monkeypatch):
    monkeypatch.setattr(triton_plan, "scores_all", lambda *args: False)


def test_every_row_is_scored_once_where_the_passes_would_rescore_as_many():
    queries, table = integers(3, 5), integers(100, 5)
    table[5] = NAN
    exclude = torch.randint(-1, 100, (3, 2))
    check(queries, list(table.tensor_split(2)), 30, exclude, torch.rand(100) < 0.9)
    check(queries, table, 100)


def test_more_rows_than_a_grid_takes_are_scored_in_chunks(monkeypatch):
    """A grid has 65535 programs along its second axis: k beyond 8.4 million needs several launches."""
    for k in (10**7, 2 * 10**9):
        rows = triton_search._dense_rows(2**31, k)
        assert triton_plan.ceil_div(rows, triton_plan.RESCORE_ROWS) <= 65535
    monkeypatch.setattr(triton_plan, "MAX_POSITIONS", 16)
    queries, table = integers(2, 5), integers(100, 5)
    check(queries, table, 60)


@pytest.mark.parametrize("k", [5, 17])
def test_passes_return_the_next_rows(k, never_all):
    passes(torch.randn(3, 8), torch.randn(150, 8), k)
    queries, table = integers(2, 5), integers(120, 5)
    exclude, row_mask = torch.randint(-1, 120, (2, 3)), torch.rand(120) < 0.8
    passes(queries, list(table.tensor_split(2)), k, exclude, row_mask)


def test_passes_end_where_the_rows_end(never_all):
    table = torch.randn(40, 6)
    table[7], table[20, 1] = NAN, -INF
    passes(torch.randn(2, 6).abs(), table, 40)
    row_mask = torch.zeros(90, dtype=torch.bool)
    row_mask[::9] = True
    passes(torch.randn(2, 6), torch.randn(90, 6), 19, row_mask=row_mask)


def test_ties_and_repairs_between_passes(never_all):
    passes(torch.randn(2, 6), torch.randn(1, 6).expand(100, 6), 11)
    passes(integers(2, 3), integers(140, 3, low=0, high=2), 14, selected=2)


def test_lowered_bounds_save_repairs(never_all):
    """Of a table whose best rows lie in few groups, and of one where they are spread."""
    before = gpu.repairs(DEVICE)
    table = torch.randn(320, 8)
    table[64:96] *= 5
    passes(torch.randn(3, 8).bfloat16(), table.bfloat16(), 12, slack=4)
    assert gpu.repairs(DEVICE) == before


def test_many_excluded_rows_are_taken_out_of_the_way_first(never_all, monkeypatch):
    monkeypatch.setattr(triton_plan, "MAX_SELECTED", 16)
    table = torch.randn(320, 8)
    queries = torch.randn(1, 8)
    exclude = (queries @ table.T).topk(32).indices
    plan = triton_plan.plan_for(1, 320, 8, 3, 32, torch.float32, torch.float32)
    assert plan.early > 0 and plan.passes == 1
    before = gpu.repairs(DEVICE)
    check(queries, table, 3, exclude, plan_for=planner(early=0))
    assert gpu.repairs(DEVICE) == before + 1
    passes(queries, table, 3, exclude)
    assert gpu.repairs(DEVICE) == before + 1


def test_equal_inputs_give_equal_bits_whatever_the_pass(never_all):
    queries, table = torch.randn(2, 8), torch.randn(100, 8)
    scores, indices = search(queries, table, 12)
    for k in (3, 7):
        few_scores, few = search(queries, table, k)
        assert torch.equal(few, indices[:, :k]) and torch.equal(few_scores, scores[:, :k])
