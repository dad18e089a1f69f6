"""The model of a GPU's times: no stage beats the limit, and the document holds what the plans say today."""

import pytest
import torch

from benchmarks import time_model, time_model_hopper
from benchmarks.gpu_model import H200, Stage
from realm_kernels import native
from realm_kernels.mips_topk.plan import cost


def test_the_document_holds_the_tables_of_the_plans():
    text = time_model.DOCS.read_text()
    assert text == time_model.written(text, H200), "run python -m benchmarks.time_model --write"
    assert "**Nothing in this section was measured.**" in text


def test_a_stage_takes_as_long_as_the_slowest_of_what_it_does():
    stage = Stage("any", bytes=4.3e9, flops=790e9, ops=1.0, launches=2)
    assert stage.seconds(H200) == pytest.approx(1e-3 + 2 * H200.launch_seconds)
    assert Stage("any", bytes=4.3e9, flops=2 * 790e9).bound(H200) == "matrix"
    assert Stage("any", bytes=1).bound(H200) == ""


@pytest.mark.parametrize("k", [8, 100])
@pytest.mark.parametrize("batch", time_model.BATCHES)
@pytest.mark.parametrize("rows", ["bfloat16", "float32", "int8"])
def test_a_search_moves_and_multiplies_no_less_than_its_cost(batch, k, rows):
    num_rows, dim, codes = time_model.WIKIPEDIA, time_model.DIM, rows == "int8"
    dtype = torch.bfloat16 if codes else getattr(torch, rows)
    scanned = torch.int8 if codes else dtype
    stages = time_model.mips_topk_stages(batch, num_rows, dim, k, dtype, codes)
    moved, flops = cost(batch, num_rows, dim, k, scanned.itemsize, 2)
    assert sum(stage.bytes for stage in stages) >= moved
    assert sum(stage.flops for stage in stages) >= flops
    assert sum(stage.seconds(H200) for stage in stages) >= time_model.mips_limit(batch, k, scanned, H200)


SEARCHES = [
    (batch, num_rows, dim, k, codes)
    for _, num_rows, dim, k, codes, batches in time_model_hopper.SEARCHES
    for batch in (*batches, 700, 5000)
]


@pytest.mark.parametrize("batch,num_rows,dim,k,codes", SEARCHES)
def test_a_search_on_hopper_moves_and_multiplies_no_less_than_its_cost(batch, num_rows, dim, k, codes):
    stages = time_model_hopper.stages(batch, num_rows, dim, k, codes)
    scanned = torch.int8 if codes else torch.bfloat16
    moved, flops = cost(batch, num_rows, dim, k, scanned.itemsize, 2)
    assert sum(stage.bytes for stage in stages) >= moved
    assert sum(stage.flops for stage in stages) >= flops
    limit = time_model.mips_limit(batch, k, scanned, H200, num_rows, dim)
    assert sum(stage.seconds(H200) for stage in stages) >= limit


@pytest.mark.skipif(native.cuda is None, reason="the CUDA module was not built")
@pytest.mark.parametrize("batch,num_rows,dim,k,codes", SEARCHES)
def test_the_model_of_the_hopper_scan_has_the_sizes_of_its_plan(batch, num_rows, dim, k, codes):
    shape = [batch, num_rows, dim, k, 0], "int8" if codes else "bfloat16", True, 128 if codes else 0
    plan = native.cuda.mips_topk_plan((*shape, 132, 32, time_model_hopper.WORKSPACE_BYTES))
    assert plan["kept"] == time_model_hopper.kept(dim, k, codes)
    assert plan["selected"] == time_model_hopper.selected(dim, k, codes)
    assert plan["batch"] == time_model_hopper.pass_of(batch, num_rows, dim, k, codes)
    assert plan["cluster"] == (time_model_hopper.CLUSTER if plan["shape"] == "deep" else 1)


def test_a_loss_takes_no_less_than_its_products():
    for batch in time_model.LINEAR_BATCHES:
        for backend in time_model.LINEAR_BACKENDS:
            stages = time_model.linear_marginal_loss_stages(batch, backend)
            products = sum(stage.flops for stage in stages)
            rows = batch * time_model.DOCUMENTS * time_model.TOKENS
            assert products == 3 * 2 * rows * time_model.WIDTH * time_model.VOCABULARY
