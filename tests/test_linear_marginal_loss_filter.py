"""min_posterior of linear_marginal_loss: what it leaves out of the gradients, and that its bound holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_marginal_loss_cases import MODES, Case, Meter, gradients, make_case

import realm_kernels as rk
from realm_kernels import native
from realm_kernels.linear_marginal_loss import chunked, chunks
from realm_kernels.linear_marginal_loss.problem import Needs, Problem
from realm_kernels.testing import assert_within

modes = pytest.mark.parametrize("mode", MODES)
READER = ("hidden", "weight", "bias")
U = 2.0**-24


def posterior_of(case: Case, mode: str) -> torch.Tensor:
    """p(z|x,y) of each row, [B, K, M]."""
    posterior = case.loss(mode, return_posterior=True)[1].posterior.detach()
    return posterior if mode == "token" else posterior[:, :, None].expand(case.hidden.shape[:3])


@modes
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.4, 1.0], ids="{}".format)
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference", "static", "triton"])
def test_what_is_left_out_is_within_the_bound(mode, reduction, threshold, backend, monkeypatch):
    case = make_case(6, 4, 5, spread=4.0)
    wide = case if backend in ("cpu", "triton") else case.to(torch.float64)
    upstream = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5, 1.0]) if reduction == "none" else torch.tensor(2.0)
    g = upstream.expand(6).double().abs()
    dropped = (posterior_of(case.to(torch.float64), mode) < threshold) & (case.targets != -100)[:, None]
    dropped &= case.doc_mask[:, :, None]
    assert dropped.any()

    if backend == "static":
        monkeypatch.setattr(chunked, "may_count_rows", lambda device: False)
    with rk.use_backend("torch" if backend == "static" else backend):
        whole, some = (
            gradients(
                lambda c, t=t: c.loss(mode, reduction, min_posterior=t),
                wide,
                upstream=upstream.to(wide.scores.dtype),
            )
            for t in (0.0, threshold)
        )
    for name in ("loss", "scores", "log_weight"):
        assert torch.equal(some[name], whole[name]), name

    lengths = torch.where(dropped, case.hidden.double().norm(dim=3) * g[:, None, None], 0.0)
    rounding = {
        name: (1e-12 if wide is not case else 64 * U) * whole[name].double().abs().sum() for name in READER
    }
    error = {name: (some[name] - whole[name]).double().norm() for name in ("weight", "bias")}
    assert 0 < error["weight"] <= 2**0.5 * threshold * lengths.sum() + rounding["weight"]
    rows = torch.where(dropped, g[:, None, None], 0.0).sum()
    assert 0 < error["bias"] <= 2**0.5 * threshold * rows + rounding["bias"]
    of_rows = (some["hidden"] - whole["hidden"]).double().norm(dim=3)
    longest = case.weight.double().norm(dim=1).amax()
    bound = torch.where(dropped, 2 * threshold * longest * g[:, None, None], 0.0)
    assert_within(of_rows, torch.zeros_like(of_rows), bound + rounding["hidden"], "d_hidden of a row")
    assert (some["hidden"][dropped] == 0).all()


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_zero_and_a_bound_below_every_posterior_change_no_bit(mode, dtype, reduction):
    case = make_case(4, dtype=dtype, spread=0.1)
    plain, zero, tiny = (
        gradients(lambda c, o=options: c.loss(mode, reduction, **o).sum(), case)
        for options in ({}, {"min_posterior": 0.0}, {"min_posterior": 1e-30})
    )
    for name, value in plain.items():
        assert torch.equal(zero[name], value) and torch.equal(tiny[name], value), name


@pytest.mark.parametrize("rows", [5, 12, 1000], ids="rows{}".format)
def test_on_the_cpu_rows_left_out_cost_the_loss_and_no_more(rows, monkeypatch):
    case = make_case(7, 3, 4, width=8, vocabulary=500, masks=False, spread=3.0)
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", rows * 500 * 4)
    problem = Problem(*vars(case).values(), -100, "sequence", 0.2)
    kept = int((posterior_of(case, "sequence") >= 0.2).sum())
    assert 0 < kept < 84
    with Meter() as meter:
        chunked.forward(problem, Needs(True, True, True), "none")
    assert meter.flops == 2 * 8 * 500 * (84 + 3 * kept)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("rows", [12, 1000], ids="rows{}".format)
def test_the_kernels_of_the_cpu_too_see_no_row_again_that_is_left_out(rows, reduction, monkeypatch):
    case = make_case(7, 3, 4, width=8, vocabulary=500, masks=False, spread=3.0).requiring(*READER)
    monkeypatch.setattr(chunks, "CACHE_BYTES", rows * 500 * 4)
    monkeypatch.setattr(chunks, "LEAST_ROWS", 0)
    kept = int((posterior_of(case, "sequence") >= 0.2).sum())
    assert 0 < kept < 84
    taken = []

    class Counting:
        def __getattr__(self, name):
            return getattr(kernels, name)

        def linear_marginal_loss(self, *arguments):
            found = kernels.linear_marginal_loss(*arguments)
            taken.append(found[1])
            return found

    kernels = native.cpu
    monkeypatch.setattr(native, "cpu", Counting())
    with rk.use_backend("cpu"):
        case.loss(reduction=reduction, min_posterior=0.2).sum().backward()
    assert taken == [84, kept]


def test_below_one_of_k_the_best_document_stays():
    """Of four equal ones all do, and no bit changes."""
    case = make_case(3, 4, masks=False)
    hidden = case.hidden[:, :1].expand_as(case.hidden)
    case = replace(case, hidden=hidden, scores=torch.zeros(3, 4), log_weight=None)
    some = gradients(lambda c: c.loss(min_posterior=0.2499), case, READER)
    for name, value in gradients(Case.loss, case, READER).items():
        assert torch.equal(some[name], value), name


def test_a_threshold_that_is_none_is_refused():
    case = make_case()
    for wrong, error in (
        (-0.1, ValueError),
        (1.5, ValueError),
        (float("nan"), ValueError),
        (True, TypeError),
        ("0", TypeError),
    ):
        with pytest.raises(error, match="linear_marginal_loss: min_posterior must be"):
            case.loss(min_posterior=wrong)


def test_the_module_passes_it_on():
    case = make_case(spread=3.0).requiring("weight")
    module = rk.nn.LinearMarginalLoss(min_posterior=0.3)
    loss = module(case.scores, case.hidden, case.weight, case.targets, **case.options())
    want, whole = (torch.autograd.grad(case.loss(min_posterior=t), case.weight)[0] for t in (0.3, 0.0))
    assert torch.equal(torch.autograd.grad(loss, case.weight)[0], want) and not torch.equal(want, whole)
    assert "min_posterior=0.3" in repr(module)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_it_compiles_whole(reduction):
    case = make_case(spread=3.0).requiring(*READER)

    def loss(hidden, weight, bias):
        return replace(case, hidden=hidden, weight=weight, bias=bias).loss(
            reduction=reduction, min_posterior=0.3
        )

    inputs = [getattr(case, name) for name in READER]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted, gotten = (torch.autograd.grad(f(*inputs).sum(), inputs) for f in (loss, compiled))
    for name, want, got in zip(READER, wanted, gotten, strict=True):
        assert torch.equal(want, got), name


def test_the_documents_that_stay_keep_their_gradient():
    case = make_case(2, 3, 2, width=3, vocabulary=5, masks=False, spread=2.0).to(torch.float64)
    found = gradients(lambda c: c.loss(reduction="sum", min_posterior=0.2), case, ("hidden",))["hidden"]
    whole = gradients(lambda c: c.loss(reduction="sum"), case, ("hidden",))["hidden"]
    stays = posterior_of(case, "sequence") >= 0.2
    assert 0 < stays.sum() < stays.numel()
    assert torch.equal(found != 0, stays[..., None].expand_as(found))
    assert_within(found[stays], whole[stays], 1e-13, "d_hidden")
