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
workspace, a first pass takes the statistics alone and a second recomputes the logits: four products. So it
is where rows of small posterior are left out, and the second pass takes the others alone.
README.md counts the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend
from .chunks import Chunks, chunks_of
from .memory import fresh
from .passes import TORCH, Passes, Statistics
from .problem import Found, Gradients, Needs, Problem, found, posterior_factor
from .products import products_for


class Rows(NamedTuple):
    """Some rows of a problem, those without a part in the loss left out or neutral."""

    place: Tensor | slice  # among all rows
    hidden: Tensor  # [R, H]
    targets: Tensor  # [R], 0 where out of range
    outside: Tensor  # [R], target out of range


def may_count_rows(device: torch.device) -> bool:
    """Whether rows without a part are counted and left out: elsewhere counting would synchronise."""
    return device.type == "cpu"


class LibraryPass:
    """One call by rows, through torch's matrix products, with a device's passes between them."""

    EXTRA_WORDS = 0  # of the logits, beyond those of the weight

    def __init__(self, problem: Problem, needs: Needs, passes: Passes, chunks: Chunks) -> None:
        self.problem, self.needs, self.passes, self.chunks = problem, needs, passes, chunks
        hidden, weight, dtype = problem.hidden, problem.weight, problem.sum_dtype
        self.bias = problem.centred_bias()
        self.hidden = hidden.reshape(-1, hidden.shape[3])  # [B * K * M, H]
        self.live = problem.live().flatten()
        targets = problem.targets[:, None, :].expand(hidden.shape[:3]).flatten()
        # Of rows without a part too, which are left out by counting, or whose log likelihood is made 0.
        self.outside = (targets < 0) | (targets >= weight.shape[0])
        self.targets = torch.where(self.outside, 0, targets)

        self.log_likelihood = weight.new_zeros(hidden.shape[:3], dtype=torch.float64)
        self.d_hidden = hidden.new_zeros(
            hidden.shape if needs.hidden else (0,), dtype=problem.hidden_gradient_dtype
        )
        self.d_weight = fresh(weight, weight.shape if needs.weight else (0,), dtype)
        self.d_weight_begun = False
        self.d_bias = weight.new_zeros(weight.shape[0] if needs.bias else 0, dtype=dtype)

        self.products = products_for(weight, dtype)
        self.words = weight.shape[0]
        rows = min(chunks.step(), chunks.rows)
        self.workspace = weight.new_empty((self.words + self.EXTRA_WORDS) * rows, dtype=dtype)

    def factor(self, examples: slice, d_loss: Tensor) -> Tensor:
        """Of examples that are scored: float64 [R], the upstream gradient d_loss [B] times the posterior."""
        part = self.problem.examples(examples.start, examples.stop)
        return posterior_factor(part, self.log_likelihood[examples], d_loss[examples]).flatten()

    @property
    def leaves_rows_out(self) -> bool:
        """Whether min_posterior saves work: rows that are scored, but have no gradient, are counted."""
        return self.problem.min_posterior > 0.0 and may_count_rows(self.live.device)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """[first, last) of each chunk, by the rows that have a part where they may be counted."""
        by_example = self.chunks.rows_of_example
        if by_example == 0 or not may_count_rows(self.live.device):
            return self.chunks.ranges()
        return self.chunks.ranges_of(self.live.view(-1, by_example).sum(1).tolist())

    def rows(self, first: int, last: int) -> Rows:
        place: Tensor | slice = slice(first, last)
        live, hidden = self.live[place], self.hidden[place]
        if not may_count_rows(live.device):
            hidden = torch.where(live[:, None], hidden, 0.0)
        elif not live.all():
            kept = live.nonzero()[:, 0]
            place, hidden = kept + first, hidden[kept]
        return Rows(place, hidden, self.targets[place], self.outside[place])

    def score(self, rows: Rows) -> Tensor:
        """First product and statistics: float64 [R], log softmax at the target."""
        self.operand = rows.hidden.to(self.products.operand_dtype)
        words, count = self.words + self.EXTRA_WORDS, rows.hidden.shape[0]
        self.logits = self.workspace[: words * count].view(words, count)
        self.statistics = self.score_(rows)
        return self.statistics.log_p

    def score_(self, rows: Rows) -> Statistics:
        return self.passes.score_(self.products, self.operand, self.logits, self.bias, rows.targets)

    def keep_log_likelihood(self, rows: Rows, log_p: Tensor) -> None:
        log_p = torch.where(rows.outside, torch.nan, log_p)
        if isinstance(rows.place, slice):  # rows without a part are 0
            log_p = torch.where(self.live[rows.place], log_p, 0.0)
        self.log_likelihood.view(-1)[rows.place] = log_p

    def add_gradients(self, rows: Rows, factor: Tensor) -> None:
        """Second and third product, of the chunk scored last; factor: float64 [R], the upstream gradient
        times the posterior."""
        scale = self.products.scale
        d_logits = self.passes.gradient_(
            self.logits,
            self.bias,
            rows.targets,
            self.statistics,
            factor if scale == 1.0 else factor * scale,
            self.products.operand_dtype,
            self.d_bias if self.needs.bias else None,
        )[: self.words]
        if self.needs.hidden:
            d_hidden = self.products.d_hidden(d_logits)
            self.d_hidden.view(self.hidden.shape)[rows.place] = d_hidden.to(self.d_hidden.dtype)
        if self.needs.weight:
            self.products.add_d_weight(self.d_weight, d_logits, self.operand, not self.d_weight_begun)
            self.d_weight_begun = True

    def gradients(self) -> Gradients:
        if not self.d_weight_begun:
            self.d_weight.zero_()
        units = Gradients(self.d_hidden, self.d_weight, self.d_bias)
        if self.products.scale != 1.0:
            for gradient in units:
                gradient.div_(self.products.scale)
        return units


def forward(problem: Problem, needs: Needs, reduction: str, passes: Passes = TORCH) -> Found:
    work = LibraryPass(problem, needs, passes, chunks_of(problem, passes.in_place))
    return found(problem, *forward_by(work), reduction)


def backward(
    problem: Problem, log_likelihood: Tensor, d_loss: Tensor, needs: Needs, passes: Passes = TORCH
) -> Gradients:
    """The gradients of sum_b d_loss_b loss_b, logits recomputed; |d_loss| at most 1."""
    work = LibraryPass(problem, needs, passes, chunks_of(problem, passes.in_place))
    return backward_by(work, log_likelihood, d_loss)


def forward_by(work: LibraryPass) -> tuple[Tensor, Gradients]:
    """log_likelihood [B, K, M], and the gradients for an upstream gradient of 1 of what is needed."""
    batch, by_example = work.problem.scores.shape[0], work.chunks.rows_of_example
    ones = work.log_likelihood.new_ones(batch)
    one_pass = any(work.needs) and work.chunks.examples_at_once > 0 and not work.leaves_rows_out
    for first, last in work.ranges():
        rows = work.rows(first, last)
        work.keep_log_likelihood(rows, work.score(rows))
        if one_pass:
            factor = work.factor(slice(first // by_example, last // by_example), ones)
            kept = rows.place - first if isinstance(rows.place, Tensor) else slice(None)
            work.add_gradients(rows, factor[kept])
    if any(work.needs) and not one_pass:
        _second_pass(work, work.factor(slice(0, batch), ones))
    return work.log_likelihood, work.gradients()


def backward_by(work: LibraryPass, log_likelihood: Tensor, d_loss: Tensor) -> Gradients:
    work.log_likelihood = log_likelihood
    _second_pass(work, work.factor(slice(0, d_loss.shape[0]), d_loss))
    return work.gradients()


def _second_pass(work: LibraryPass, factor: Tensor) -> None:
    if work.leaves_rows_out:
        work.live &= factor != 0
    for first, last in work.ranges():
        rows = work.rows(first, last)
        work.score(rows)
        work.add_gradients(rows, factor[rows.place])


BACKEND = Backend(name="torch", refuses=lambda *arguments: None, forward=forward, backward=backward)
