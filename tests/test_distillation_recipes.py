"""The recipes of marginal_loss/README.md, EMDR2 and perplexity distillation, against their formulas in torch.

The oracle is float64 autograd through the objective as its paper writes it; the recipes are what the README
prints, run here. Inputs are float64, where both may stray by a few roundings of numbers of size 10.
"""

import re
from pathlib import Path

import pytest
import torch
from linear_marginal_loss_cases import Meter

import realm_kernels as rk
from realm_kernels.testing import assert_within

README = Path(rk.__file__).parent / "marginal_loss" / "README.md"
BOUND = 1e-13  # 450 roundings: B, K and M are below 10 and no logit is above 20
BATCH, DOCUMENTS, TOKENS, HIDDEN, VOCABULARY = 4, 5, 3, 6, 11


@pytest.fixture(scope="module")
def recipes():
    """All functions that the README defines."""
    found = {}
    for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(compile(code, str(README), "exec"), found)
    return found


class Problem:
    """A batch whose last two examples have no document and no scored token."""

    def __init__(self):
        self.scores = torch.randn(BATCH, DOCUMENTS).double().requires_grad_()
        self.hidden = torch.randn(BATCH, DOCUMENTS, TOKENS, HIDDEN).double().requires_grad_()
        self.weight = torch.randn(VOCABULARY, HIDDEN).double().requires_grad_()
        self.targets = torch.randint(VOCABULARY, (BATCH, TOKENS))
        self.targets[1, 2] = self.targets[3] = -100
        self.token_mask = self.targets >= 0
        self.doc_mask = torch.rand(BATCH, DOCUMENTS) < 0.7
        self.doc_mask[:, 0], self.doc_mask[2] = True, False
        logits = (self.hidden @ self.weight.T).log_softmax(-1)
        chosen = self.targets.clamp(min=0)[:, None, :, None].expand(-1, DOCUMENTS, -1, 1)
        self.log_likelihood = logits.gather(-1, chosen)[..., 0]  # [B, K, M], with the reader's graph

    def rows(self):
        """(scores, summed log-likelihood, both of unmasked documents) of each example that teaches."""
        for b in range(2):
            keep = self.doc_mask[b]
            summed = (self.log_likelihood[b] * self.token_mask[b]).sum(1)
            yield self.scores[b, keep], summed[keep].detach()

    def assert_recipe(self, loss, expected):
        assert_within(loss, expected.detach(), BOUND, "loss")
        d_scores = torch.autograd.grad(expected, self.scores, retain_graph=True)[0]
        leaves = (self.scores, self.hidden, self.weight)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        assert_within(found[0], d_scores, BOUND, "d_scores")
        assert d_scores[:2].any() and found[1:] == (None, None)  # the reader takes no gradient


def test_emdr2_teaches_the_retriever_by_a_detached_reader(recipes):
    x = Problem()
    expected = -sum((s.log_softmax(0) + y).logsumexp(0) for s, y in x.rows()) / 2  # of examples that count
    x.assert_recipe(recipes["emdr2"](x.scores, x.log_likelihood, x.token_mask, x.doc_mask), expected)
    x.assert_recipe(recipes["emdr2_of_hidden"](x.scores, x.hidden, x.weight, x.targets, x.doc_mask), expected)


def test_perplexity_distillation_is_the_divergence_from_the_readers_softmax(recipes):
    x = Problem()
    expected = 0.0
    for s, y in x.rows():
        target = y.softmax(0)
        expected += (target * (target.log() - s.log_softmax(0))).sum() / BATCH
    for target in (
        recipes["target_of"](x.log_likelihood, x.token_mask, x.doc_mask),
        recipes["target_of_hidden"](x.hidden, x.weight, x.targets, x.doc_mask),
    ):
        x.assert_recipe(recipes["perplexity_distillation"](x.scores, target, x.doc_mask), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_detached_reader_costs_one_product(reduction):
    """As explained, and as counted over forward and backward."""
    x = Problem()
    inputs = (x.scores, x.hidden.detach(), x.weight.detach(), x.targets.clamp(min=0))
    explained = rk.explain(rk.linear_marginal_loss, *inputs, reduction=reduction)
    with rk.use_backend("torch"), Meter() as meter:
        rk.linear_marginal_loss(*inputs, reduction=reduction).sum().backward()
    assert x.scores.grad.any()
    assert explained.flops == meter.flops == 2 * BATCH * DOCUMENTS * TOKENS * HIDDEN * VOCABULARY
