"""linear_marginal_loss against plain torch in float64, and its laws at every edge."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_marginal_loss_cases import MODES, assert_no_worse_than_torch, eager, gradients, make_case
from torch import Tensor

import realm_kernels as rk
from realm_kernels.linear_marginal_loss import chunks
from realm_kernels.testing import assert_within

modes = pytest.mark.parametrize("mode", MODES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@modes
@dtypes
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_is_no_worse_than_torch_in_the_same_dtype(mode, dtype, reduction):
    assert_no_worse_than_torch(make_case(dtype=dtype, width=123), mode, reduction)


@modes
@pytest.mark.parametrize("vocabulary", [1, 2, 30521, 30522, 30592])
def test_any_vocabulary_size(mode, vocabulary):
    case = make_case(2, 3, 3, width=16, vocabulary=vocabulary)
    assert_no_worse_than_torch(case, mode)
    if vocabulary == 1:
        found = gradients(lambda c: c.loss(mode), case)
        assert all((value == 0).all() for value in found.values())


@dtypes
def test_confident_rows_keep_the_digits_of_their_gradient(dtype):
    """p(target) within 1e-4 to 1e-9 of one: p - 1 is where plain torch has no digit left."""
    case = make_case(3, 2, 4, width=8, vocabulary=8, masks=False)
    confident = torch.eye(8)[case.targets][:, None].expand(3, 2, 4, 8) * torch.tensor([10.0, 20.0]).view(
        1, 2, 1, 1
    )
    case = replace(
        case, hidden=confident.to(dtype), weight=torch.eye(8).to(dtype), bias=torch.zeros(8).to(dtype)
    )
    oracle = gradients(lambda c: eager(c, "token", "sum"), case.to(torch.float64))
    ours = gradients(lambda c: c.loss("token", "sum"), case)
    eps = torch.finfo(dtype).eps
    # d_hidden of a row is the posterior times p - onehot: float32 roundings of each, and those of its dtype.
    bound = oracle["hidden"].abs() * (2 * eps + 64 * 2.0**-24) + torch.finfo(dtype).smallest_normal * eps
    assert_within(ours["hidden"], oracle["hidden"], bound, "d_hidden")


def test_float16_gradients_survive_a_loss_scale():
    case = make_case(dtype=torch.float16, vocabulary=300)
    assert_no_worse_than_torch(case, "sequence", upstream=2.0**14)
    upstream = torch.full((4,), 2.0**14)
    oracle = gradients(
        lambda c: eager(c, reduction="none"), case.to(torch.float64), upstream=upstream.double()
    )
    ours = gradients(lambda c: c.loss(reduction="none"), case, upstream=upstream)
    for name in ("hidden", "weight", "bias"):
        assert_within(ours[name], oracle[name], 4 * 2.0**-10 * oracle[name].abs().max(), name)


@pytest.mark.parametrize("offset", [2.0**10, 2.0**24])
def test_a_common_offset_of_the_logits_is_no_worse_than_in_torch(offset):
    case = make_case()
    assert_no_worse_than_torch(replace(case, bias=case.bias + offset), "sequence")


@modes
@pytest.mark.parametrize("hidden_by", ["document", "token"])
def test_what_masks_hide_is_never_looked_at(mode, hidden_by):
    case = make_case()
    if hidden_by == "document":
        hide = ~case.doc_mask
        spoiled = replace(
            case,
            scores=case.scores.masked_fill(hide, torch.nan),
            log_weight=case.log_weight.masked_fill(hide, torch.nan),
            hidden=case.hidden.masked_fill(hide[:, :, None, None], torch.nan),
        )
    else:
        hide = (case.targets == -100)[:, None, :, None]
        spoiled = replace(case, hidden=case.hidden.masked_fill(hide, torch.inf))
    clean, dirty = (gradients(lambda c: c.loss(mode), c) for c in (case, spoiled))
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name


@modes
def test_a_score_of_minus_infinity_masks_the_document(mode):
    case = make_case()
    by_score = replace(case, scores=case.scores.masked_fill(~case.doc_mask, -torch.inf), doc_mask=None)
    masked, scored = (gradients(lambda c: c.loss(mode), c) for c in (case, by_score))
    for name in masked:
        assert torch.equal(masked[name], scored[name]), name


@modes
def test_examples_without_documents_or_tokens_are_zero_and_not_counted(mode):
    case = make_case(4, masks=False)
    targets, doc_mask = case.targets.clone(), torch.ones(4, 3, dtype=torch.bool)
    targets[1] = -100
    doc_mask[2] = False
    case = replace(case, targets=targets, doc_mask=doc_mask)
    found = gradients(lambda c: c.loss(mode, "none").sum(), case)
    loss = case.loss(mode, "none")
    assert (loss[1:3] == 0).all() and (loss[[0, 3]] > 0).all()
    for name in ("scores", "hidden", "log_weight"):
        assert (found[name][1:3] == 0).all()
    counted = 2 if mode == "sequence" else 2 * case.targets.shape[1]
    assert_within(case.loss(mode, "mean"), loss.double().sum() / counted, 2.0**-22 * loss.sum(), "mean")


@modes
@pytest.mark.parametrize("sizes", [(0, 3, 5), (4, 3, 0), (4, 3, 5)], ids=["B0", "M0", "all-ignored"])
def test_where_nothing_counts_all_is_zero(mode, sizes):
    case = make_case(*sizes)
    case = replace(case, targets=torch.full_like(case.targets, -100))
    assert case.loss(mode, "none").shape == (sizes[0],)
    for reduction in ("sum", "mean"):
        for value in gradients(lambda c, r=reduction: c.loss(mode, r), case).values():
            assert (value == 0).all()


@modes
def test_ignore_index_may_lie_inside_the_vocabulary(mode):
    case = make_case()
    ignored = replace(case, targets=case.targets.masked_fill(case.targets == -100, 7))
    # Whatever had target 7 before is ignored as well: compare with torch's own meaning of the index.
    expected = eager(ignored.to(torch.float64), mode, ignore_index=7)
    assert_within(ignored.loss(mode, ignore_index=7), expected, 2.0**-20 * expected, "loss")


@modes
def test_impossible_targets_cost_infinity_and_have_no_gradient(mode):
    case = make_case(masks=False)
    bias = case.bias.clone()
    bias[5] = -torch.inf
    targets = case.targets.masked_fill(case.targets == 5, 6)
    targets[1, 2] = 5
    case = replace(case, bias=bias, targets=targets)
    loss = case.loss(mode, "none")
    assert loss[1] == torch.inf and loss[[0, 2, 3]].isfinite().all()
    found = gradients(lambda c: c.loss(mode, "none")[1], case)
    if mode == "token":  # the other tokens of the example are possible
        assert found.pop("loss") == torch.inf
        assert all(value.isfinite().all() for value in found.values())
        assert (found["hidden"][1, :, 2] == 0).all()
    else:
        assert all((value == 0).all() for name, value in found.items() if name != "loss")


@modes
@pytest.mark.parametrize("documents", [1, 4])
def test_equal_documents_give_the_retriever_no_gradient(mode, documents):
    case = make_case(3, 1, masks=False, width=8)
    # Small integers: every product and sum is exact, so equal documents are equal to the bit.
    hidden = torch.randint(-4, 5, case.hidden.shape).float().expand(3, documents, -1, -1)
    weight = torch.randint(-4, 5, case.weight.shape).float()
    case = replace(case, scores=torch.randn(3, documents), hidden=hidden, weight=weight, log_weight=None)
    found = gradients(lambda c: c.loss(mode, "sum"), case, ("scores", "hidden"))
    assert (found["scores"] == 0).all()
    assert (found["hidden"] != 0).any()


@modes
def test_permuted_documents_permute_the_gradients(mode):
    case = make_case(dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    permuted = replace(
        case,
        scores=case.scores[:, order],
        hidden=case.hidden[:, order],
        doc_mask=case.doc_mask[:, order],
        log_weight=case.log_weight[:, order],
    )
    straight, shuffled = (gradients(lambda c: c.loss(mode), c) for c in (case, permuted))
    for name, value in straight.items():
        expected = value[:, order] if name in ("scores", "hidden", "log_weight") else value
        # Scores are float32, and so is their gradient.
        bound = 1e-12 if value.dtype == torch.float64 else 2.0**-23
        assert_within(shuffled[name], expected.double(), bound, name)


@modes
def test_strided_and_expanded_inputs_equal_contiguous_ones(mode):
    case = make_case()
    backwards = {
        name: tensor.transpose(0, -1).contiguous().transpose(0, -1)
        for name, tensor in vars(case).items()
        if isinstance(tensor, Tensor) and tensor.dim() > 1
    }
    misaligned = torch.randn(case.weight.numel() + 1)[1:].view_as(case.weight).copy_(case.weight)
    for other in (replace(case, **backwards), replace(case, weight=misaligned)):
        straight, strided = (gradients(lambda c: c.loss(mode), c) for c in (case, other))
        for name, value in straight.items():
            assert_within(strided[name], value.double(), 2.0**-20 * value.abs().max(), name)
    one = replace(case, hidden=case.hidden[:, :1].expand_as(case.hidden))
    assert torch.equal(one.loss(mode), replace(one, hidden=one.hidden.contiguous()).loss(mode))


@modes
@dtypes
def test_two_calls_give_equal_bits(mode, dtype):
    case = make_case(dtype=dtype)
    first, second = (gradients(lambda c: c.loss(mode), case) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@modes
@dtypes
@pytest.mark.parametrize("rows", [1, 7, 15, 40], ids="rows{}".format)
def test_the_workspace_changes_nothing_but_roundings(mode, dtype, rows, monkeypatch):
    """One row, less than an example, exactly one, and several: one pass or two."""
    case = make_case(5, dtype=dtype)
    assert case.hidden[0, :, :, 0].numel() == 15
    whole = gradients(lambda c: c.loss(mode), case)
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", rows * case.weight.shape[0] * 4)
    split = gradients(lambda c: c.loss(mode), case)
    for name, value in whole.items():
        # Products of another shape sum in another order, and a half-precision result may round the other way.
        bound = (torch.finfo(value.dtype).eps + 64 * 2.0**-24) * value.abs().max()
        assert_within(split[name], value.double(), bound, name)


@modes
def test_the_posterior_is_that_of_the_likelihoods(mode):
    case = make_case().to(torch.float64)
    _, got = case.loss(mode, return_posterior=True)
    with torch.no_grad():
        logits = torch.nn.functional.linear(case.hidden, case.weight, case.bias)
        scored = case.targets != -100
        targets = case.targets.masked_fill(~scored, 0)[:, None, :, None].expand(4, 3, 5, 1)
        log_likelihood = logits.log_softmax(-1).gather(3, targets)[..., 0]
    want = rk.posterior(
        case.scores,
        log_likelihood,
        token_mask=scored,
        doc_mask=case.doc_mask,
        log_weight=case.log_weight,
        mode=mode,
    )
    assert got.utility is None and want.utility is None
    for name in ("log_marginal", "prior", "posterior"):
        assert_within(getattr(got, name), getattr(want, name), 1e-12, name)
        assert not getattr(got, name).requires_grad


def test_out_of_range_targets_are_refused_and_named():
    case = make_case(masks=False)
    for bad in (-1, 37, 10**12):
        targets = case.targets.clone()
        targets[0, 0] = bad
        with pytest.raises(
            ValueError, match=r"targets must be in \[0, V=37\) or ignore_index=-100, got values"
        ):
            replace(case, targets=targets).loss()


def test_bad_input_is_named():
    case = make_case()
    for changes, error, message in (
        ({"scores": 1.0}, TypeError, r"linear_marginal_loss: scores must be a Tensor \[B, K\]"),
        (
            {"scores": case.scores[:, :2], "doc_mask": None, "log_weight": None},
            ValueError,
            r"hidden must be \[B, K, M, H\] = \[4, 2, any, any\]",
        ),
        ({"hidden": case.hidden[0]}, ValueError, "hidden must be .* 4 axes"),
        ({"hidden": case.hidden[..., :0]}, ValueError, "hidden must be .* with H >= 1"),
        ({"hidden": case.hidden.long()}, ValueError, "hidden must be of dtype"),
        ({"weight": case.weight[:, :4]}, ValueError, r"weight must be \[V, H\] = \[any, 16\]"),
        ({"weight": case.weight[:0]}, ValueError, "weight must be .* with V >= 1"),
        ({"weight": case.weight.double()}, ValueError, "weight must be of dtype float32, got float64"),
        ({"targets": case.targets.int()}, ValueError, r"targets must be of dtype int64, got int32\[4, 5\]"),
        ({"targets": case.targets[:, :2]}, ValueError, "targets must be"),
        ({"bias": case.bias[:3]}, ValueError, r"bias must be \[V\] = \[37\], got float32\[3\]"),
        ({"bias": case.bias.half()}, ValueError, "bias must be of dtype float32"),
        ({"doc_mask": case.doc_mask.int()}, ValueError, "doc_mask must be of dtype bool"),
        ({"log_weight": case.log_weight[:2]}, ValueError, "log_weight must be"),
    ):
        with pytest.raises(error, match=message):
            replace(case, **changes).loss()
    with pytest.raises(TypeError, match="ignore_index must be an int, got float 1.0"):
        case.loss(ignore_index=1.0)
    with pytest.raises(
        ValueError, match=r"ignore_index must be an int64, in \[-2\*\*63, 2\*\*63\), got 9223372036854775808"
    ):
        case.loss(ignore_index=2**63)
    with pytest.raises(ValueError, match="mode must be one of 'sequence', 'token', got 'all'"):
        case.loss("all")
    with pytest.raises(ValueError, match="reduction must be one of"):
        case.loss(reduction="avg")


@modes
def test_the_module_is_the_function_with_its_options(mode):
    case = make_case()
    module = rk.nn.LinearMarginalLoss(mode=mode, reduction="sum", return_posterior=True)
    loss, posterior = module(case.scores, case.hidden, case.weight, case.targets, **case.options())
    assert torch.equal(loss, case.loss(mode, "sum")) and isinstance(posterior, rk.Posterior)
    assert "return_posterior=True" in repr(module)
    with pytest.raises(ValueError, match="LinearMarginalLoss: mode must be one of"):
        rk.nn.LinearMarginalLoss(mode="all")
