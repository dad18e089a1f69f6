"""posterior: Bayes' rule, the retrieval utility, and what they are where there is nothing to say."""

from __future__ import annotations

import pytest
import torch
from marginal_loss_oracle import EPS, Inputs, solve

import realm_kernels as rk
from realm_kernels.testing import assert_within

MODES = ("sequence", "token")


def make(batch=3, documents=4, tokens=5, dtype=torch.float64):
    scores, log_weight = torch.randn(2, batch, documents).to(dtype)
    log_likelihood = -3 * torch.rand(batch, documents, tokens).to(dtype)
    token_mask, doc_mask = torch.rand(batch, tokens) < 0.7, torch.rand(batch, documents) < 0.8
    token_mask[:, 0], doc_mask[:, 0] = True, True
    return Inputs(scores, log_likelihood, token_mask, doc_mask, log_weight)


@pytest.mark.parametrize("mode", MODES)
def test_the_posterior_is_the_oracles_and_the_gradient_of_the_loss(mode):
    inputs = make()
    found = rk.posterior(*inputs[:2], **inputs.options(), mode=mode)
    expected = solve(inputs, mode)
    assert_within(found.log_marginal, -expected.loss, expected.loss_bound, "log_marginal")
    tokens = -expected.d_log_likelihood
    if mode == "sequence":
        posterior, bound = tokens.amax(2), expected.d_log_likelihood_bound.amax(2)  # alike for scored tokens
    else:
        posterior, bound = tokens, expected.d_log_likelihood_bound
    assert_within(found.posterior, posterior, bound, "posterior")
    residual = -expected.d_scores
    if mode == "sequence":
        assert_within(found.posterior - found.prior, residual, expected.d_scores_bound + 2 * EPS, "residual")


def test_the_prior_is_a_softmax_over_the_documents_there_are():
    inputs = make()
    prior = rk.posterior(*inputs[:2], **inputs.options()).prior
    logits = (inputs.scores + inputs.log_weight).masked_fill(~inputs.doc_mask, -torch.inf)
    assert_within(prior, logits.softmax(1), 8 * EPS, "prior")
    assert not prior[~inputs.doc_mask].any()


@pytest.mark.parametrize("mode", MODES)
def test_the_posterior_sums_to_one(mode):
    inputs = make()
    total = rk.posterior(*inputs[:2], **inputs.options(), mode=mode).posterior.sum(1)
    expected = torch.ones_like(total) if mode == "sequence" else inputs.token_mask.double()
    assert_within(total, expected, 8 * EPS, "total")


@pytest.mark.parametrize("mode", MODES)
def test_the_utility_is_what_a_document_adds_to_the_null_document(mode):
    inputs = make()
    utility = rk.posterior(*inputs[:2], **inputs.options(), mode=mode, null_index=0).utility
    evidence = torch.where(inputs.token_mask[:, None], inputs.log_likelihood, 0.0).sum(2)
    expected = torch.where(inputs.doc_mask, evidence - evidence[:, :1], 0.0)
    assert_within(utility, expected, 64 * EPS, "utility")
    assert not utility[:, 0].any()


def test_a_masked_null_document_leaves_the_utility_undefined():
    inputs = make()
    inputs.doc_mask[1, 0] = False
    inputs.log_likelihood[1, 0] = torch.nan
    utility = rk.posterior(*inputs[:2], **inputs.options(), null_index=0).utility
    assert utility[1].isnan().all() and not utility[[0, 2]].isnan().any()
    assert rk.posterior(*inputs[:2], **inputs.options()).utility is None


@pytest.mark.parametrize("mode", MODES)
def test_where_there_is_nothing_there_is_zero(mode):
    inputs = make()
    inputs.doc_mask[0] = False
    inputs.token_mask[1] = False
    inputs.log_likelihood[2] = -torch.inf
    found = rk.posterior(*inputs[:2], **inputs.options(), mode=mode, null_index=0)
    assert not found.prior[0].any() and not found.posterior.any()
    assert found.prior[1:].sum(1).allclose(torch.ones(2, dtype=torch.float64))
    assert found.log_marginal.tolist() == [0.0, 0.0, -torch.inf]


def test_what_is_masked_is_not_looked_at():
    inputs = make()
    expected = rk.posterior(*inputs[:2], **inputs.options(), null_index=0)
    live = inputs.doc_mask[:, :, None] & inputs.token_mask[:, None, :]
    inputs.log_likelihood[~live] = torch.nan
    inputs.scores[~inputs.doc_mask] = torch.nan
    found = rk.posterior(*inputs[:2], **inputs.options(), null_index=0)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "dtype, result",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_everything_is_detached_and_of_the_dtype_of_the_loss(dtype, result):
    inputs = make(dtype=dtype)
    inputs.scores.requires_grad_()
    found = rk.posterior(*inputs[:2], **inputs.options(), mode="token", null_index=0)
    assert all(x.dtype == result and not x.requires_grad for x in found)
    assert [list(x.shape) for x in found] == [[3], [3, 4], [3, 4, 5], [3, 4]]


@pytest.mark.parametrize("mode", MODES)
def test_a_likelihood_without_tokens_gives_one_posterior_a_document(mode):
    scores, log_likelihood = torch.randn(3, 4), -torch.rand(3, 4)
    found = rk.posterior(scores, log_likelihood, mode=mode, null_index=1)
    assert found.posterior.shape == found.utility.shape == (3, 4)


def test_compiles_into_one_graph():
    inputs = make(dtype=torch.float32)
    function = torch.compile(
        lambda s, x: rk.posterior(s, x, mode="token", null_index=0), fullgraph=True, backend="aot_eager"
    )
    expected = rk.posterior(*inputs[:2], mode="token", null_index=0)
    assert all(torch.equal(x, y) for x, y in zip(function(*inputs[:2]), expected, strict=True))
