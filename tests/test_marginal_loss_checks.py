"""What marginal_loss and posterior refuse, word for word, and what explain() says of them."""

from __future__ import annotations

import pytest
import torch

import realm_kernels as rk

SCORES, TOKENS = torch.zeros(2, 3), torch.zeros(2, 3, 4)

WRONG = {
    "scores a list": (dict(scores=[1.0]), TypeError, "scores must be a Tensor [B, K], got list [1.0]"),
    "scores of one axis": (
        dict(scores=torch.zeros(3)),
        ValueError,
        "scores must be [B, K], 2 axes, got float32[3] on cpu",
    ),
    "no documents": (
        dict(scores=torch.zeros(2, 0)),
        ValueError,
        "scores must be [B, K] with K >= 1, got float32[2, 0] on cpu",
    ),
    "integer scores": (
        dict(scores=SCORES.long()),
        ValueError,
        "scores must be of dtype float32, bfloat16, float16, float64, got int64[2, 3] on cpu",
    ),
    "log_likelihood None": (
        dict(log_likelihood=None),
        TypeError,
        "log_likelihood must be a Tensor [B, K, M], got NoneType None",
    ),
    "log_likelihood of other documents": (
        dict(log_likelihood=torch.zeros(2, 4, 4)),
        ValueError,
        "log_likelihood must be [B, K, M] = [2, 3, any], got float32[2, 4, 4] on cpu",
    ),
    "log_likelihood of another batch": (
        dict(log_likelihood=torch.zeros(1, 3)),
        ValueError,
        "log_likelihood must be [B, K] = [2, 3], got float32[1, 3] on cpu",
    ),
    "log_likelihood of four axes": (
        dict(log_likelihood=TOKENS[None]),
        ValueError,
        "log_likelihood must be [B, K, M], 3 axes, got float32[1, 2, 3, 4] on cpu",
    ),
    "log_likelihood elsewhere": (
        dict(log_likelihood=TOKENS.to("meta")),
        ValueError,
        "log_likelihood must be on cpu with the other arguments, got float32[2, 3, 4] on meta",
    ),
    "token_mask without tokens": (
        dict(log_likelihood=SCORES, token_mask=torch.ones(2, 4, dtype=torch.bool)),
        ValueError,
        "token_mask must come with a log_likelihood [B, K, M], got one with float32[2, 3] on cpu",
    ),
    "token_mask of documents": (
        dict(token_mask=torch.ones(2, 3, dtype=torch.bool)),
        ValueError,
        "token_mask must be [B, M] = [2, 4], got bool[2, 3] on cpu",
    ),
    "token_mask of floats": (
        dict(token_mask=torch.ones(2, 4)),
        ValueError,
        "token_mask must be of dtype bool, got float32[2, 4] on cpu",
    ),
    "doc_mask of one example": (
        dict(doc_mask=torch.ones(1, 3, dtype=torch.bool)),
        ValueError,
        "doc_mask must be [B, K] = [2, 3], got bool[1, 3] on cpu",
    ),
    "log_weight of integers": (
        dict(log_weight=SCORES.int()),
        ValueError,
        "log_weight must be of dtype float32, bfloat16, float16, float64, got int32[2, 3] on cpu",
    ),
    "mode": (dict(mode="tokens"), ValueError, "mode must be one of 'sequence', 'token', got 'tokens'"),
}


@pytest.mark.parametrize("name", WRONG, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("op", ["marginal_loss", "posterior"])
def test_wrong_arguments_are_named(op, name):
    arguments, error, message = WRONG[name]
    arguments = dict(scores=SCORES, log_likelihood=TOKENS) | arguments
    with pytest.raises(error) as caught:
        getattr(rk, op)(**arguments)
    assert str(caught.value) == f"{op}: {message}"


def test_the_reduction_is_named():
    with pytest.raises(ValueError) as caught:
        rk.marginal_loss(SCORES, TOKENS, reduction="avg")
    assert str(caught.value) == "marginal_loss: reduction must be one of 'none', 'sum', 'mean', got 'avg'"


@pytest.mark.parametrize(
    "null_index, error, message",
    [
        (3, ValueError, "null_index must be in [0, K=3), got 3"),
        (-1, ValueError, "null_index must be in [0, K=3), got -1"),
        (True, TypeError, "null_index must be an int or None, got bool True"),
        (0.0, TypeError, "null_index must be an int or None, got float 0.0"),
    ],
)
def test_the_null_index_is_named(null_index, error, message):
    with pytest.raises(error) as caught:
        rk.posterior(SCORES, TOKENS, null_index=null_index)
    assert str(caught.value) == f"posterior: {message}"


def test_explain_computes_nothing_and_checks_everything():
    scores, log_likelihood = torch.zeros(64, 8, device="meta"), torch.zeros(64, 8, 20, device="meta")
    with rk.use_backend("reference"):
        explained = rk.explain(rk.marginal_loss, scores, log_likelihood, mode="token")
    assert (explained.op, explained.backend) == ("marginal_loss", "reference")
    assert explained.bytes == 64 * (8 * (20 * 4 + 4) + 4 + 8)
    with pytest.raises(ValueError, match="marginal_loss: mode must be one of"):
        rk.explain(rk.marginal_loss, scores, log_likelihood, mode="tokens")
