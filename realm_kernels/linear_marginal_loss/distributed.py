"""linear_marginal_loss whose vocabulary, or whose documents, are spread over ranks.

Legend: W ranks, V_r words or K_r documents of this one, R rows of a chunk. Chunks are cut alike on all ranks,
from the sizes in a header that all exchange first; there they also learn whether one refuses its arguments.

A split vocabulary (weight and bias by words, everything else the same on all ranks): of each chunk float64
[3, R] is all-gathered, a row's largest logit, the sum of exponentials of all words but the target, and the
target's own logit where its word is. All ranks add up the same numbers in the same order, so posteriors,
loss and d_scores are the same bits. d_hidden, a sum over words, is all-reduced once, in float32.

Split documents (scores, hidden, doc_mask, log_weight by documents, everything else the same): of each chunk
what marginal_loss/distributed.py tells of it. d_weight and d_bias are of this rank's documents.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends
from ..marginal_loss import distributed as documents_over_ranks
from ..marginal_loss import reference as marginal_reference
from ..mips_topk.checks import DTENSOR
from ..ranks import Ranks
from ..validation import describe
from . import checks, chunked, op, triton
from .chunked import LibraryPass, Rows
from .chunks import chunks_of
from .passes import TORCH, Passes, Statistics
from .problem import NOTHING, Gradients, Needs, Problem, keep_likely

OP = checks.OP
BACKENDS = (*triton.BACKENDS, chunked.BACKEND)


@dataclass(frozen=True)
class Call:
    """What all ranks know of a call once the headers have been exchanged."""

    ranks: Ranks
    needs: Needs
    reduction: str
    options: tuple[int, str, float]  # ignore_index, mode, min_posterior
    words: list[int] | None  # V_r of each rank; None: the documents are spread
    documents: int  # the most of a rank
    backend: str  # chosen for the call, and for its gradient too

    @property
    def beforehand(self) -> bool:
        """Whether gradients come with the forward: one example's share of a sum cannot be scaled later."""
        return self.reduction != "none" or not (self.needs.weight or self.needs.bias)

    def problem(self, *tensors: Any) -> Problem:
        scores, hidden, weight, targets, bias, doc_mask, log_weight = tensors
        return Problem(scores, hidden, weight, targets, bias, doc_mask, log_weight, *self.options)

    def new_pass(self, problem: Problem, needs: Needs) -> LibraryPass:
        passes = triton.PASSES.get(self.backend, TORCH)
        if self.words is None:
            return DocumentsPass(problem, needs, passes, self.ranks, self.documents)
        return VocabularyPass(problem, needs, passes, self.ranks, self.words)


class VocabularyPass(LibraryPass):
    """Logits get one word more, which no row has but those whose target is another rank's."""

    EXTRA_WORDS = 1

    def __init__(
        self, problem: Problem, needs: Needs, passes: Passes, ranks: Ranks, words: list[int]
    ) -> None:
        chunks = chunks_of(problem, passes.in_place, words=max(words) + 1)
        super().__init__(replace(problem, bias=None), needs, passes, chunks)
        self.ranks, first = ranks, sum(words[: ranks.rank])
        targets = problem.targets[:, None, :].expand(problem.hidden.shape[:3]).flatten()
        self.outside = (targets < 0) | (targets >= sum(words))
        local = targets - first
        self.targets = torch.where((local >= 0) & (local < self.words), local, self.words)
        if problem.bias is not None:
            bias = problem.bias.double()
            top = bias.amax(0, keepdim=True) if self.words else bias.new_full((1,), -torch.inf)
            largest = ranks.gather(top, [1] * ranks.size, "the largest bias").amax()
            self.bias = torch.cat([bias - largest, bias.new_zeros(1)]).to(problem.sum_dtype)
        # A sum over words, rounded to what the problem asks once all are added.
        self.d_hidden = self.d_hidden.to(problem.sum_dtype)
        if needs.bias:
            self.d_bias = problem.weight.new_zeros(self.words + 1, dtype=problem.sum_dtype)

    def score_(self, rows: Rows) -> Statistics:
        self.logits[self.words].fill_(-torch.inf)
        return self._of_all_words(super().score_(rows), rows)

    def _of_all_words(self, here: Statistics, rows: Rows) -> Statistics:
        """log p over all words; the total, still over this rank's largest logit.

        From log p both parts of a sum come back without loss: e = p total, rest = (1 - p) total.
        """
        log_p, total, largest = here
        empty = total == 0  # all logits -inf
        mine = (rows.targets < self.words) & ~empty
        rest = torch.where(mine, -log_p.expm1() * total, total)
        log_e = torch.where(mine, log_p + total.log(), -torch.inf)
        shift = torch.where(empty, -torch.inf, largest.double())
        told = torch.stack([shift, rest, log_e])[None]
        shifts, rests, log_es = self.ranks.gather(told, [1] * self.ranks.size, "row statistics").unbind(1)
        top = shifts.amax(0)
        top = torch.where(top == -torch.inf, 0.0, top)
        rest = (rests * (shifts - top).exp()).sum(0)
        distance = (log_es + (shifts - top)).amax(0)
        e = distance.exp()
        log_p = torch.where(rest < e, -(rest / e).log1p(), distance - (e + rest).log())
        return Statistics(log_p, (e + rest) * (top - largest.double()).exp(), largest)

    def add_gradients(self, rows: Rows, factor: Tensor) -> None:
        if self.words > 0:
            super().add_gradients(rows, factor)

    def gradients(self) -> Gradients:
        d_hidden, d_weight, d_bias = super().gradients()
        self.ranks.sum_(d_hidden, "d_hidden")
        return Gradients(d_hidden.to(self.problem.hidden_gradient_dtype), d_weight, d_bias[: self.words])


class DocumentsPass(LibraryPass):
    """A chunk holds the same examples on all ranks, whose posteriors take what all of them know."""

    def __init__(self, problem: Problem, needs: Needs, passes: Passes, ranks: Ranks, documents: int) -> None:
        super().__init__(problem, needs, passes, chunks_of(problem, passes.in_place, documents=documents))
        self.ranks = ranks

    def ranges(self) -> Iterator[tuple[int, int]]:
        return self.chunks.ranges()  # by what all ranks know, not by the rows here that have a part

    def factor(self, examples: slice, d_loss: Tensor) -> Tensor:
        part = self.problem.examples(examples.start, examples.stop)
        found, scored = _marginal(part, self.ranks, self.log_likelihood[examples])
        g = d_loss[examples, None, None]
        posterior = torch.where(scored[:, None, :], found.posterior, 0.0)
        factor = torch.where(posterior != 0, g * posterior, 0.0).expand_as(self.log_likelihood[examples])
        factor = torch.where(part.live(), factor, 0.0)
        return keep_likely(self.problem, factor, d_loss[examples]).flatten()


def _marginal(problem: Problem, ranks: Ranks, log_likelihood: Tensor) -> tuple[Any, Tensor]:
    """marginal_loss's pieces for this rank's documents among those of all; bool [B, C] what is scored."""
    u = marginal_reference.relevance(problem.scores, problem.doc_mask, problem.log_weight)
    columns = marginal_reference.columns(log_likelihood, problem.scored(), problem.mode)
    found, any_document = documents_over_ranks.marginal(ranks, u, columns)
    scored = marginal_reference.target_columns(log_likelihood, problem.scored(), problem.mode)
    return found, any_document & scored


def loss(problem: Problem, reduction: str, group: Any, vocabulary_group: Any) -> tuple[Tensor, Tensor]:
    """The loss and log p(y_m|z,x) float64 [B, K_r, M] of this rank's part of a problem; a collective call."""
    problem, ranks, by_words = part_of(problem, group, vocabulary_group)
    call = _agree(ranks, problem, reduction, by_words)
    vocabulary = problem.weight.shape[0] if call.words is None else sum(call.words)
    checks.check_values(problem.targets, vocabulary, problem.ignore_index)
    if problem.scores.shape[1] == 0:
        problem = _with_a_masked_document(problem)
    return _Differentiable.apply(*problem.tensors, call)


def part_of(problem: Problem, group: Any, vocabulary_group: Any) -> tuple[Problem, Ranks, bool]:
    """What this rank brings, among which ranks, and whether it is its words, or else its documents."""
    for name in ("scores", "hidden", "targets"):
        if isinstance(getattr(problem, name), DTENSOR):
            raise TypeError(f"{OP}: {name} must be a plain Tensor, alike on all ranks, got a DTensor")
    if isinstance(problem.weight, DTENSOR):
        problem, vocabulary_group = _local(problem, vocabulary_group)
    if group is not None and vocabulary_group is not None:
        raise ValueError(f"{OP}: group and a split vocabulary must not come together, got both")
    device = problem.hidden.device if isinstance(problem.hidden, Tensor) else torch.device("cpu")
    by_words = group is None
    return problem, Ranks(OP, vocabulary_group if by_words else group, device), by_words


def backend_for(problem: Problem) -> backends.Backend:
    return backends.choose(f"{OP} across ranks", BACKENDS, problem)


def _with_a_masked_document(problem: Problem) -> Problem:
    """It stands for none, and takes no part."""
    scores, log_weight = problem.scores, problem.log_weight
    return replace(
        problem,
        scores=F.pad(scores, (0, 1)),
        hidden=F.pad(problem.hidden, (0, 0, 0, 0, 0, 1)),
        doc_mask=scores.new_zeros(len(scores), 1, dtype=torch.bool),
        log_weight=None if log_weight is None else F.pad(log_weight, (0, 1)),
    )


def _local(problem: Problem, group: Any) -> tuple[Problem, Any]:
    """The problem with this rank's words of a DTensor weight, and of its bias; the group of their mesh."""
    weight: Any = problem.weight
    bias: Any = problem.bias
    mesh = weight.device_mesh
    given: dict[str, Any] = {"weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in given.items():
        if type(tensor) not in DTENSOR:
            raise TypeError(f"{OP}: {name} must be a DTensor, as weight is, got {describe(tensor)}")
        if tensor.device_mesh != mesh or mesh.ndim != 1 or not tensor.placements[0].is_shard(0):
            raise ValueError(
                f"{OP}: {name} must be a DTensor placed Shard(0) on weight's mesh of one axis, got "
                f"{tensor.placements} on a mesh of {tensor.device_mesh.ndim}"
            )
    if group is not None:
        raise ValueError(f"{OP}: vocabulary_group must be None where weight is a DTensor, got {group!r}")
    here = replace(problem, weight=weight.to_local(), bias=None if bias is None else bias.to_local())
    return here, mesh.get_group()


# What the headers hold, in this order. All ranks must bring the same but for the axis that is split.
FIELDS = ("B", "M", "H", "K", "V", "options", "targets")
CHECKSUMS = {
    "options": "dtypes, bias, requires_grad, mode, reduction and the other options",
    "targets": "targets (and doc_mask, where the vocabulary is split)",
}


def _agree(ranks: Ranks, problem: Problem, reduction: str, by_words: bool) -> Call:
    """Check this rank's arguments, then those of all ranks against each other."""
    header, refused = [0] * len(FIELDS), None
    try:
        header = check_here(problem, reduction, by_words)
    except (TypeError, ValueError) as error:
        refused = error
    headers = ranks.agree("linear_marginal_loss", header, refused)
    told = {name: [other[place] for other in headers] for place, name in enumerate(FIELDS)}
    split, size = ("V", "V >= 1") if by_words else ("K", "K >= 1")
    for name, values in told.items():
        for rank, value in enumerate(values):
            if name != split and value != values[0]:
                what = f"{CHECKSUMS[name]} (told by checksum)" if name in CHECKSUMS else name
                raise ValueError(
                    f"{OP}: {what} must be the same on all ranks, got {values[0]} on rank 0 and {value} on "
                    f"rank {rank}"
                )
    if sum(told[split]) == 0:
        raise ValueError(f"{OP}: some rank must bring {size}, got 0 on all")
    return Call(
        ranks,
        op.needs_of(problem),
        reduction,
        problem.options,
        told["V"] if by_words else None,
        max(told["K"]),
        backend_for(problem).name,
    )


def check_here(problem: Problem, reduction: str, by_words: bool) -> list[int]:
    """The header of this rank. Raises TypeError or ValueError."""
    least_documents, least_words = (1, 0) if by_words else (0, 1)
    checks.check(problem, reduction, least_documents=least_documents, least_words=least_words)
    backend_for(problem)
    dtypes = (problem.hidden.dtype, problem.loss_dtype)
    said = (by_words, problem.options, reduction, op.needs_of(problem), problem.bias is None, dtypes)
    masks = (problem.targets, problem.doc_mask if by_words else None)
    batch, documents, tokens, width = problem.hidden.shape
    checksums = zlib.crc32(repr(said).encode()), zlib.crc32(b"".join(_bytes(mask) for mask in masks))
    return [batch, tokens, width, documents, problem.weight.shape[0], *checksums]


def _bytes(tensor: Tensor | None) -> bytes:
    return b"-" if tensor is None else tensor.cpu().contiguous().numpy().tobytes()


@contextmanager
def _inside(problem: Problem) -> Iterator[None]:
    """No autocast within; marginal_loss by whatever serves it."""
    with torch.autocast(problem.hidden.device.type, enabled=False), backends.use_backend(None):
        yield


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, call = inputs
        problem = call.problem(*tensors)
        with _inside(problem):
            needs = call.needs if call.beforehand else NOTHING
            log_likelihood, units = chunked.forward_by(call.new_pass(problem, needs))
            each, count, d_relevance = _of_examples(problem, call, log_likelihood)
        divisor = count.sum() if call.reduction == "mean" else None
        ctx.call = call
        ctx.save_for_backward(*tensors, log_likelihood, d_relevance, divisor, *units)
        ctx.mark_non_differentiable(log_likelihood)
        reduced = marginal_reference.reduce(each, count, call.reduction)
        return reduced.to(problem.loss_dtype), log_likelihood

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*_Gradients.apply(d_loss, ctx.needs_input_grad, ctx.call, *ctx.saved_tensors), None)


class _Gradients(torch.autograd.Function):
    """A function of its own, which takes the inputs so that differentiating its results is refused."""

    @staticmethod
    def forward(ctx: Any, d_loss: Tensor, wants: tuple[bool, ...], call: Call, *saved: Any) -> Any:
        *tensors, log_likelihood, d_relevance, divisor, d_hidden, d_weight, d_bias = saved
        problem, units = call.problem(*tensors), Gradients(d_hidden, d_weight, d_bias)
        g = marginal_reference.upstream(d_loss, divisor, len(d_relevance))
        d_relevance = torch.where(d_relevance != 0, g[:, None] * d_relevance, 0.0)
        with _inside(problem):
            g = g.to(problem.loss_dtype)
            by_example, by_all = g, g[:1].sum()
            if not call.beforehand:
                by_all = g.abs().amax() if len(g) else g.sum()
                by_example = by_all.expand(g.shape)
                relative = torch.where(by_all > 0, g / by_all, 0.0)
                units = chunked.backward_by(call.new_pass(problem, call.needs), log_likelihood, relative)
            d_hidden, d_weight, d_bias = op.scaled(problem, units, call.needs, by_example, by_all)
        d_log_weight = None
        if problem.log_weight is not None and wants[6]:
            d_log_weight = d_relevance.to(problem.log_weight.dtype)
        return (
            d_relevance.to(problem.scores.dtype) if wants[0] else None,
            d_hidden if call.needs.hidden else None,
            d_weight if call.needs.weight else None,
            None,
            d_bias if call.needs.bias else None,
            None,
            d_log_weight,
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(f"{OP}: second derivatives are not offered")


def _of_examples(problem: Problem, call: Call, log_likelihood: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss [B], what of it counts int64 [B], and the gradient to this rank's scores for g = 1, [B, K_r]."""
    if call.words is None:
        found, scored = _marginal(problem, call.ranks, log_likelihood)
        each = torch.where(scored, -found.log_marginal, 0.0).sum(1)
        return each, scored.sum(1), torch.where(scored[:, None, :], -found.residual, 0.0).sum(2)
    inputs = problem.marginal_inputs(log_likelihood)
    each, count = torch.ops.realm_kernels.marginal_loss(*inputs)
    ones = torch.ones_like(each)
    return each, count, torch.ops.realm_kernels.marginal_loss_bwd(ones, *inputs, True, False)[0]
