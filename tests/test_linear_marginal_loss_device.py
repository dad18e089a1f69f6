"""What linear_marginal_loss does on a GPU, run on the CPU: static shapes, half-precision products.

torch's CPU has no product of half-precision operands with a float32 result; these tests give it one with the
meaning cuBLAS gives it. What they cannot show is cuBLAS itself: the last test does, where a GPU is.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_marginal_loss_cases import MODES, Case, eager, gradients, make_case
from torch.nn import functional as F

from realm_kernels.linear_marginal_loss import chunked, chunks, products, reference
from realm_kernels.linear_marginal_loss.problem import Needs, Problem, posterior_factor
from realm_kernels.testing import assert_within

modes = pytest.mark.parametrize("mode", MODES)
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def static_shapes(monkeypatch):
    """No number of rows is looked at, as where that would synchronise."""
    monkeypatch.setattr(chunked, "may_count_rows", lambda device: False)


@pytest.fixture
def tensor_cores(monkeypatch):
    """Half-precision products with float32 results, and operands that overflow as theirs would."""
    library = torch.library.Library("aten", "IMPL")

    def mm(left, right, out_dtype, *, out):
        assert left.dtype == right.dtype != torch.float32 and out.dtype == out_dtype == torch.float32
        return torch.mm(left.float(), right.float(), out=out)

    def addmm(total, left, right, out_dtype, *, beta=1, alpha=1, out):
        assert left.dtype == right.dtype != torch.float32 and out.dtype == out_dtype == torch.float32
        return torch.addmm(total, left.float(), right.float(), beta=beta, alpha=alpha, out=out)

    def mm_functional(left, right, out_dtype):
        return mm(left, right, out_dtype, out=left.new_empty(left.shape[0], right.shape[1], dtype=out_dtype))

    library.impl("mm.dtype", mm_functional, "CPU")
    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(products, "sums_in_float32", lambda device: True)
    yield
    library._destroy()


@modes
@pytest.mark.parametrize("rows", [5, 15, 1000], ids="rows{}".format)
def test_static_shapes_give_the_same(mode, rows, static_shapes, monkeypatch):
    case = make_case(5).to(torch.float64)
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", rows * case.weight.shape[0] * 8)
    want, got = (gradients(lambda c, f=f: f(c, mode), case) for f in (eager, Case.loss))
    for name, value in want.items():
        assert_within(got[name], value, 1e-12, name)


@modes
def test_static_shapes_look_at_nothing_masks_hide(mode, static_shapes):
    case = make_case()
    hide = ~case.doc_mask[:, :, None, None] | (case.targets == -100)[:, None, :, None]
    spoiled = replace(case, hidden=case.hidden.masked_fill(hide, torch.nan))
    clean, dirty = (gradients(lambda c: c.loss(mode), c) for c in (case, spoiled))
    for name, value in clean.items():
        assert torch.equal(dirty[name], value), name


@pytest.mark.parametrize("counted", [False, True], ids=["static", "counted"])
def test_a_target_out_of_range_makes_its_example_nan(counted, monkeypatch):
    """Where a look would synchronise, nothing refuses it."""
    monkeypatch.setattr(chunked, "may_count_rows", lambda device: counted)
    case = make_case(3, masks=False)
    targets = case.targets.clone()
    targets[1, 2] = 10**12
    problem = Problem(*vars(replace(case, targets=targets)).values(), -100, "sequence")
    log_likelihood, units = chunked.forward(problem, Needs(True, False, False))
    assert log_likelihood[1, :, 2].isnan().all() and units.d_hidden[1].isnan().all()
    assert log_likelihood[[0, 2]].isfinite().all() and units.d_hidden[[0, 2]].isfinite().all()


@modes
@half
@pytest.mark.parametrize("rows", [5, 15, 1000], ids="rows{}".format)
@pytest.mark.parametrize("adds", [False, True], ids=["adds-apart", "adds-inside"])
def test_half_precision_products_are_no_worse_than_torch(mode, dtype, rows, adds, tensor_cores, monkeypatch):
    case = make_case(5, dtype=dtype, vocabulary=300)
    monkeypatch.setattr(products, "ADDS_IN_FLOAT32", adds)
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", rows * case.weight.shape[0] * (4 + 2))
    oracle = gradients(lambda c: eager(c, mode), case.to(torch.float64))
    torch_error = gradients(lambda c: eager(c, mode), case)
    ours = gradients(lambda c: c.loss(mode), case)
    for name, expected in oracle.items():
        # Besides the roundings of a result: gradients of logits are half precision, as in torch.
        eps = 2.0**-23 if name in ("loss", "scores", "log_weight") else 3 * torch.finfo(dtype).eps
        error = (torch_error[name].double() - expected).abs().max()
        assert_within(ours[name], expected, error + eps * expected.abs().max(), name)


@modes
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_float16_neither_overflows_nor_vanishes(mode, reduction, tensor_cores):
    """Gradients of 1e-7 a logit and the scale of a loss: float16 has no room for either as it is."""
    case = make_case(4, dtype=torch.float16, vocabulary=3000, masks=False)
    scale = 2.0**13 if reduction == "none" else 2.0**15  # the largest for which d_weight is finite
    upstream = torch.full((4,) if reduction == "none" else (), scale)
    wide = case.to(torch.float64)
    oracle = gradients(lambda c: eager(c, mode, reduction), wide, ("weight",), upstream.double())["weight"]
    ours = gradients(lambda c: c.loss(mode, reduction), case, ("weight",), upstream)["weight"]

    # What is rounded to float16 is d_logits, each within half an ulp, and in the end the result.
    problem = Problem(*vars(wide).values(), -100, mode)
    counted = 1 if reduction == "none" else (4 if mode == "sequence" else case.targets.numel())
    g = torch.full((4,), scale / counted, dtype=torch.float64)
    factor = posterior_factor(problem, reference.log_likelihood(problem), g)
    onehot = F.one_hot(case.targets, 3000)[:, None]
    d_logits = factor[..., None] * (reference.log_probabilities(problem).exp() - onehot)
    half_ulp = 2.0**-11
    products_error = half_ulp * torch.einsum("bkmv,bkmh->vh", d_logits.abs(), wide.hidden.abs())
    float32_error = 64 * 2.0**-24 * oracle.abs().max()
    assert_within(ours, oracle, products_error + 2 * half_ulp * oracle.abs() + float32_error, "d_weight")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_it_is_no_worse_than_torch(mode, dtype):
    cpu = make_case(5, dtype=dtype, vocabulary=30522)
    case = Case(**{name: None if x is None else x.cuda() for name, x in vars(cpu).items()})
    oracle = gradients(lambda c: eager(c, mode), case.to(torch.float64))
    torch_error = gradients(lambda c: eager(c, mode), case)
    ours = gradients(lambda c: c.loss(mode), case)
    again = gradients(lambda c: c.loss(mode), case)
    for name, expected in oracle.items():
        eps = 2.0**-22 if name in ("loss", "scores", "log_weight") else 3 * torch.finfo(dtype).eps
        error = (torch_error[name].double() - expected).abs().max()
        assert_within(ours[name], expected, error + eps * expected.abs().max(), name)
        assert torch.equal(ours[name], again[name]), name
