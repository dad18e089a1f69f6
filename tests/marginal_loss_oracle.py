"""The marginal log-likelihood and its gradients in 60 digits, and how far float64 may stray from them."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import NamedTuple

import torch
from torch import Tensor

DIGITS = 60  # r of a document whose rivals have 1e-11 of the prior cancels 22 of them
EPS = 2.0**-52


class Inputs(NamedTuple):
    scores: Tensor  # [B, K]
    log_likelihood: Tensor  # [B, K, M]
    token_mask: Tensor | None = None
    doc_mask: Tensor | None = None
    log_weight: Tensor | None = None

    def options(self) -> dict[str, Tensor | None]:
        return dict(token_mask=self.token_mask, doc_mask=self.doc_mask, log_weight=self.log_weight)


class Answer(NamedTuple):
    """float64, gradients of the sum of the losses. A bound counts the roundings of a float64 computation."""

    loss: Tensor  # [B]
    d_scores: Tensor  # [B, K]
    d_log_likelihood: Tensor  # [B, K, M]
    count: int
    loss_bound: Tensor  # [B]
    d_scores_bound: Tensor  # [B, K]
    d_log_likelihood_bound: Tensor  # [B, K, M]
    residual_sum: Tensor  # [B, 1] sum over documents (and columns) of |r|


def solve(inputs: Inputs, mode: str) -> Answer:
    batch, documents, tokens = inputs.log_likelihood.shape
    zeros = {name: torch.zeros(batch, dtype=torch.float64) for name in ("loss", "loss_bound")}
    for name in ("d_scores", "d_scores_bound"):
        zeros[name] = torch.zeros(batch, documents, dtype=torch.float64)
    for name in ("d_log_likelihood", "d_log_likelihood_bound"):
        zeros[name] = torch.zeros(batch, documents, tokens, dtype=torch.float64)
    answer = Answer(count=0, residual_sum=torch.zeros(batch, 1, dtype=torch.float64), **zeros)
    count = 0
    with localcontext() as context:
        context.prec = DIGITS
        for b in range(batch):
            count += _solve_example(inputs, mode, b, answer)
    return answer._replace(count=count)


def _solve_example(inputs: Inputs, mode: str, b: int, answer: Answer) -> int:
    """Fill row b of the answer; return how many columns it has."""
    tokens = inputs.log_likelihood.shape[2]
    live = {k: s for k, s in _relevance(inputs, b).items() if s != Decimal("-inf")}
    scored = [m for m in range(tokens) if inputs.token_mask is None or inputs.token_mask[b, m]]
    if not live or not scored:
        return 0
    prior = _softmax(live)
    spread = float(max(live.values()) - min(live.values()))
    columns = [[m] for m in scored] if mode == "token" else [scored]
    for column in columns:
        terms = {k: [Decimal(inputs.log_likelihood[b, k, m].item()) for m in column] for k in live}
        likelihood = {k: sum(values) for k, values in terms.items()}
        possible = {k: value for k, value in likelihood.items() if value != Decimal("-inf")}
        if not possible:
            answer.loss[b] = torch.inf
            continue
        posterior = dict.fromkeys(live, Decimal(0)) | _softmax(
            {k: prior[k].ln() + possible[k] for k in possible}
        )
        best = max(possible, key=lambda k: posterior[k])
        log_marginal = prior[best].ln() + possible[best] - posterior[best].ln()
        size = float(max(abs(v) for k in possible for v in terms[k])) * len(column)
        # A sum of n terms is off by n roundings; differences and exponents by a few more.
        stray = EPS * (len(column) - 1) * size
        answer.loss[b] -= float(log_marginal)
        answer.loss_bound[b] += stray + 8 * EPS * (spread + size + 8)
        residual_sum = sum(abs(float(posterior[k] - prior[k])) for k in live)
        answer.residual_sum[b] += residual_sum
        reach = float(max(possible.values()) - min(possible.values()))
        for k in live:
            answer.d_scores[b, k] -= float(posterior[k] - prior[k])
            relative = 16 * EPS * (spread + reach + len(live))
            answer.d_scores_bound[b, k] += relative * residual_sum + 2 * stray * float(posterior[k])
            for m in column:
                answer.d_log_likelihood[b, k, m] = -float(posterior[k])
                answer.d_log_likelihood_bound[b, k, m] = (relative + 2 * stray) * float(posterior[k])
    return len(columns)


def _relevance(inputs: Inputs, b: int) -> dict[int, Decimal]:
    relevance = {}
    for k in range(inputs.scores.shape[1]):
        if inputs.doc_mask is None or inputs.doc_mask[b, k]:
            relevance[k] = Decimal(inputs.scores[b, k].item())
            if inputs.log_weight is not None:
                relevance[k] += Decimal(inputs.log_weight[b, k].item())
    return relevance


def _softmax(logits: dict[int, Decimal]) -> dict[int, Decimal]:
    top = max(logits.values())
    masses = {k: (value - top).exp() for k, value in logits.items()}
    return {k: mass / sum(masses.values()) for k, mass in masses.items()}
