"""marginal_loss as a torch op: derivatives of both orders, who asked for them, compile, autocast, opcheck."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import realm_kernels as rk
from realm_kernels import native

MODES = ("sequence", "token")
REDUCTIONS = ("none", "sum", "mean")
BACKENDS = ["reference"] + (["cpu"] if native.cpu is not None else [])


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rk.use_backend(request.param):
        yield request.param


def make(batch=3, documents=4, tokens=5, dtype=torch.float64, requires_grad=True):
    tensors = (
        torch.randn(batch, documents),
        -3 * torch.rand(batch, documents, tokens),
        torch.randn(batch, documents),
    )
    return [x.to(dtype).requires_grad_(requires_grad) for x in tensors]


def masks(batch=3, documents=4, tokens=5):
    token_mask, doc_mask = torch.rand(batch, tokens) < 0.7, torch.rand(batch, documents) < 0.8
    doc_mask[0] = False  # an example that does not count
    return dict(token_mask=token_mask, doc_mask=doc_mask)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_first_and_second_derivatives_are_those_of_the_loss(backend, mode, reduction):
    options = masks()

    def loss(scores, log_likelihood, log_weight):
        return rk.marginal_loss(
            scores, log_likelihood, log_weight=log_weight, mode=mode, reduction=reduction, **options
        )

    assert gradcheck(loss, make())
    assert gradgradcheck(loss, make())


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_of_any_subset(backend, mode):
    for wanted in itertools.product([False, True], repeat=3):
        if any(wanted):
            inputs = [x.requires_grad_(want) for x, want in zip(make(2, 3, 2), wanted, strict=True)]
            assert gradgradcheck(lambda s, x, w: rk.marginal_loss(s, x, log_weight=w, mode=mode), inputs)


@pytest.mark.parametrize("mode", MODES)
def test_a_second_derivative_stops_at_what_cannot_happen(backend, mode):
    """Impossible answers and masked documents have no curvature, and no NaN."""
    scores, log_likelihood, _ = make(2, 3, 2)
    with torch.no_grad():
        log_likelihood[0] = -torch.inf
        scores[1, 2] = -torch.inf
    loss = rk.marginal_loss(scores, log_likelihood, mode=mode, reduction="none")
    first = torch.autograd.grad(loss.sum(), (scores, log_likelihood), create_graph=True)
    second = torch.autograd.grad(sum((x**2).sum() for x in first), (scores, log_likelihood))
    for x in second:
        assert torch.isfinite(x).all() and not x[0].any() and not x[1, 2].any() and x[1, :2].all()


def test_third_derivatives_are_refused(backend):
    scores, log_likelihood, _ = make()
    first = torch.autograd.grad(rk.marginal_loss(scores, log_likelihood), scores, create_graph=True)[0]
    second = torch.autograd.grad((first**2).sum(), scores, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="marginal_loss: third derivatives are not offered"):
        second.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_any_subset_of_inputs_may_ask_for_a_gradient(backend, mode):
    everything = make()
    options = masks()
    loss = rk.marginal_loss(*everything[:2], log_weight=everything[2], mode=mode, **options)
    expected = torch.autograd.grad(loss, everything)
    for wanted in itertools.product([False, True], repeat=3):
        inputs = [x.detach().requires_grad_(want) for x, want in zip(everything, wanted, strict=True)]
        loss = rk.marginal_loss(*inputs[:2], log_weight=inputs[2], mode=mode, **options)
        assert loss.requires_grad == any(wanted)
        if loss.requires_grad:
            loss.backward()
        for x, want, gradient in zip(inputs, wanted, expected, strict=True):
            assert torch.equal(x.grad, gradient) if want else x.grad is None


def test_a_gradient_nobody_asked_for_is_not_computed(backend):
    scores, log_likelihood, _ = make(requires_grad=False)
    arguments = torch.ones(3, dtype=torch.float64), scores, log_likelihood, None, None, None, "token"
    for needs in itertools.product([False, True], repeat=2):
        d_scores, d_log_likelihood = torch.ops.realm_kernels.marginal_loss_bwd(*arguments, *needs)
        assert d_scores.shape == (scores.shape if needs[0] else (0,))
        assert d_log_likelihood.shape == (log_likelihood.shape if needs[1] else (0,))


@pytest.mark.parametrize("mode", MODES)
def test_backward_twice_gives_the_same_bits_and_leaves_the_inputs_alone(backend, mode):
    inputs = make(dtype=torch.float32)
    before = [x.detach().clone() for x in inputs]
    loss = rk.marginal_loss(*inputs[:2], log_weight=inputs[2], mode=mode)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


class _Listening(TorchDispatchMode):
    """Sees every op, and counts ours."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += "realm_kernels" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(native.cpu is None, reason="the CPU module was not built")
@pytest.mark.parametrize("tokens", [1, 3, 12])
@pytest.mark.parametrize("documents", [3, 501], ids=["little", "much"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_way_past_the_dispatcher_gives_the_same_bits(mode, dtype, documents, tokens):
    """Where nothing listens a call on the CPU takes it, and keeps what the backward needs if that is much.
    Where something does it sees the ops, which keep nothing. A gradient is the same whoever else asks."""
    everything = make(5, documents, tokens, dtype)
    options = masks(5, documents, tokens) | {"mode": mode}
    with _Listening() as listening:
        loss = rk.marginal_loss(*everything[:2], log_weight=everything[2], **options)
        expected = torch.autograd.grad(loss, everything)
    assert listening.seen == 2
    for wanted in itertools.product([False, True], repeat=3):
        if any(wanted):
            inputs = [x.detach().requires_grad_(want) for x, want in zip(everything, wanted, strict=True)]
            found = rk.marginal_loss(*inputs[:2], log_weight=inputs[2], **options)
            assert found.grad_fn.name() == "_DirectBackward" and torch.equal(found, loss)
            found.backward()
            for x, want, gradient in zip(inputs, wanted, expected, strict=True):
                assert torch.equal(x.grad, gradient) if want else x.grad is None


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_opcheck(backend, mode, reduction):
    scores, log_likelihood, log_weight = make(dtype=torch.float32)
    options = masks()
    inputs = scores, log_likelihood, options["token_mask"], options["doc_mask"], log_weight, mode
    torch.library.opcheck(torch.ops.realm_kernels.marginal_loss.default, (*inputs, reduction))
    count = torch.tensor(2) if reduction == "mean" else None
    d_loss = torch.randn(3 if reduction == "none" else (), requires_grad=True)
    torch.library.opcheck(
        torch.ops.realm_kernels.marginal_loss_bwd.default, (d_loss, *inputs, True, True, count)
    )
    with torch.no_grad():
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
        v_scores, v_log_likelihood = torch.randn_like(scores), torch.randn_like(log_likelihood)
        torch.library.opcheck(
            torch.ops.realm_kernels.marginal_loss_bwd_bwd.default,
            (v_scores, v_log_likelihood, d_loss.detach(), *detached, count),
        )


@pytest.mark.parametrize("mode", MODES)
def test_compiles_into_one_graph(backend, mode):
    options = masks()

    def step(scores, log_likelihood, log_weight):
        return rk.marginal_loss(2 * scores, log_likelihood, log_weight=log_weight, mode=mode, **options) ** 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = make(dtype=torch.float32)
    expected, actual = step(*inputs), compiled(*inputs)
    assert torch.equal(actual, expected)
    pairs = zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_compiles_once_for_any_batch(backend):
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(
        lambda s, x: rk.marginal_loss(s, x, mode="token"), fullgraph=True, dynamic=True, backend=counter
    )
    for batch in (3, 4, 7):
        scores, log_likelihood, _ = make(batch, requires_grad=False)
        assert torch.equal(
            compiled(scores, log_likelihood), rk.marginal_loss(scores, log_likelihood, mode="token")
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", MODES)
def test_autocast_changes_nothing(backend, mode):
    inputs = make(dtype=torch.float32)
    expected = rk.marginal_loss(*inputs[:2], log_weight=inputs[2], mode=mode)
    with torch.autocast("cpu", torch.bfloat16):
        actual = rk.marginal_loss(*inputs[:2], log_weight=inputs[2], mode=mode)
        gradients = torch.autograd.grad(actual, inputs)
    assert torch.equal(actual, expected)
    assert all(
        torch.equal(x, y) for x, y in zip(gradients, torch.autograd.grad(expected, inputs), strict=True)
    )


def test_the_module_is_the_function():
    inputs = make(dtype=torch.float32)
    options = masks() | {"log_weight": inputs[2]}
    for mode, reduction in itertools.product(MODES, REDUCTIONS):
        module = rk.nn.MarginalLoss(mode=mode, reduction=reduction)
        expected = rk.marginal_loss(*inputs[:2], mode=mode, reduction=reduction, **options)
        assert torch.equal(module(*inputs[:2], **options), expected)
        assert repr(module) == f"MarginalLoss(mode={mode!r}, reduction={reduction!r})"
    with pytest.raises(
        ValueError, match="MarginalLoss: mode must be one of 'sequence', 'token', got 'tokens'"
    ):
        rk.nn.MarginalLoss(mode="tokens")
