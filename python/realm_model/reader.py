"""The extractive reader of Open-QA: which span of which retrieved block is the answer (section 3.1, ORQA).

Shapes: B questions, K blocks that are read, L wordpieces of a join, C spans, A places of answers, H hidden
size, S width of a span's representation.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import realm_kernels as rk

Form = Literal["released", "paper"]


class Spans(NamedTuple):
    """All spans of a join, those of one wordpiece first, as in the released code."""

    starts: Tensor  # int64 [C]
    ends: Tensor  # int64 [C], the last wordpiece
    max_width: int

    def inside(self, body: Tensor) -> Tensor:
        """Which spans lie in the block: body bool [..., L], one run of True -> bool [..., C]."""
        return body[..., self.starts] & body[..., self.ends]

    def correct(self, starts: Tensor, ends: Tensor) -> Tensor:
        """Which spans are answers at starts and ends, int64 [..., A], -1 pads -> bool [..., C]."""
        same = (starts[..., None] == self.starts) & (ends[..., None] == self.ends)  # [..., A, C]
        return same.any(dim=-2)


def all_spans(length: int, max_width: int, device: torch.device | None = None) -> Spans:
    """The spans of up to max_width wordpieces in a join of `length`."""
    longest = min(length, max_width)
    widths = range(1, longest + 1)
    starts = torch.cat([torch.arange(length - width + 1, device=device) for width in widths])
    ends = torch.cat([torch.arange(width - 1, length, device=device) for width in widths])
    return Spans(starts, ends, longest)


class SpanHead(nn.Module):
    """The score of each span from the hidden states at its two ends.

    h = LayerNorm(ReLU(W_s BERT(start) + W_e BERT(end))), score = w h: released code; the paper says "a
    feed-forward network". Names are those of the published files.
    """

    def __init__(self, hidden: int, width: int, eps: float) -> None:
        super().__init__()
        self.dense_intermediate = nn.Linear(hidden, 2 * width)  # W_s, then W_e
        self.dense_output = nn.Linear(width, 1)
        self.layer_normalization = nn.LayerNorm(width, eps=eps)

    def forward(self, hidden: Tensor, spans: Spans) -> Tensor:
        """hidden [N, L, H] -> [N, C]."""
        start, end = self.dense_intermediate(hidden).chunk(2, dim=-1)  # [N, L, S] each
        return rk.score_spans(
            start,
            end,
            self.dense_output.weight[0],
            self.dense_output.bias,
            norm_weight=self.layer_normalization.weight,
            norm_bias=self.layer_normalization.bias,
            max_width=spans.max_width,
            eps=self.layer_normalization.eps,
        )


class ReaderLoss(NamedTuple):
    """Of each question, [B]; 0 where no retrieved block holds an answer."""

    retriever: Tensor
    reader: Tensor


def reader_loss(
    scores: Tensor,
    has_answer: Tensor,
    span_scores: Tensor,
    correct: Tensor,
    valid: Tensor,
    form: Form = "released",
) -> ReaderLoss:
    """What fine-tuning minimises: the sum of the two.

    "released" (ORQA's and REALM's code): reader = -log of the correct spans in one softmax over the spans of
    the K blocks that were read, the relevance added to each; retriever = -log of the blocks with an answer in
    a softmax over all blocks that were retrieved.
    "paper" (section 3.1): reader = -log sum_z p(z|x) p(y|z,x), p(y|z,x) a softmax over the spans of each
    block; the marginal trains the retriever too, and retriever is 0.

    scores [B, R], relevance of the R >= K blocks retrieved, best first; has_answer bool [B, R]; span_scores
    [B, K, C]; correct and valid bool [B, K, C].
    """
    read = scores[:, : span_scores.shape[1]]
    if form == "paper":
        loss = rk.span_marginal_loss(read, span_scores, correct, valid=valid, reduction="none")
        return ReaderLoss(torch.zeros_like(loss), loss)
    if form != "released":
        raise ValueError(f'reader_loss: form must be "released" or "paper", got {form!r}')
    reader = rk.span_marginal_loss(
        read, span_scores, correct, valid=valid, normalization="global", reduction="none"
    )
    blocks = torch.zeros_like(scores)[:, :, None]
    retriever = rk.span_marginal_loss(scores, blocks, has_answer[:, :, None], reduction="none")
    return ReaderLoss(retriever, reader)


class Best(NamedTuple):
    """The best span of each question."""

    block: Tensor  # int64 [B], of the K that were read
    span: Tensor  # int64 [B]
    score: Tensor  # [B], relevance of the block plus score of the span; -inf where no block has a span


def best_span(scores: Tensor, span_scores: Tensor, valid: Tensor) -> Best:
    """The released prediction, the largest reader logit: scores [B, K]; span_scores, valid [B, K, C]."""
    logits = (scores[:, :, None] + span_scores).masked_fill(~valid, -torch.inf)
    score, place = logits.flatten(1).max(dim=1)
    return Best(place // logits.shape[2], place % logits.shape[2], score)
