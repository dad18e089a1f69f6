"""What linear_marginal_loss does on a GPU, run on the CPU: static shapes, half-precision products.

torch's CPU has no product of half-precision operands with a float32 result; these tests give it one with the
meaning cuBLAS gives it. What they cannot show is cuBLAS itself: the tests marked gpu do, where one is.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_marginal_loss_cases import (
    DIFFERENTIABLE,
    MODES,
    Case,
    assert_no_worse_than_torch,
    eager,
    gradients,
    make_case,
)
from torch.nn import functional as F

import realm_kernels as rk
from realm_kernels.linear_marginal_loss import chunked, chunks, op, passes, products, reference, triton
from realm_kernels.linear_marginal_loss.problem import Needs, Problem, posterior_factor
from realm_kernels.testing import assert_within

modes = pytest.mark.parametrize("mode", MODES)
backends = pytest.mark.parametrize("backend", ["torch", "triton", "triton:epilogue"])
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
@backends
def test_static_shapes_look_at_nothing_masks_hide(mode, backend, static_shapes):
    case = make_case(dtype=torch.bfloat16)
    hide = ~case.doc_mask[:, :, None, None] | (case.targets == -100)[:, None, :, None]
    spoiled = replace(case, hidden=case.hidden.masked_fill(hide, torch.nan))
    with rk.use_backend(backend):
        clean, dirty = (gradients(lambda c: c.loss(mode), c) for c in (case, spoiled))
    for name, value in clean.items():
        assert torch.equal(dirty[name], value), name


@pytest.mark.parametrize("counted", [False, True], ids=["static", "counted"])
@pytest.mark.parametrize("through", [passes.TORCH, *triton.PASSES.values()], ids=["torch", *triton.PASSES])
def test_a_target_out_of_range_makes_its_example_nan(counted, through, monkeypatch):
    """Where a look would synchronise, nothing refuses it."""
    monkeypatch.setattr(chunked, "may_count_rows", lambda device: counted)
    case = make_case(3, masks=False)
    targets = case.targets.clone()
    targets[1, 2] = 10**12
    problem = Problem(*vars(replace(case, targets=targets)).values(), -100, "sequence")
    *_, log_likelihood, units = chunked.forward(problem, Needs(True, False, False), "none", through)
    assert log_likelihood[1, :, 2].isnan().all() and units.d_hidden[1].isnan().all()
    assert log_likelihood[[0, 2]].isfinite().all() and units.d_hidden[[0, 2]].isfinite().all()


@modes
@half
@pytest.mark.parametrize("rows", [5, 15, 1000], ids="rows{}".format)
@pytest.mark.parametrize("adds", [False, True], ids=["adds-apart", "adds-inside"])
@backends
def test_half_precision_products_are_no_worse_than_torch(
    mode, dtype, rows, adds, backend, tensor_cores, monkeypatch
):
    case = make_case(5, dtype=dtype, vocabulary=300)
    monkeypatch.setattr(products, "ADDS_IN_FLOAT32", adds)
    copy = 2 if backend == "torch" else 0  # its gradients take the place of the logits
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", rows * case.weight.shape[0] * (4 + copy))
    oracle = gradients(lambda c: eager(c, mode), case.to(torch.float64))
    torch_error = gradients(lambda c: eager(c, mode), case)
    with rk.use_backend(backend):
        ours = gradients(lambda c: c.loss(mode), case)
    for name, expected in oracle.items():
        # Besides the roundings of a result: gradients of logits are half precision, as in torch.
        eps = 2.0**-23 if name in ("loss", "scores", "log_weight") else 3 * torch.finfo(dtype).eps
        error = (torch_error[name].double() - expected).abs().max()
        assert_within(ours[name], expected, error + eps * expected.abs().max(), name)


@modes
@pytest.mark.parametrize("reduction", ["none", "mean"])
@backends
def test_float16_neither_overflows_nor_vanishes(mode, reduction, backend, tensor_cores):
    """Gradients of 1e-7 a logit and the scale of a loss: float16 has no room for either as it is."""
    case = make_case(4, dtype=torch.float16, vocabulary=3000, masks=False)
    scale = 2.0**13 if reduction == "none" else 2.0**15  # the largest for which d_weight is finite
    upstream = torch.full((4,) if reduction == "none" else (), scale)
    wide = case.to(torch.float64)
    oracle = gradients(lambda c: eager(c, mode, reduction), wide, ("weight",), upstream.double())["weight"]
    with rk.use_backend(backend):
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


def test_the_epilogue_is_reached_by_its_name_alone_and_says_what_it_lacks():
    assert triton.EPILOGUE in op.BACKENDS and not triton.EPILOGUE.default
    with rk.use_backend("triton:epilogue"):
        told = rk.explain(rk.linear_marginal_loss, *list(vars(make_case(dtype=torch.bfloat16)).values())[:4])
        assert told.backend == "triton:epilogue"
        with pytest.raises(ValueError, match="takes bfloat16 and float16, got float32"):
            make_case().loss()
        with pytest.raises(ValueError, match=r"'triton:epilogue'\) names a backend this op lacks"):
            rk.mips_topk(torch.randn(2, 8), torch.randn(30, 8), 3)


def on_gpu(*sizes, **options) -> Case:
    case = make_case(*sizes, **options)
    return Case(**{name: None if x is None else x.cuda() for name, x in vars(case).items()})


def gpu(test):
    """Marks a test that needs one."""
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(absent(test))


@gpu
@modes
@backends
@pytest.mark.parametrize("vocabulary", [1, 500, 30522], ids="V{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_it_is_no_worse_than_torch(mode, dtype, vocabulary, backend):
    if backend == "triton:epilogue" and dtype == torch.float32:
        pytest.skip("refused")
    case = on_gpu(5, dtype=dtype, vocabulary=vocabulary, width=123)
    with rk.use_backend(backend):
        assert_no_worse_than_torch(case, mode)
        ours, again = (gradients(lambda c: c.loss(mode), case) for _ in range(2))
    for name, value in ours.items():
        assert torch.equal(value, again[name]), name


@gpu
@modes
def test_on_a_gpu_triton_serves_and_a_target_out_of_range_makes_its_example_nan(mode):
    case = on_gpu(5, dtype=torch.bfloat16, masks=False)
    assert rk.explain(rk.linear_marginal_loss, *list(vars(case).values())[:4]).backend == "triton"
    case.targets[1, 2] = 10**12
    loss = case.loss(mode, "none")
    assert loss[1].isnan() and loss[[0, 2, 3, 4]].isfinite().all()


@gpu
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("rows", [40, 1000], ids=["two-passes", "one-pass"])
@pytest.mark.parametrize("backend", triton.PASSES)
def test_a_captured_graph_gives_the_bits_of_a_call(backend, reduction, rows, monkeypatch):
    """Nothing is read back: forward and backward are captured, and replayed on other inputs."""
    case = on_gpu(12, 8, 6, width=64, vocabulary=3000, dtype=torch.bfloat16).requiring(*DIFFERENTIABLE)
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", rows * 3000 * 4)
    leaves = [getattr(case, name) for name in DIFFERENTIABLE]

    def step():
        with rk.use_backend(backend):
            loss = case.loss(reduction=reduction)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels and warms cuBLAS, as torch asks before a capture
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    for name, got, want in zip(("loss", *DIFFERENTIABLE), captured, step(), strict=True):
        assert torch.equal(got, want), name


@gpu
def test_on_a_gpu_the_memory_is_the_workspace_and_one_sum_of_the_weight():
    """B = 64, K = 8, M = 20, H = 768, V = 30522 in bfloat16: at most 300 MB beyond inputs and gradients."""
    case = on_gpu(64, 8, 20, width=768, vocabulary=30522, dtype=torch.bfloat16, masks=False)
    case = case.requiring("scores", "hidden", "weight")
    case.loss().backward()
    case.scores.grad = case.hidden.grad = case.weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case.loss().backward()
    torch.cuda.synchronize()
    gradients_of_inputs = case.hidden.nbytes + case.weight.nbytes + case.scores.nbytes
    assert torch.cuda.max_memory_allocated() - before - gradients_of_inputs <= 300e6
