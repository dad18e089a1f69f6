"""The laws of marginal_loss, for every backend, against an oracle of 60 digits."""

from __future__ import annotations

import math

import pytest
import torch
from marginal_loss_cases import CASES, INF, MODES, NAN, ROUNDING, answer, rounded
from marginal_loss_oracle import Inputs, solve
from optional_hypothesis import given, settings, st

import realm_kernels as rk
from realm_kernels import native
from realm_kernels.testing import assert_within

# The interpreter computes in numpy, which warns of the infinities and NaN that these laws are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton")


def backend_names() -> list[str]:
    names = ["reference"]
    if native.cpu is not None:
        names += [f"cpu:{name}" for name in native.cpu.instruction_sets()]
    if not native.triton_missing():
        names.append("triton")
    if not native.cuda_unusable():
        names.append("cuda")
    return names


@pytest.fixture(params=backend_names())
def backend(request):
    """Every law holds for every backend; Triton runs in its interpreter where no GPU is."""
    with rk.use_backend(request.param):
        yield request.param


def device() -> str:
    return (
        "cuda" if torch.cuda.is_available() and rk.backends.forced_backend() in ("triton", "cuda") else "cpu"
    )


def run(inputs: Inputs, mode: str, reduction: str = "none", g: torch.Tensor | None = None):
    """loss, d_scores, d_log_likelihood and d_log_weight (None without log_weight), on the CPU."""
    moved = Inputs(*(None if x is None else x.to(device()) for x in inputs))
    scores, log_likelihood, _, _, log_weight = moved
    leaves = [x for x in (scores, log_likelihood, log_weight) if x is not None]
    for x in leaves:
        x.requires_grad_()
    loss = rk.marginal_loss(scores, log_likelihood, **moved.options(), mode=mode, reduction=reduction)
    g = torch.ones_like(loss) if g is None else g.to(loss)
    gradients = [x.cpu() for x in torch.autograd.grad(loss, leaves, g)]
    for x in leaves:
        x.requires_grad_(False)
    return loss.detach().cpu(), *gradients, *([None] if log_weight is None else [])


@pytest.mark.parametrize(
    "name, mode",
    # With one token the modes agree, which a law of its own says.
    [(name, mode) for name, x in CASES.items() for mode in MODES if mode == "sequence" or x[1].shape[2] > 1],
    ids=lambda name: name.replace(" ", "-"),
)
def test_the_loss_and_its_gradients_are_the_oracles_rounded_once(backend, name, mode):
    inputs, expected = CASES[name], answer(name, mode)
    loss, d_scores, d_log_likelihood, d_log_weight = run(inputs, mode)
    wide = torch.float64 in (inputs.scores.dtype, inputs.log_likelihood.dtype)
    assert loss.dtype == (torch.float64 if wide else torch.float32)
    assert (d_scores.dtype, d_log_likelihood.dtype) == (inputs.scores.dtype, inputs.log_likelihood.dtype)
    assert_within(loss, expected.loss, rounded(expected.loss_bound, expected.loss, loss.dtype), "loss")
    bound = rounded(expected.d_scores_bound, expected.d_scores, d_scores.dtype)
    assert_within(d_scores, expected.d_scores, bound, "d_scores")
    bound = rounded(expected.d_log_likelihood_bound, expected.d_log_likelihood, d_log_likelihood.dtype)
    assert_within(d_log_likelihood, expected.d_log_likelihood, bound, "d_log_likelihood")
    if d_log_weight is not None:
        bound = rounded(expected.d_scores_bound, expected.d_scores, d_log_weight.dtype)
        assert_within(d_log_weight, expected.d_scores, bound, "d_log_weight")


@pytest.mark.parametrize(
    "name",
    [name for name in CASES if name.startswith(("near", "best", "tiny", "one document holds", "it holds"))],
)
def test_the_retrieval_gradient_is_within_1e_5_of_the_sum_of_r(backend, name):
    expected = answer(name, "sequence")
    _, d_scores, _, _ = run(CASES[name], "sequence")
    smallest = ROUNDING[torch.float32][1]
    assert_within(d_scores, expected.d_scores, 1e-5 * expected.residual_sum + smallest, "d_scores")


def test_two_documents_of_one_prior_pull_by_half_a_tanh(backend):
    """r = tanh(d / 2) / 2 for every difference d of log-likelihoods, and the posterior is 1 / (1 + exp(-d)):
    to 2^-44 of each, as exponentials are good to 2^-47 of what they are."""
    sizes = [2.0**e * (1 + f / 7) for e in range(-60, 9) for f in range(7)]
    if backend == "triton":  # an example is a program there, and the interpreter slow
        sizes = sizes[::20]
    d = torch.tensor([s * x for x in sizes for s in (1, -1) if x < 600], dtype=torch.float64)
    log_likelihood = torch.stack([torch.zeros_like(d), d], 1)
    scores = torch.full_like(log_likelihood, 3.0)
    for mode, shape in (("sequence", (-1, 2, 1)), ("token", (1, 2, -1))):
        per_token = mode == "token"
        inputs = Inputs(
            scores[:1] if per_token else scores,
            log_likelihood.t().reshape(shape) if per_token else log_likelihood.reshape(shape),
        )
        _, d_scores, d_log_likelihood, _ = run(inputs, mode)
        posterior = torch.tensor(
            [[1 / (1 + math.exp(x)), 1 / (1 + math.exp(-x))] for x in d.tolist()], dtype=torch.float64
        )
        found = -d_log_likelihood[0].t() if per_token else -d_log_likelihood[:, :, 0]
        assert_within(found, posterior, 2.0**-44 * posterior, f"posterior, {mode}")
        if not per_token:
            r = torch.tensor([math.tanh(x / 2) / 2 for x in d.tolist()], dtype=torch.float64)
            assert_within(-d_scores, torch.stack([-r, r], 1), 2.0**-44 * r.abs()[:, None], "r")


@pytest.mark.parametrize("mode", MODES)
def test_documents_that_explain_the_answer_alike_are_left_where_they_are(backend, mode):
    """d_scores is exactly zero with one document, and with equal ones whatever their prior."""
    one = torch.randn(2, 1, 3) * 20
    for log_likelihood in (one, one.expand(2, 6, 3)):
        inputs = Inputs(10 * torch.randn(log_likelihood.shape[:2]), log_likelihood)
        _, d_scores, _, _ = run(inputs, mode)
        assert torch.equal(d_scores, torch.zeros_like(d_scores))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_masked_is_looked_at(backend, mode):
    doc_mask = torch.tensor([[True, False, True, True], [False, True, True, False], [False] * 4])
    token_mask = torch.tensor([[True, False, True], [False, True, True], [True, True, True]])
    scores, log_likelihood, log_weight = torch.randn(3, 4), -torch.rand(3, 4, 3), torch.randn(3, 4)
    live = doc_mask[:, :, None] & token_mask[:, None, :]
    results = []
    for poison in (0.0, NAN, INF, -INF):
        inputs = Inputs(
            scores.masked_fill(~doc_mask, poison),
            log_likelihood.masked_fill(~live, poison),
            token_mask,
            doc_mask,
            log_weight.masked_fill(~doc_mask, poison),
        )
        results.append(run(inputs, mode))
    for result in results:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
        assert not result[1][~doc_mask].any()
        assert not result[2][~live].any()


@pytest.mark.parametrize("mode", MODES)
def test_a_masked_document_might_as_well_not_be_there(backend, mode):
    scores, log_likelihood = torch.randn(2, 5).double(), -torch.rand(2, 5, 2).double()
    keep = [0, 2, 3]
    doc_mask = torch.zeros(2, 5, dtype=torch.bool)
    doc_mask[:, keep] = True
    loss, d_scores, d_log_likelihood, _ = run(Inputs(scores, log_likelihood, doc_mask=doc_mask), mode)
    fewer = run(Inputs(scores[:, keep], log_likelihood[:, keep]), mode)
    assert_within(loss, fewer[0], 1e-14, "loss")
    assert_within(d_scores[:, keep], fewer[1], 1e-15, "d_scores")
    assert_within(d_log_likelihood[:, keep], fewer[2], 1e-15, "d_log_likelihood")


@pytest.mark.parametrize("mode", MODES)
def test_a_score_of_minus_infinity_is_a_masked_document(backend, mode):
    scores, log_likelihood = torch.randn(2, 4), -torch.rand(2, 4, 3)
    doc_mask = torch.tensor([[True, False, True, True], [False] * 4])
    masked = run(Inputs(scores, log_likelihood, doc_mask=doc_mask), mode)
    infinite = run(Inputs(scores.masked_fill(~doc_mask, -INF), log_likelihood), mode)
    weight = torch.zeros(2, 4).masked_fill(~doc_mask, -INF)
    weighted = run(Inputs(scores, log_likelihood, log_weight=weight), mode)
    for x, y, z in zip(masked[:3], infinite[:3], weighted[:3], strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


@pytest.mark.parametrize("mode", MODES)
def test_an_example_of_nothing_is_zero_and_not_counted(backend, mode):
    scores, log_likelihood = torch.randn(4, 3), -torch.rand(4, 3, 2)
    doc_mask, token_mask = torch.ones(4, 3, dtype=torch.bool), torch.ones(4, 2, dtype=torch.bool)
    doc_mask[1], token_mask[2] = False, False
    token_mask[3, 0] = False
    inputs = Inputs(scores, log_likelihood, token_mask, doc_mask)
    each = run(inputs, mode)
    assert not each[0][1:3].any() and not each[1][1:3].any() and not each[2][1:3].any()
    counted = 2 if mode == "sequence" else 3
    mean, d_scores, d_log_likelihood, _ = run(inputs, mode, "mean")
    assert_within(mean, each[0].double().sum() / counted, 2.0**-22, "mean")
    assert_within(d_scores, each[1].double() / counted, 2.0**-23, "d_scores")
    assert_within(d_log_likelihood, each[2].double() / counted, 2.0**-23, "d_log_likelihood")
    nothing = Inputs(scores, log_likelihood, token_mask, torch.zeros_like(doc_mask))
    for reduction in ("sum", "mean"):
        for x in run(nothing, mode, reduction)[:3]:
            assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-"))
def test_reductions_over_the_adversarial_cases(backend, name):
    inputs = CASES[name]
    for mode in MODES:
        expected = answer(name, mode)
        for reduction, divisor in (("sum", 1), ("mean", max(1, expected.count))):
            loss, d_scores, d_log_likelihood, _ = run(inputs, mode, reduction)
            # The sum over examples is float64: a rounding of each, beside their own.
            bound = (
                expected.loss_bound + 2.0**-50 * expected.loss.abs().nan_to_num(posinf=0.0)
            ).sum() / divisor
            right = expected.loss.sum() / divisor
            assert_within(loss, right, rounded(bound, right, loss.dtype), reduction)
            for mine, right, bound in (
                (d_scores, expected.d_scores, expected.d_scores_bound),
                (d_log_likelihood, expected.d_log_likelihood, expected.d_log_likelihood_bound),
            ):
                # The upstream gradient, 1 / divisor, is one rounding more; on the CPU it scales what was
                # rounded to the dtype of the loss.
                bound = (bound + 2.0**-52 * right.abs()) / divisor
                if backend.startswith("cpu"):
                    bound = rounded(bound, right / divisor, loss.dtype)
                assert_within(mine, right / divisor, rounded(bound, right / divisor, mine.dtype), reduction)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("mode", MODES)
def test_an_impossible_answer_is_infinite_and_pulls_nothing(backend, mode, reduction):
    scores, log_likelihood = torch.randn(2, 3), -torch.rand(2, 3, 2)
    log_likelihood[0, :, 1] = -INF
    loss, d_scores, d_log_likelihood, _ = run(Inputs(scores, log_likelihood), mode, reduction)
    assert loss.flatten()[0] == INF
    assert torch.isfinite(d_scores).all() and torch.isfinite(d_log_likelihood).all()
    assert not d_log_likelihood[0, :, 1].any() and d_log_likelihood[1].all()
    if mode == "sequence":
        assert not d_scores[0].any() and not d_log_likelihood[0].any()
    else:  # the other token of that example still teaches
        assert d_scores[0].any() and d_log_likelihood[0, :, 0].all()


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_linear_in_what_comes_from_above(backend, mode):
    inputs = Inputs(torch.randn(3, 3).double(), -torch.rand(3, 3, 2).double())
    one = run(inputs, mode)
    g = torch.tensor([2.0, -0.5, 0.0])
    scaled = run(inputs, mode, g=g)
    assert_within(scaled[1], one[1] * g[:, None], 1e-15, "d_scores")
    assert_within(scaled[2], one[2] * g[:, None, None], 1e-15, "d_log_likelihood")
    zero = inputs._replace(doc_mask=torch.zeros(3, 3, dtype=torch.bool))
    for wild in (INF, NAN):
        _, d_scores, d_log_likelihood, _ = run(zero, mode, g=torch.full((3,), wild))
        assert not d_scores.any() and not d_log_likelihood.any()


def test_without_a_token_axis_the_modes_agree(backend):
    scores, log_likelihood = torch.randn(3, 4), -torch.rand(3, 4)
    losses = [rk.marginal_loss(scores, log_likelihood, mode=mode) for mode in MODES]
    losses += [rk.marginal_loss(scores, log_likelihood[:, :, None], mode=mode) for mode in MODES]
    assert all(torch.equal(loss, losses[0]) for loss in losses)


@pytest.mark.parametrize("mode", MODES)
def test_equal_inputs_give_equal_bits(backend, mode):
    inputs = Inputs(torch.randn(2, 7), -torch.rand(2, 7, 6))
    first, second = run(inputs, mode, "mean"), run(inputs, mode, "mean")
    assert all(torch.equal(x, y) for x, y in zip(first[:3], second[:3], strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_documents_does_not_matter(backend, mode):
    inputs = Inputs(torch.randn(2, 6).double(), -torch.rand(2, 6, 4).double())
    order = torch.randperm(6)
    loss, d_scores, d_log_likelihood, _ = run(inputs, mode)
    turned = run(Inputs(inputs.scores[:, order], inputs.log_likelihood[:, order]), mode)
    assert_within(turned[0], loss, 1e-14, "loss")
    assert_within(turned[1], d_scores[:, order], 1e-14, "d_scores")
    assert_within(turned[2], d_log_likelihood[:, order], 1e-14, "d_log_likelihood")


@pytest.mark.parametrize(
    "mode, dtype", [("sequence", torch.float32), ("token", torch.bfloat16), ("token", torch.float64)], ids=str
)
def test_memory_layout_does_not_matter(backend, mode, dtype):
    scores, log_likelihood = torch.randn(2, 5).to(dtype), -torch.rand(2, 5, 4).to(dtype)
    doc_mask, token_mask = torch.rand(2, 5) < 0.8, torch.rand(2, 4) < 0.8
    weight = torch.randn(2, 5).to(dtype)
    plain = run(Inputs(scores, log_likelihood, token_mask, doc_mask, weight), mode)
    turned = log_likelihood.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    shifted = torch.cat([scores.new_zeros(1), scores.flatten()])[1:].view(2, 5)
    strided = weight.t().contiguous().t()
    masks = token_mask.t().contiguous().t(), doc_mask.t().contiguous().t()
    for x, y in zip(run(Inputs(shifted, turned, *masks, strided), mode), plain, strict=True):
        assert torch.equal(x, y)
    same = log_likelihood[:, :1].expand(2, 5, 4)  # of stride 0
    scaled = run(Inputs(scores, same, token_mask, doc_mask), mode)
    for x, y in zip(
        scaled[:3], run(Inputs(scores, same.contiguous(), token_mask, doc_mask), mode), strict=False
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("documents, mode", [(1023, "token"), (1025, "token"), (8192, "sequence")])
def test_thousands_of_documents(backend, documents, mode):
    """Around and beyond a tile of documents, against the specification in float64."""
    inputs = Inputs(5 * torch.randn(1, documents).double(), -torch.rand(1, documents, 2).double() * 9)
    loss, d_scores, d_log_likelihood, _ = run(inputs, mode)
    with rk.use_backend("reference"):
        expected = run(inputs, mode)
    assert_within(loss, expected[0], 1e-12, "loss")
    assert_within(d_scores, expected[1], 1e-15 * documents**0.5, "d_scores")
    assert_within(d_log_likelihood, expected[2], 1e-15 * documents**0.5, "d_log_likelihood")


@pytest.mark.parametrize("mode", MODES)
def test_nan_and_infinity_in_a_document_reach_that_loss_alone(backend, mode):
    for wild in (NAN, INF):
        for where in ("scores", "log_likelihood"):
            inputs = Inputs(torch.randn(2, 4), -torch.rand(2, 4, 2))
            getattr(inputs, where)[1].flatten()[2] = wild
            loss, d_scores, _, _ = run(inputs, mode)
            assert loss[1].isnan() and not loss[0].isnan()
            assert d_scores[1].isnan().any() and not d_scores[0].isnan().any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 3, 0)], ids=["B0", "M0"])
def test_empty_inputs(backend, shape, mode):
    inputs = Inputs(torch.randn(shape[:2]), torch.zeros(shape))
    for reduction in ("none", "sum", "mean"):
        loss, d_scores, d_log_likelihood, _ = run(inputs, mode, reduction)
        assert loss.shape == (shape[:1] if reduction == "none" else ())
        assert not loss.any() and not d_scores.any()
        assert d_scores.shape == shape[:2] and d_log_likelihood.shape == shape


@pytest.mark.parametrize("mode", MODES)
def test_no_less_accurate_than_plain_torch(backend, mode):
    """In float32, on inputs that plain torch copes with."""
    inputs = Inputs(3 * torch.randn(4, 8), torch.randn(4, 8, 6).log_softmax(1))
    expected = solve(inputs, mode)
    scores, log_likelihood = (x.clone().requires_grad_() for x in inputs[:2])
    log_prior = scores.log_softmax(1)
    if mode == "sequence":
        plain = -(log_prior + log_likelihood.sum(2)).logsumexp(1)
    else:
        plain = -(log_prior[:, :, None] + log_likelihood).logsumexp(1).sum(1)
    theirs = plain, *torch.autograd.grad(plain.sum(), (scores, log_likelihood))
    ours = run(inputs, mode)
    for x, y, truth in zip(ours, theirs, expected, strict=False):
        epsilon = 2.0**-24 * truth.abs().max()  # of rounding the result
        assert (x.double() - truth).abs().max() <= (y.double() - truth).abs().max() + epsilon


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6)),
    mode=st.sampled_from(MODES),
    spread=st.sampled_from([0.0, 1e-6, 1.0, 50.0]),
    keep=st.sampled_from([0.3, 0.8, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_every_backend_agrees_with_the_specification(shape, mode, spread, keep, seed):
    """In float64, where bits that the loss would round away can be seen."""
    torch.manual_seed(seed)
    batch, documents, tokens = shape
    inputs = Inputs(
        spread * torch.randn(batch, documents).double(),
        spread * torch.randn(shape).double() - 10,
        torch.rand(batch, tokens) < keep,
        torch.rand(batch, documents) < keep,
        torch.randn(batch, documents).double(),
    )
    with rk.use_backend("reference"):
        expected = run(inputs, mode, "mean")
    scale = 1e-13 * (1 + spread) * tokens
    for name in backend_names()[1:]:
        with rk.use_backend(name):
            for x, y in zip(run(inputs, mode, "mean"), expected, strict=True):
                assert_within(x, y, scale, name)


@pytest.mark.skipif(native.cpu is None, reason="the CPU module was not built")
@pytest.mark.parametrize("mode", MODES)
def test_the_number_of_threads_does_not_change_a_bit(mode):
    inputs = Inputs(torch.randn(301, 8), -torch.rand(301, 8, 20))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with rk.use_backend("cpu"):
                results.append(run(inputs, mode, "mean"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result[:3], results[0][:3], strict=True))
