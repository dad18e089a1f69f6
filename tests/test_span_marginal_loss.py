"""span_marginal_loss against an oracle of 50 decimal digits, and its laws at every edge."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import NamedTuple

import pytest
import torch
from optional_hypothesis import given, settings, st
from torch import Tensor

import realm_kernels as rk
from realm_kernels import native
from realm_kernels.testing import assert_within

NORMALIZATIONS = ("document", "global")
HALF_ULP32, EPS64 = 2.0**-24, 2.0**-52
both = pytest.mark.parametrize("normalization", NORMALIZATIONS)
BACKENDS = ["reference"]
if native.cpu is not None:
    BACKENDS += [f"cpu:{name}" for name in native.cpu.instruction_sets()]
if not native.triton_missing():
    BACKENDS.append("triton")
# The interpreter computes in numpy, which warns of the infinities and NaN that these laws are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton")


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request):
    """Every law holds for every backend of the spans."""
    with rk.use_backend(request.param):
        yield request.param


def there(x):
    """On the GPU where Triton is to serve one."""
    is_gpu = torch.cuda.is_available() and rk.backends.forced_backend() == "triton"
    return x.cuda() if is_gpu and isinstance(x, Tensor) else x


def loss_of(*inputs: Tensor, **options) -> Tensor:
    """rk.span_marginal_loss, from the CPU to the CPU."""
    options = {name: there(x) for name, x in options.items()}
    return rk.span_marginal_loss(*map(there, inputs), **options).cpu()


class Case(NamedTuple):
    scores: Tensor
    span_scores: Tensor
    correct: Tensor
    valid: Tensor
    doc_mask: Tensor
    log_weight: Tensor

    def loss(self, normalization: str, reduction: str = "none") -> Tensor:
        return loss_of(
            self.scores,
            self.span_scores,
            self.correct,
            valid=self.valid,
            doc_mask=self.doc_mask,
            log_weight=self.log_weight,
            normalization=normalization,
            reduction=reduction,
        )


def make_case(batch=5, documents=4, spans=7, dtype=torch.float32, spread=3.0, p_correct=0.3) -> Case:
    return Case(
        (spread * torch.randn(batch, documents)).to(dtype),
        (spread * torch.randn(batch, documents, spans)).to(dtype),
        torch.rand(batch, documents, spans) < p_correct,
        torch.rand(batch, documents, spans) < 0.8,
        torch.rand(batch, documents) < 0.8,
        torch.randn(batch, documents).to(dtype),
    )


def oracle(case: Case, normalization: str) -> tuple[Tensor, Tensor, Tensor]:
    """loss [B] and its gradients to scores [B, K] and span_scores [B, K, C], in 50 digits."""
    batch, documents, spans = case.span_scores.shape
    loss = torch.zeros(batch, dtype=torch.float64)
    d_scores = torch.zeros(batch, documents, dtype=torch.float64)
    d_spans = torch.zeros(batch, documents, spans, dtype=torch.float64)
    with localcontext() as context:
        context.prec = 50
        for b in range(batch):
            weight = {
                k: (Decimal(case.scores[b, k].item()) + Decimal(case.log_weight[b, k].item())).exp()
                for k in range(documents)
                if case.doc_mask[b, k]
            }
            mass = {
                (k, c): Decimal(case.span_scores[b, k, c].item()).exp()
                for k in weight
                for c in range(spans)
                if case.valid[b, k, c]
            }
            if normalization == "document":
                total = {k: sum(m for (j, _), m in mass.items() if j == k) for k in weight}
                prior = {k: w / sum(weight.values()) for k, w in weight.items()}
                joint = {(k, c): prior[k] * m / total[k] for (k, c), m in mass.items()}
            else:
                everything = sum(weight[k] * m for (k, _), m in mass.items())
                joint = {(k, c): weight[k] * m / everything for (k, c), m in mass.items()}
                prior = {k: sum((p for (j, _), p in joint.items() if j == k), Decimal(0)) for k in weight}
            marginal = sum((p for (k, c), p in joint.items() if case.correct[b, k, c]), Decimal(0))
            if marginal == 0:
                continue
            loss[b] = float(-marginal.ln())
            for k in weight:
                hit = sum(
                    (joint[k, c] for c in range(spans) if (k, c) in mass and case.correct[b, k, c]),
                    Decimal(0),
                )
                posterior = hit / marginal
                d_scores[b, k] = float(prior[k] - posterior)
                for c in range(spans):
                    if (k, c) not in mass:
                        continue
                    right = joint[k, c] / marginal if case.correct[b, k, c] else Decimal(0)
                    share = joint[k, c] / prior[k] * posterior if normalization == "document" else joint[k, c]
                    d_spans[b, k, c] = float(share - right)
    return loss, d_scores, d_spans


def gradients(case: Case, normalization: str) -> tuple[Tensor, Tensor, Tensor]:
    scores, spans = case.scores.clone().requires_grad_(), case.span_scores.clone().requires_grad_()
    loss = case._replace(scores=scores, span_scores=spans).loss(normalization)
    return (loss.detach(), *torch.autograd.grad(loss.sum(), (scores, spans)))


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_agrees_with_fifty_digits(normalization, dtype, spread):
    case = make_case(dtype=dtype, spread=spread)
    want_loss, want_scores, want_spans = oracle(case, normalization)
    loss, d_scores, d_spans = gradients(case, normalization)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert d_scores.dtype == d_spans.dtype == dtype
    # Inside all is float64: log-sum-exps of |x| <= 2 * 4 * spread, each good to a few ulps of that.
    inside = 16 * EPS64 * (1 + 8 * spread)
    loss_ulp = 0 if dtype == torch.float64 else HALF_ULP32
    out_ulp = 0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    least = 0 if dtype == torch.float64 else torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert_within(loss, want_loss, loss_ulp * want_loss.abs() + inside, "loss")
    assert_within(
        d_scores, want_scores, (out_ulp + HALF_ULP32) * want_scores.abs() + inside + least, "d_scores"
    )
    assert_within(
        d_spans, want_spans, (out_ulp + HALF_ULP32) * want_spans.abs() + inside + least, "d_span_scores"
    )


@both
def test_retrieval_gradient_survives_nearly_equal_documents(normalization):
    """d_scores within 1e-5 of sum |r|, where the plain difference of float32 probabilities is noise."""
    spans = torch.tensor([0.0, -3.0]) + 1e-5 * torch.randn(6, 8, 2)
    case = make_case(6, 8, 2)._replace(
        span_scores=spans,
        correct=torch.tensor([True, False]).expand(6, 8, 2),
        valid=torch.ones(6, 8, 2, dtype=torch.bool),
        doc_mask=torch.ones(6, 8, dtype=torch.bool),
    )
    _, d_scores, _ = gradients(case, normalization)
    _, want, _ = oracle(case, normalization)
    assert (want.abs() < 1e-4).all()
    assert_within(d_scores, want, 1e-5 * want.abs().sum(1, keepdim=True), "d_scores")


@both
def test_retrieval_gradient_survives_a_tiny_prior_of_the_best_document(normalization):
    case = make_case(4, 5, 3, p_correct=0.5)
    scores = case.scores.clone()
    scores[:, 0] -= 25.0  # a prior of about 1e-11
    spans = case.span_scores.clone()
    spans[:, 1:, 0] = -60.0
    only_first = torch.zeros_like(case.correct)
    only_first[:, :, 0] = True
    case = case._replace(
        scores=scores,
        span_scores=spans,
        correct=only_first,
        valid=torch.ones_like(case.valid),
        doc_mask=torch.ones_like(case.doc_mask),
    )
    _, d_scores, _ = gradients(case, normalization)
    _, want, _ = oracle(case, normalization)
    assert_within(d_scores, want, 1e-5 * want.abs().sum(1, keepdim=True), "d_scores")


@both
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 2**31),
    p_correct=st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(deadline=None, max_examples=30)
def test_any_masks_agree_with_the_oracle(normalization, shape, seed, p_correct):
    torch.manual_seed(seed)
    case = make_case(*shape, dtype=torch.float64, p_correct=p_correct)
    for got, want in zip(gradients(case, normalization), oracle(case, normalization), strict=True):
        assert_within(got, want, 1000 * EPS64)


@both
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradients_and_second_derivatives_match_finite_differences(normalization, reduction):
    case = make_case(3, 3, 4, dtype=torch.float64, spread=1.0)
    inputs = [x.clone().requires_grad_() for x in (case.scores, case.span_scores, case.log_weight)]

    def loss(scores, span_scores, log_weight):
        changed = case._replace(scores=scores, span_scores=span_scores, log_weight=log_weight)
        return changed.loss(normalization, reduction)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_one_span_of_score_zero_is_the_released_retriever_loss():
    """ORQA and REALM: log-sum-exp over all blocks minus log-sum-exp over blocks that hold the answer."""
    scores = torch.randn(6, 50, dtype=torch.float64)
    has_answer = torch.rand(6, 50) < 0.1
    has_answer[:, 0] = True
    want = scores.logsumexp(1) - scores.masked_fill(~has_answer, -torch.inf).logsumexp(1)
    for normalization in NORMALIZATIONS:
        loss = loss_of(
            scores,
            torch.zeros(6, 50, 1),
            has_answer[:, :, None],
            normalization=normalization,
            reduction="none",
        )
        assert_within(loss, want, 64 * EPS64, normalization)


def test_equal_span_normalizers_make_both_normalizations_agree():
    spans = torch.randn(3, 1, 5, dtype=torch.float64).expand(3, 4, 5)
    scores, correct = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, 5) < 0.4
    document, whole = (
        loss_of(scores, spans, correct, normalization=n, reduction="none") for n in NORMALIZATIONS
    )
    assert_within(document, whole, 64 * EPS64)


@both
def test_without_a_correct_span_an_example_is_zero_and_not_counted(normalization):
    case = make_case(3, 4, 5)._replace(doc_mask=torch.ones(3, 4, dtype=torch.bool))
    correct, valid = torch.ones(3, 4, 5, dtype=torch.bool), torch.ones(3, 4, 5, dtype=torch.bool)
    correct[1] = False
    correct[2, 1:] = False
    valid[2, 0] = False  # what is correct there is not valid
    case = case._replace(correct=correct & (torch.rand(3, 4, 5) < 0.6), valid=valid)
    loss, d_scores, d_spans = gradients(case, normalization)
    assert loss[0] > 0
    for part in (loss[1:], d_scores[1:], d_spans[1:]):
        assert (part == 0).all()
    assert case.loss(normalization, "mean") == loss[0] == case.loss(normalization, "sum")


@both
def test_where_nothing_counts_the_mean_is_zero(normalization):
    case = make_case(3, 4, 5)._replace(correct=torch.zeros(3, 4, 5, dtype=torch.bool))
    assert case.loss(normalization, "mean") == 0
    empty = make_case(0, 4, 5)
    assert empty.loss(normalization).shape == (0,)
    assert empty.loss(normalization, "mean") == 0


def test_a_document_without_valid_spans_keeps_its_prior_with_likelihood_zero():
    scores, spans = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2, 2, dtype=torch.float64)
    correct, valid = torch.tensor([[[True, False]] * 2]), torch.tensor([[[True, True], [False, False]]])
    document = loss_of(scores, spans, correct, valid=valid)
    whole = loss_of(scores, spans, correct, valid=valid, normalization="global")
    assert_within(document, -torch.tensor(0.25, dtype=torch.float64).log(), 4 * EPS64)
    assert_within(whole, -torch.tensor(0.5, dtype=torch.float64).log(), 4 * EPS64)


@both
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_masks_hide_is_never_looked_at(normalization, junk):
    case = make_case(6, 4, 5)
    hidden_spans = ~(case.valid & case.doc_mask[:, :, None])
    spoiled = case._replace(
        scores=case.scores.masked_fill(~case.doc_mask, junk),
        log_weight=case.log_weight.masked_fill(~case.doc_mask, junk),
        span_scores=case.span_scores.masked_fill(hidden_spans, junk),
    )
    for clean, dirty in zip(gradients(case, normalization), gradients(spoiled, normalization), strict=True):
        assert torch.equal(clean, dirty)


@both
def test_a_score_of_minus_infinity_masks_the_document(normalization):
    case = make_case(6, 4, 5)
    by_score = case._replace(
        scores=case.scores.masked_fill(~case.doc_mask, -torch.inf), doc_mask=torch.ones_like(case.doc_mask)
    )
    for masked, scored in zip(
        gradients(case, normalization), gradients(by_score, normalization), strict=True
    ):
        assert torch.equal(masked, scored)


@both
@pytest.mark.parametrize("all_spans", [False, True], ids=["correct-impossible", "all-impossible"])
def test_impossible_answers_cost_infinity_and_have_no_gradient(normalization, all_spans):
    case = make_case(3, 4, 5)._replace(doc_mask=torch.ones(3, 4, dtype=torch.bool))
    correct = torch.zeros(3, 4, 5, dtype=torch.bool)
    correct[:, :, 0] = True
    spans = case.span_scores.clone()
    spans[1, :, : 5 if all_spans else 1] = -torch.inf
    case = case._replace(correct=correct, valid=torch.ones_like(correct), span_scores=spans)
    loss, d_scores, d_spans = gradients(case, normalization)
    assert loss[1] == torch.inf and loss[[0, 2]].isfinite().all()
    assert (d_scores[1] == 0).all() and (d_spans[1] == 0).all()
    assert d_scores.isfinite().all() and d_spans.isfinite().all()


@both
def test_where_every_span_is_correct_nothing_is_left_to_learn(normalization):
    case = make_case(3, 4, 5)
    valid = torch.ones_like(case.valid)
    case = case._replace(valid=valid, correct=valid, doc_mask=torch.ones_like(case.doc_mask))
    for part in gradients(case, normalization):
        assert (part == 0).all()


@both
def test_permuted_documents_permute_the_gradients(normalization):
    case = make_case(4, 6, 5, dtype=torch.float64)
    order = torch.randperm(6)
    loss, d_scores, d_spans = gradients(case, normalization)
    permuted = gradients(Case(*(part[:, order] for part in case)), normalization)
    for got, want in zip(permuted, (loss, d_scores[:, order], d_spans[:, order]), strict=True):
        assert_within(got, want, 1000 * EPS64)


@both
def test_log_weight_has_the_gradient_of_scores(normalization):
    case = make_case(4, 3, 5)
    scores, log_weight = case.scores.clone().requires_grad_(), case.log_weight.clone().requires_grad_()
    case._replace(scores=scores, log_weight=log_weight).loss(normalization, "mean").backward()
    assert torch.equal(scores.grad, log_weight.grad)


@both
def test_strided_and_expanded_inputs_equal_contiguous_ones(normalization):
    case = make_case(4, 3, 5)
    strided = Case(*(x.transpose(0, -1).contiguous().transpose(0, -1) for x in case))
    assert torch.equal(case.loss(normalization), strided.loss(normalization))
    one = Case(*(x[:1] for x in case))
    expanded = Case(*(x.expand(4, *x.shape[1:]) for x in one))
    assert torch.equal(expanded.loss(normalization), one.loss(normalization).expand(4))


@both
def test_two_calls_give_equal_bits(normalization):
    case = make_case(8, 6, 40)
    for first, second in zip(gradients(case, normalization), gradients(case, normalization), strict=True):
        assert torch.equal(first, second)


@both
def test_compiles_whole(normalization):
    case = make_case(4, 3, 5)
    spans = case.span_scores.clone().requires_grad_()

    def loss(span_scores):
        return case._replace(span_scores=span_scores).loss(normalization, "mean")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want, got = loss(spans), compiled(spans)
    # Two backends: float64 numbers that differ in their last places, each rounded once to float32.
    one_ulp = {"rtol": 2.0**-23, "atol": 0.0}
    torch.testing.assert_close(got, want, **one_ulp)
    torch.testing.assert_close(*(torch.autograd.grad(x, spans)[0] for x in (got, want)), **one_ulp)


@both
def test_autocast_changes_nothing(normalization):
    case = make_case(4, 3, 5)
    want = gradients(case, normalization)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(case, normalization)
    for x, y in zip(want, got, strict=True):
        assert torch.equal(x, y)


def test_bad_input_is_named():
    case = make_case(4, 3, 5)
    for changes, error, message in (
        ({"scores": [1.0]}, TypeError, r"span_marginal_loss: scores must be a Tensor \[B, K\]"),
        ({"scores": case.scores[0]}, ValueError, "scores must be"),
        ({"span_scores": case.span_scores[0]}, ValueError, r"span_scores must be \[B, K, C\], 3 axes"),
        ({"span_scores": case.span_scores[:, :2]}, ValueError, r"\[4, 3, any\], got float32\[4, 2, 5\]"),
        ({"span_scores": case.span_scores[:, :, :0]}, ValueError, "with C >= 1"),
        ({"span_scores": case.span_scores.long()}, ValueError, "span_scores must be of dtype"),
        ({"correct": case.correct[:, :, :4]}, ValueError, "correct must be"),
        ({"correct": case.correct.float()}, ValueError, "correct must be of dtype bool"),
        ({"valid": case.valid.int()}, ValueError, "valid must be of dtype bool"),
        ({"doc_mask": case.doc_mask[:, :2]}, ValueError, "doc_mask must be"),
        ({"log_weight": case.log_weight.int()}, ValueError, "log_weight must be of dtype"),
    ):
        with pytest.raises(error, match=message):
            case._replace(**changes).loss("document")
    with pytest.raises(ValueError, match="normalization must be one of 'document', 'global', got 'spans'"):
        case.loss("spans")
    with pytest.raises(ValueError, match="reduction must be one of 'none', 'sum', 'mean', got 'avg'"):
        case.loss("document", "avg")


@both
def test_explain_computes_nothing_and_counts_the_spans(normalization, backend):
    case = Case(*map(there, make_case(4, 3, 5)))
    told = rk.explain(rk.span_marginal_loss, *case[:3], valid=case.valid, normalization=normalization)
    assert told.op == "span_marginal_loss" and told.backend == backend.partition(":")[0]
    assert told.bytes == 4 * (3 * (5 * (4 + 2) + 4) + 12)
    with pytest.raises(ValueError, match="span_scores must be"):
        rk.explain(rk.span_marginal_loss, case.scores, case.scores, case.correct)


@both
def test_the_module_is_the_function_with_its_options(normalization):
    case = make_case(4, 3, 5)
    module = rk.nn.SpanMarginalLoss(normalization=normalization, reduction="sum")
    got = module(*case[:3], valid=case.valid, doc_mask=case.doc_mask, log_weight=case.log_weight)
    assert torch.equal(got, case.loss(normalization, "sum"))
    assert repr(module) == f"SpanMarginalLoss(normalization={normalization!r}, reduction='sum')"
    with pytest.raises(ValueError, match="SpanMarginalLoss: normalization must be one of"):
        rk.nn.SpanMarginalLoss(normalization="spans")


@both
@pytest.mark.skipif(native.cpu is None, reason="the CPU module was not built")
def test_the_number_of_threads_does_not_change_a_bit(normalization):
    case = make_case(40, 7, 131)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(gradients(case, normalization))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
