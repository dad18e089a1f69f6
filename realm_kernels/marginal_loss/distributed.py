"""marginal_loss of examples whose documents are spread over ranks: what each rank tells the others.

Legend: W ranks, each with the same B examples and K of their documents (its own number, also 0), C columns.
What travels, all-gathered, so that every rank adds up the same numbers in the same order:
  1. a header of sizes, in which all ranks also learn whether one of them refuses its arguments;
  2. float64 [B, 2 + 3C]: the (max, sum) pair of the prior, and the best document of each column;
  3. float64 [B, 2C]: the sums over documents of the accurate r(z), relative to the best of all ranks.
Between them stand the pieces of reference.marginal. Nothing travels in the backward pass.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..ranks import Ranks
from . import reference
from .checks import OP, REDUCTIONS, check, check_choice
from .problem import result_dtype
from .reference import MODES, Best, Marginal


@dataclass(frozen=True)
class Call:
    """What holds for all documents of a call."""

    ranks: Ranks
    token_mask: Tensor | None  # [B, M]
    doc_mask: Tensor | None  # [B, K], of the documents here
    mode: str
    reduction: str
    dtype: torch.dtype  # of the loss


def loss(
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
    reduction: str,
    group: Any,
) -> Tensor:
    """The loss of the documents of all ranks, with the gradients of those here; a collective call."""
    ranks = ranks_of(scores, group)
    dtype = _agree(ranks, (scores, log_likelihood, token_mask, doc_mask, log_weight, mode, reduction))
    call = Call(ranks, token_mask, doc_mask, mode, reduction, dtype)
    return _Differentiable.apply(scores, reference.with_tokens(log_likelihood), log_weight, call)


def ranks_of(scores: object, group: Any) -> Ranks:
    """The ranks of a group that is not None, which means no group here."""
    # What is no tensor is refused with all ranks present.
    return Ranks(OP, group, scores.device if isinstance(scores, Tensor) else torch.device("cpu"))


def check_here(
    scores: Tensor,
    log_likelihood: Tensor,
    token_mask: Tensor | None,
    doc_mask: Tensor | None,
    log_weight: Tensor | None,
    mode: str,
    reduction: str,
) -> None:
    """Raise TypeError or ValueError for what this rank may not bring."""
    check(OP, scores, log_likelihood, token_mask, doc_mask, log_weight, mode, least_documents=0)
    check_choice(OP, "reduction", reduction, REDUCTIONS)
    backends.choose(f"{OP} across ranks", (reference.BACKEND,))


def _agree(ranks: Ranks, inputs: tuple[Any, ...]) -> torch.dtype:
    """Check this rank's arguments, then those of all ranks against each other; the dtype of the loss."""
    header, problem = [0] * 7, None
    try:
        check_here(*inputs)
        scores, log_likelihood, token_mask, _, log_weight, mode, reduction = inputs
        wide = result_dtype(scores, log_likelihood, log_weight) == torch.float64
        tokens = log_likelihood.shape[2] if log_likelihood.dim() == 3 else 1
        same = [
            scores.shape[0],
            tokens,
            MODES.index(mode),
            REDUCTIONS.index(reduction),
            _checksum(token_mask),
        ]
        header = [*same, scores.shape[1], int(wide)]
    except (TypeError, ValueError) as error:
        problem = error
    headers = ranks.agree("marginal_loss", header, problem)
    kinds = [
        f"B={batch}, M={tokens}, mode {MODES[mode]!r}, reduction {REDUCTIONS[reduced]!r}, "
        + ("no token_mask" if checksum < 0 else f"a token_mask of CRC {checksum:08x}")
        for batch, tokens, mode, reduced, checksum, *_ in headers
    ]
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"{OP}: B, M, mode, reduction and token_mask must be the same on all ranks, got {kinds[0]} "
                f"on rank 0 and {kind} on rank {rank}"
            )
    if not any(documents for *_, documents, _ in headers):
        raise ValueError(f"{OP}: scores must be [B, K] with K >= 1 on some rank, got K=0 on all")
    return torch.float64 if any(wide for *_, wide in headers) else torch.float32


def _checksum(mask: Tensor | None) -> int:
    """Tells the mask of this batch from that of another, which a rank may hold by mistake; -1 for none."""
    return -1 if mask is None else zlib.crc32(mask.cpu().numpy().tobytes())


def marginal(ranks: Ranks, u: Tensor, log_likelihood: Tensor) -> tuple[Marginal, Tensor]:
    """reference.marginal of the documents here among those of all ranks, and which examples have any [B, 1].

    u: float64 [B, K] relevance, -inf for masked documents, K >= 1. log_likelihood: float64 [B, K, C].
    """
    columns = log_likelihood.shape[2]
    log_likelihood = torch.where(u[:, :, None] == -torch.inf, -torch.inf, log_likelihood)
    here = reference.best_document(u[:, :, None], log_likelihood)
    told = torch.cat([*reference.peak(u), *(part[:, 0] for part in here)], dim=1)  # [B, 2 + 3C]
    peaks, bests = _gather(ranks, told, "the best documents").split([2, 3 * columns], dim=2)

    tops, totals = peaks.split(1, dim=2)  # [W, B, 1]
    top = tops.amax(0)
    total = (totals * (tops - reference.finite(top)).exp()).sum(0)
    log_p = reference.normalised(u, top, total)[:, :, None]

    joints, centres, relevances = bests.split([columns] * 3, dim=2)  # [W, B, C]
    joint, rank = joints.max(0, keepdim=True)
    relevance = relevances.gather(0, rank)[0]
    log_p_star = torch.where(joint[0] == -torch.inf, 0.0, reference.normalised(relevance, top, total))
    best = Best(joint[0][:, None], centres.gather(0, rank)[0][:, None], log_p_star[:, None])

    sums = torch.cat(reference.sums(log_p, log_likelihood, best), dim=1).flatten(1)  # [B, 2C]
    S, relative = _gather(ranks, sums, "the sums over documents").sum(0)[:, None].split([columns] * 2, dim=2)
    return reference.from_sums(log_p, log_likelihood, best, S, relative), top != -torch.inf


def _gather(ranks: Ranks, tensor: Tensor, what: str) -> Tensor:
    return ranks.gather(tensor[None], [1] * ranks.size, what)  # [W, ...]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, tokens: Tensor, log_weight: Tensor | None, call: Call) -> Tensor:
        u = reference.relevance(scores, call.doc_mask, log_weight)
        columns = reference.columns(tokens, call.token_mask, call.mode)
        documents = u.shape[1]
        if documents == 0:  # a masked one stands for none: it takes no part
            u, columns = u.new_full((len(u), 1), -torch.inf), columns.new_zeros(len(u), 1, columns.shape[2])
        found, any_document = marginal(call.ranks, u, columns)
        scored = any_document & reference.target_columns(tokens, call.token_mask, call.mode)  # [B, C]
        count = scored.sum(1)

        # The gradients at g = 1, which the backward scales.
        unit = torch.where(scored[:, None, :], -found.residual, 0.0).sum(2)[:, :documents]
        unit_of_columns = torch.where(scored[:, None, :], -found.posterior, 0.0)[:, :documents]
        wants_scores, wants_tokens, wants_log_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            scores,
            tokens,
            log_weight,
            unit if wants_scores or wants_log_weight else None,
            unit_of_columns if wants_tokens else None,
            call.token_mask,
            count.sum() if call.reduction == "mean" else None,
        )
        each = torch.where(scored, -found.log_marginal, 0.0).sum(1)
        return reference.reduce(each, count, call.reduction).to(call.dtype)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return (*_Gradients.apply(d_loss, ctx.needs_input_grad, *ctx.saved_tensors), None)


class _Gradients(torch.autograd.Function):
    """A function of its own, which takes the inputs so that differentiating its results is refused."""

    @staticmethod
    def forward(
        ctx: Any,
        d_loss: Tensor,
        wants: tuple[bool, ...],
        scores: Tensor,
        tokens: Tensor,
        log_weight: Tensor | None,
        unit: Tensor | None,
        unit_of_columns: Tensor | None,
        token_mask: Tensor | None,
        divisor: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        g = reference.upstream(d_loss, divisor, len(scores))
        d_scores = d_tokens = d_log_weight = None
        if unit is not None:
            d_relevance = _scaled(g[:, None], unit)
            d_scores = d_relevance.to(scores.dtype) if wants[0] else None
            if log_weight is not None and wants[2]:
                d_log_weight = d_relevance.to(log_weight.dtype)
        if unit_of_columns is not None:
            d_wide = _scaled(g[:, None, None], unit_of_columns).expand(tokens.shape)
            d_tokens = reference.select_tokens(d_wide, token_mask).to(tokens.dtype).contiguous()
        return d_scores, d_tokens, d_log_weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(f"{OP}: second derivatives are not offered with a group")


def _scaled(g: Tensor, unit: Tensor) -> Tensor:
    """g unit, 0 also where an infinite or NaN g meets a zero."""
    return torch.where(unit != 0, g * unit, 0.0)
