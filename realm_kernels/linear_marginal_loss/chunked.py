"""linear_marginal_loss without the logits of all rows: chunks of whole examples through torch's products.

A chunk holds all K * M rows of its examples, so their posteriors are known as soon as its logits are, and one
pass does everything:

    logits = W hidden^T + b                                [V, R]   first product
    statistics over V: log p(target), sum of exponentials  [R]      passes.py
    posterior of the chunk's examples, by marginal_loss    [R]
    d_logits = posterior (p - onehot(target)), in place    [V, R]   passes.py
    d_hidden = d_logits^T W                                [R, H]   second product
    d_weight += d_logits hidden, in float32                [V, H]   third product

The gradients are those of an upstream gradient of 1, to be scaled by the real one. Where that is not one
number for all examples (reduction "none" with a weight to train), and where one example outgrows the
workspace, a first pass takes the statistics alone and a second recomputes the logits: four products.
README.md counts the bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend
from .chunks import Chunks, chunks_of
from .passes import TORCH, Passes, Statistics
from .problem import Gradients, Needs, Problem, posterior_factor
from .products import products_for

WORDS_MOVED = 256  # at a time, where rows are left out of a chunk


class Rows(NamedTuple):
    """Some rows of a problem, those without a part in the loss left out or neutral."""

    place: Tensor | slice  # among all rows
    hidden: Tensor  # [R, H]
    targets: Tensor  # [R], 0 where out of range
    outside: Tensor  # [R], target out of range


def may_count_rows(device: torch.device) -> bool:
    """Whether rows without a part are counted and left out: elsewhere counting would synchronise."""
    return device.type == "cpu"


class Pass:
    """The buffers of one call, and what it does with one chunk. distributed.py says what ranks add to it."""

    def __init__(self, problem: Problem, needs: Needs, passes: Passes, chunks: Chunks | None = None) -> None:
        self.problem, self.needs, self.passes = problem, needs, passes
        self.chunks = chunks_of(problem, passes.in_place) if chunks is None else chunks
        self.products = products_for(problem.weight, problem.sum_dtype)
        self.bias = None
        if problem.bias is not None:
            # Softmax does not see a common offset, which would cost the logits the digits it has.
            bias = problem.bias.double()
            self.bias = (bias - bias.amax()).to(problem.sum_dtype)  # [V]
        hidden, weight = problem.hidden, problem.weight
        self.hidden = hidden.reshape(-1, hidden.shape[3])  # [B * K * M, H]
        self.live = problem.live().flatten()
        targets = problem.targets[:, None, :].expand(hidden.shape[:3]).flatten()
        # Of rows without a part too, which are left out by counting, or whose log likelihood is made 0.
        self.outside = (targets < 0) | (targets >= weight.shape[0])
        self.targets = torch.where(self.outside, 0, targets)

        dtype = problem.sum_dtype
        self.workspace = weight.new_empty(self.chunks.words * self.chunks.most_rows(), dtype=dtype)
        self.log_likelihood = weight.new_zeros(hidden.shape[:3], dtype=torch.float64)
        self.d_hidden = hidden.new_zeros(
            hidden.shape if needs.hidden else (0,), dtype=problem.hidden_gradient_dtype
        )
        self.d_weight = weight.new_empty(weight.shape if needs.weight else (0,), dtype=dtype)
        self.d_weight_begun = False
        self.d_bias = weight.new_zeros(weight.shape[0] if needs.bias else 0, dtype=dtype)

    def rows(self, first: int, last: int) -> Rows:
        place: Tensor | slice = slice(first, last)
        live, hidden = self.live[place], self.hidden[place]
        if may_count_rows(live.device):
            kept = live.nonzero()[:, 0]
            place, hidden = kept + first, hidden[kept]
        else:
            hidden = torch.where(live[:, None], hidden, 0.0)
        return Rows(place, hidden.to(self.products.operand_dtype), self.targets[place], self.outside[place])

    def logits(self, rows: Rows) -> tuple[Tensor, Statistics]:
        """First product and statistics."""
        words, count = self.chunks.words, rows.hidden.shape[0]
        logits = self.workspace[: words * count].view(words, count)
        self.products.logits(rows.hidden, logits)
        return logits, self.passes.statistics_(logits, self.bias, rows.targets)

    def factor(self, examples: slice, d_loss: Tensor) -> Tensor:
        """Of the rows of examples whose log likelihoods are kept: float64, d_loss [B] times the posterior."""
        part = self.problem.examples(examples.start, examples.stop)
        return posterior_factor(part, self.log_likelihood[examples], d_loss[examples]).flatten()

    def keep_log_likelihood(self, rows: Rows, statistics: Statistics) -> None:
        log_p = torch.where(rows.outside, torch.nan, statistics.log_p)
        if isinstance(rows.place, slice):  # rows without a part are 0
            log_p = torch.where(self.live[rows.place], log_p, 0.0)
        self.log_likelihood.view(-1)[rows.place] = log_p

    def add_gradients(self, rows: Rows, logits: Tensor, statistics: Statistics, factor: Tensor) -> None:
        """Second and third product; factor: float64 [R], the upstream gradient times the posterior."""
        if self.problem.min_posterior > 0.0 and may_count_rows(factor.device):
            rows, logits, statistics, factor = _with_factor(rows, logits, statistics, factor)
        scale = self.products.scale
        d_logits = self.passes.gradient_(
            logits,
            self.bias,
            rows.targets,
            statistics,
            factor if scale == 1.0 else factor * scale,
            self.products.operand_dtype,
            self.d_bias if self.needs.bias else None,
        )[: self.problem.weight.shape[0]]
        if self.needs.hidden:
            d_hidden = self.products.d_hidden(d_logits)
            self.d_hidden.view(self.hidden.shape)[rows.place] = d_hidden.to(self.d_hidden.dtype)
        if self.needs.weight:
            self.products.add_d_weight(self.d_weight, d_logits, rows.hidden, not self.d_weight_begun)
            self.d_weight_begun = True

    def gradients(self) -> Gradients:
        scale = self.products.scale
        if not self.d_weight_begun:
            self.d_weight.zero_()
        if scale != 1.0:
            for gradient in (self.d_hidden, self.d_weight, self.d_bias):
                gradient.div_(scale)
        return Gradients(self.d_hidden, self.d_weight, self.d_bias)


def _with_factor(
    rows: Rows, logits: Tensor, statistics: Statistics, factor: Tensor
) -> tuple[Rows, Tensor, Statistics, Tensor]:
    """The same without the rows whose factor is 0; their logits move to the front of the same memory."""
    kept = factor.nonzero()[:, 0]
    vocabulary, count = logits.shape[0], len(kept)
    place = kept + rows.place.start if isinstance(rows.place, slice) else rows.place[kept]
    fewer = logits.view(-1)[: vocabulary * count].view(vocabulary, count)
    for first in range(0, vocabulary, WORDS_MOVED):
        words = slice(first, first + WORDS_MOVED)
        fewer[words] = logits[words].index_select(1, kept)
    rows = Rows(place, rows.hidden[kept], rows.targets[kept], rows.outside[kept])
    return rows, fewer, Statistics(*(each[kept] for each in statistics)), factor[kept]


def forward(problem: Problem, needs: Needs, passes: Passes = TORCH) -> tuple[Tensor, Gradients]:
    """log_likelihood [B, K, M], and the gradients for an upstream gradient of 1 of what is needed."""
    return run_forward(Pass(problem, needs, passes))


def run_forward(work: Pass) -> tuple[Tensor, Gradients]:
    batch, wanted = work.problem.scores.shape[0], any(work.needs)
    ones = work.log_likelihood.new_ones(batch)
    one_pass = wanted and work.chunks.examples_at_once > 0
    for first, last in work.chunks.ranges():
        rows = work.rows(first, last)
        logits, statistics = work.logits(rows)
        work.keep_log_likelihood(rows, statistics)
        if one_pass:
            rows_of_example = work.chunks.rows_of_example
            factor = work.factor(slice(first // rows_of_example, last // rows_of_example), ones)
            kept = rows.place - first if isinstance(rows.place, Tensor) else slice(None)
            work.add_gradients(rows, logits, statistics, factor[kept])
    if wanted and not one_pass:
        _second_pass(work, work.factor(slice(0, batch), ones))
    return work.log_likelihood, work.gradients()


def backward(
    problem: Problem, log_likelihood: Tensor, d_loss: Tensor, needs: Needs, passes: Passes = TORCH
) -> Gradients:
    """The gradients of sum_b d_loss_b loss_b, logits recomputed; |d_loss| at most 1."""
    return run_backward(Pass(problem, needs, passes), log_likelihood, d_loss)


def run_backward(work: Pass, log_likelihood: Tensor, d_loss: Tensor) -> Gradients:
    work.log_likelihood = log_likelihood
    _second_pass(work, work.factor(slice(0, d_loss.shape[0]), d_loss))
    return work.gradients()


def _second_pass(work: Pass, factor: Tensor) -> None:
    for first, last in work.chunks.ranges():
        rows = work.rows(first, last)
        logits, statistics = work.logits(rows)
        work.add_gradients(rows, logits, statistics, factor[rows.place])


BACKEND = Backend(name="torch", refuses=lambda *arguments: None, forward=forward, backward=backward)
