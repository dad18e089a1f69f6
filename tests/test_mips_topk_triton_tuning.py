"""The choice of a scan's configuration: no result depends on it."""

import pytest
import torch
from mips_topk_triton_cases import DEVICE, QUIET, check, planner, search, small_sorts  # noqa: F401, a fixture

import realm_kernels as rk
from realm_kernels.mips_topk import triton_plan, triton_tuning
from realm_kernels.testing import assert_same_topk

pytestmark = QUIET


def test_a_pinned_configuration_is_used_and_changes_no_result(monkeypatch):
    queries, table = torch.randn(20, 8), torch.randn(70, 8)
    expected = search(queries, table, 4)
    used = []
    configured = triton_tuning.replace
    monkeypatch.setattr(
        triton_tuning, "replace", lambda plan, **change: used.append(change) or configured(plan, **change)
    )
    for config in (rk.ScanConfig(16, 4, 2, 1), rk.ScanConfig(64, 8, 4, 2)):
        with rk.use_scan_config(config):
            assert_same_topk(search(queries, table, 4), expected)
        assert used.pop() == dict(scan=config)
    assert used == []


def test_measuring_is_done_once_for_each_kind_of_search(monkeypatch):
    monkeypatch.setattr(triton_tuning, "_measured", {})
    tried = []
    measured = triton_tuning._seconds

    def seconds(plan, *rest):
        tried.append(plan.scan)
        return measured(plan, *rest)

    monkeypatch.setattr(triton_tuning, "_seconds", seconds)
    queries, table = torch.randn(2, 8), torch.randn(40, 8)
    with rk.use_scan_config("measured"):
        check(queries, table, 3)
        planned = planner()(2, 40, 8, 3, 0, torch.float32, torch.float32).scan
        assert tried == triton_tuning.candidates(planned) and 1 < len(tried) <= 7
        check(queries, table[:33], 4)
        assert len(tried) == len(triton_tuning.candidates(planned))
        check(queries, table[:15], 4)
        assert len(tried) == 2 * len(triton_tuning.candidates(planned))
    assert len(triton_tuning._measured) == 2
    check(queries, table[:5], 4)  # outside the block nothing is measured
    assert len(triton_tuning._measured) == 2


def test_every_plan_has_an_allowed_configuration():
    for B in (1, 16, 33, 64, 128, 4096):
        for dim in (1, 64, 100, 128, 768):
            for rows, group in ((torch.bfloat16, None), (torch.float32, None), (torch.float32, 32)):
                plan = triton_plan.plan_for(B, 10_000, dim, 8, 0, torch.float32, rows, code_group=group)
                assert plan.scan in triton_tuning.candidates(plan.scan)
                assert len(set(triton_tuning.candidates(plan.scan))) == len(
                    triton_tuning.candidates(plan.scan)
                )


def test_what_is_no_configuration_says_why():
    with pytest.raises(ValueError, match=r"block_b must be one of \(16, 32, 64, 128\), got 48"):
        rk.ScanConfig(48, 4, 3, 2)
    with (
        pytest.raises(ValueError, match='config must be "planned", "measured" or a ScanConfig, got \'fast\''),
        rk.use_scan_config("fast"),
    ):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("B", [1, 64, 300])
def test_on_a_gpu_measured_searches_are_those_of_the_cpu(B, monkeypatch):
    monkeypatch.undo()
    queries, table = torch.randn(B, 128), torch.randn(50_000, 128).bfloat16()
    expected = rk.mips_topk(queries, table, 8)
    on_gpu = rk.ShardedTable.from_tensors([table.cuda()])
    with rk.use_scan_config("measured"):
        for tried in (on_gpu, on_gpu.quantize()):
            for _ in range(2):
                assert_same_topk(rk.mips_topk(queries.cuda(), tried, 8), expected)
