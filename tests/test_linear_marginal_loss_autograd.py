"""linear_marginal_loss under autograd, torch.compile, autocast and forced backends."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from linear_marginal_loss_cases import DIFFERENTIABLE, MODES, Case, eager, gradients, make_case
from torch.utils._python_dispatch import TorchDispatchMode

import realm_kernels as rk
from realm_kernels.testing import assert_within

modes = pytest.mark.parametrize("mode", MODES)
reductions = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
backends = pytest.mark.parametrize("backend", ["torch", "reference"])


@modes
@reductions
@backends
def test_gradients_match_finite_differences(mode, reduction, backend):
    case = make_case(2, 2, 2, width=3, vocabulary=4).to(torch.float64)

    def loss(*tensors):
        return replace(case, **dict(zip(DIFFERENTIABLE, tensors, strict=True))).loss(mode, reduction)

    with rk.use_backend(backend):
        inputs = [getattr(case.requiring(name), name) for name in DIFFERENTIABLE]
        assert torch.autograd.gradcheck(loss, inputs)


@modes
@backends
def test_every_subset_of_inputs_may_require_a_gradient(mode, backend):
    case = make_case(2).to(torch.float64)
    with rk.use_backend(backend):
        for reduction in ("none", "mean"):
            upstream = torch.tensor([1.0, -0.5], dtype=torch.float64) if reduction == "none" else None
            whole = gradients(lambda c, r=reduction: eager(c, mode, r), case, upstream=upstream)
            for size in range(1, len(DIFFERENTIABLE) + 1):
                for names in combinations(DIFFERENTIABLE, size):
                    some = gradients(lambda c, r=reduction: c.loss(mode, r), case, names, upstream)
                    for name in names:
                        assert_within(some[name], whole[name], 1e-12, f"{name} of {names}")


def test_one_gradient_may_be_asked_of_many():
    """autograd.grad for a part of what requires a gradient, and then for the rest."""
    case = make_case().requiring(*DIFFERENTIABLE)
    whole = gradients(Case.loss, case)
    loss = case.loss()
    for name in DIFFERENTIABLE:
        (grad,) = torch.autograd.grad(loss, getattr(case, name), retain_graph=True)
        assert torch.equal(grad, whole[name]), name


@modes
@reductions
def test_a_second_backward_gives_the_same(mode, reduction):
    case = make_case().requiring(*DIFFERENTIABLE)
    inputs = [getattr(case, name) for name in DIFFERENTIABLE]
    loss = case.loss(mode, reduction)
    first = torch.autograd.grad(loss, inputs, torch.ones_like(loss), retain_graph=True)
    for scale in (1.0, 2.0):  # a power of two is exact
        again = torch.autograd.grad(loss, inputs, torch.full_like(loss, scale), retain_graph=True)
        for name, grad, expected in zip(DIFFERENTIABLE, again, first, strict=True):
            assert torch.equal(grad, scale * expected), name


@modes
@backends
def test_upstream_gradients_may_differ_be_zero_and_negative(mode, backend):
    case = make_case(5).to(torch.float64)
    upstream = torch.tensor([1.0, 0.0, -3.0, 1e6, 1e-6], dtype=torch.float64)
    want = gradients(lambda c: eager(c, mode, "none"), case, upstream=upstream)
    with rk.use_backend(backend):
        got = gradients(lambda c: c.loss(mode, "none"), case, upstream=upstream)
    for name, value in want.items():
        assert_within(got[name], value, 1e-12 * value.abs().max(), name)
    nothing = gradients(lambda c: c.loss(mode, "none"), case, upstream=torch.zeros(5, dtype=torch.float64))
    assert all((value == 0).all() for name, value in nothing.items() if name != "loss")


def test_an_infinite_loss_scale_reaches_no_example_without_a_part():
    case = make_case(3, masks=False)
    case = replace(case, targets=case.targets.index_fill(0, torch.tensor([1]), -100))
    found = gradients(lambda c: c.loss(reduction="sum") * torch.inf, case, ("scores", "hidden"))
    assert (found["scores"][1] == 0).all() and (found["hidden"][1] == 0).all()


class _Listening(TorchDispatchMode):
    """Sees every op, and counts ours."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += "realm_kernels" in str(func)
        return func(*args, **(kwargs or {}))


def _names(node):
    """Of a node of autograd's graph and all behind it."""
    yield type(node).__name__
    for behind, _ in node.next_functions:
        if behind is not None:
            yield from _names(behind)


@modes
@reductions
def test_the_way_past_the_dispatcher_gives_the_same_bits(mode, reduction):
    """Where nothing listens a call on the CPU takes it, where something does it sees the ops."""
    case = make_case(2).requiring(*DIFFERENTIABLE)
    upstream = torch.tensor([1.0, -0.5]) if reduction == "none" else None
    assert any("_Direct" in name for name in _names(case.loss(mode, reduction).grad_fn))
    expected = gradients(lambda c: c.loss(mode, reduction), case, upstream=upstream)
    with _Listening() as listening:
        found = gradients(lambda c: c.loss(mode, reduction), case, upstream=upstream)
    assert listening.seen >= 2
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_tied_embeddings_collect_both_gradients():
    case = make_case(masks=False).to(torch.float64)
    words = torch.randint(37, case.hidden.shape[:3])

    def tied(loss_of):
        embedding = case.weight.clone().requires_grad_()
        loss = loss_of(replace(case, hidden=embedding[words].tanh(), weight=embedding))
        return torch.autograd.grad(loss, embedding)[0]

    assert_within(tied(Case.loss), tied(eager), 1e-12)


def test_second_derivatives_are_refused():
    case = make_case().requiring("hidden", "scores")
    for name in ("hidden", "scores"):
        (grad,) = torch.autograd.grad(case.loss(), getattr(case, name), create_graph=True)
        with pytest.raises(
            RuntimeError, match="linear_marginal_loss: the gradient is itself not differentiable"
        ):
            grad.sum().backward()


@modes
def test_without_grad_mode_nothing_is_made_for_a_backward(mode):
    case = make_case().requiring(*DIFFERENTIABLE)
    with torch.no_grad():
        loss = case.loss(mode)
    assert not loss.requires_grad
    assert torch.equal(loss, case.loss(mode).detach())


@modes
@pytest.mark.parametrize("needs", [(False, False, False), (True, True, True)], ids=["loss", "gradients"])
def test_the_ops_keep_the_rules_of_torch_library(mode, needs):
    case = make_case(2).requiring(*(DIFFERENTIABLE if any(needs) else ()))
    tensors = tuple(vars(case).values())
    torch.library.opcheck(
        torch.ops.realm_kernels.linear_marginal_loss.default, (*tensors, -100, mode, 0.0, "mean", *needs)
    )
    # Its gradient is refused, so its inputs ask for none.
    tensors = tuple(None if x is None else x.detach() for x in tensors)
    forward = torch.ops.realm_kernels.linear_marginal_loss(*tensors, -100, mode, 0.0, "mean", *needs)
    problem = *tensors, -100, mode, 0.1
    arguments = torch.ones(()), *forward[1:], any(needs), *problem, *needs, True
    torch.library.opcheck(torch.ops.realm_kernels.linear_marginal_loss_bwd.default, arguments)


@modes
@reductions
def test_compiles_whole(mode, reduction):
    case = make_case().requiring(*DIFFERENTIABLE)
    inputs = [getattr(case, name) for name in DIFFERENTIABLE]

    def loss(*tensors):
        return replace(case, **dict(zip(DIFFERENTIABLE, tensors, strict=True))).loss(mode, reduction)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want, got = loss(*inputs), compiled(*inputs)
    assert torch.equal(want, got)
    wanted, gotten = (torch.autograd.grad(x.sum(), inputs) for x in (want, got))
    for name, x, y in zip(DIFFERENTIABLE, wanted, gotten, strict=True):
        assert torch.equal(x, y), name


def test_compiles_with_the_posterior():
    case = make_case()
    compiled = torch.compile(lambda c: c.loss(return_posterior=True), fullgraph=True, backend="aot_eager")
    (want, want_posterior), (got, got_posterior) = case.loss(return_posterior=True), compiled(case)
    assert torch.equal(want, got)
    assert torch.equal(want_posterior.posterior, got_posterior.posterior)


@modes
def test_autocast_casts_what_linear_casts_and_nothing_else(mode):
    case = make_case()

    def under_autocast(c):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return c.loss(mode)

    def cast_by_hand(c):
        half = {name: getattr(c, name).bfloat16() for name in ("hidden", "weight", "bias")}
        return replace(c, **half).loss(mode)

    got, want = gradients(under_autocast, case), gradients(cast_by_hand, case)
    for name, value in want.items():
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], value), name


def test_autocast_reaches_no_product_inside():
    """float64 is never cast: the same call inside and outside must agree to the bit, backward included."""
    case = make_case().requiring(*DIFFERENTIABLE)
    half = replace(case, **{name: getattr(case, name).half() for name in ("hidden", "weight", "bias")})
    want = gradients(lambda c: c.loss(reduction="none").sum(), half)
    with torch.autocast("cpu", dtype=torch.float16):
        got = gradients(lambda c: c.loss(reduction="none").sum(), half)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@modes
@reductions
def test_the_reference_and_the_chunks_agree(mode, reduction):
    case = make_case().to(torch.float64)
    found = {}
    for backend in ("torch", "reference"):
        with rk.use_backend(backend):
            found[backend] = gradients(lambda c: c.loss(mode, reduction).sum(), case)
    for name, value in found["reference"].items():
        assert_within(found["torch"][name], value, 1e-12, name)


def test_a_backend_chosen_for_the_call_holds_for_its_gradient():
    case = make_case().requiring("weight")
    with rk.use_backend("reference"):
        loss = case.loss(reduction="none")
    with rk.use_backend("torch"):
        (got,) = torch.autograd.grad(loss.sum(), case.weight)
    with rk.use_backend("reference"):
        want = gradients(lambda c: c.loss(reduction="none").sum(), case, ("weight",))["weight"]
    assert torch.equal(got, want)


def test_a_backend_this_op_lacks_is_named():
    with (
        rk.use_backend("cuda"),
        pytest.raises(
            ValueError, match="this op lacks; it has cpu, triton, triton:epilogue, torch, reference"
        ),
    ):
        make_case().loss()
