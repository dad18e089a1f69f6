"""A start from nothing: a reader that copies before it has learned anything.

To fill a mask from a document is to find the place in it that stands among the same words, and to say what
stands there. From random weights a small BERT does not come to that on a small corpus, and a reader that
cannot read makes REALM harm its retriever: what it rewards documents for is noise. Two layers can say it, so
the weights are set to, in the manner of an induction head (Olsson et al., 2022, arXiv 2209.11895):

    positions         sines and cosines, in coordinates of their own
    first attention   each head looks at one neighbour (OFFSETS), since a rotation of the sines is a shift;
                      it adds a random projection of that word, turned away from the word that stands there
    last attention    places of the document with like neighbours, the rarer word before the other; the word
                      that stands there is the value
    prediction head   the identity: the decoder is tied to the words

The rest does nearly nothing beside the residual stream. With one layer [MASK] knows nothing of its
neighbours; all that is left is to copy the rare words of the document.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import BertModel

from .lexical import IDF, OWN, POOLED, ask_for_idf, set_words
from .model import KnowledgeAugmentedEncoder

OFFSETS = (-1, 1, -2, 2)  # of the neighbours that the heads look at, in turn
SHORTEST, LONGEST = 3.0, 200.0  # periods of the sines, in wordpieces
SHARP = 2.0  # of the first attention: how far a neighbour stands out from its own neighbours
MATCH = 40.0  # of the last attention; less and all places are alike, more and chance decides
BODY = 6.0  # what a word of the document has before one of the query, in the logits of the last attention


@torch.no_grad()
def start_reading(reader: KnowledgeAugmentedEncoder, idf: Tensor) -> None:
    """Set the weights of a reader to copy. idf: lexical.log_idf of the documents, [V]."""
    bert = reader.lm.bert
    set_words(bert, idf)
    last = bert.encoder.layer[-1]
    if len(bert.encoder.layer) > 1:
        _match_neighbours(bert)
    ask_for_idf(last.attention.self)
    bert.embeddings.token_type_embeddings.weight[1, IDF] = BODY * bert.config.initializer_range
    nn.init.eye_(last.attention.self.value.weight)
    nn.init.eye_(last.attention.output.dense.weight).mul_(POOLED)
    dense = reader.lm.cls.predictions.transform.dense
    nn.init.eye_(dense.weight)
    dense.weight[[IDF, OWN]] = 0.0


def _match_neighbours(bert: BertModel) -> None:
    """Each place gets its neighbours in the first layer, and places with like ones meet in the last."""
    first, last = bert.encoder.layer[0].attention, bert.encoder.layer[-1].attention
    hidden, width = bert.config.hidden_size, first.self.attention_head_size
    sines = 2 * max(1, min(8, width // 4))  # coordinates
    places = slice(2, 2 + sines)
    _set_positions(bert, places)
    rates = _rates(sines // 2)
    for head in range(first.self.num_attention_heads):
        rows = slice(head * width, head * width + sines)
        shift = _shift(rates, OFFSETS[head % len(OFFSETS)])
        first.self.key.weight[rows] = 0.0
        first.self.key.weight[rows, places] = torch.eye(sines)
        first.self.query.weight[rows] = 0.0
        first.self.query.weight[rows, places] = SHARP * width**0.5 * shift
    words = torch.ones(hidden)
    words[: places.stop] = 0.0
    first.self.value.weight.copy_(torch.randn(hidden, hidden) / hidden**0.5 * words)
    turn = torch.linalg.qr(torch.randn(hidden, hidden)).Q * words[:, None]
    first.output.dense.weight.copy_(turn)
    # Each head compares all neighbours at once, in a random projection to its width.
    factor = MATCH**0.5 * width**0.25 / hidden**0.5
    for rows in torch.arange(hidden).split(width):
        projection = torch.randn(width, hidden) / width**0.5 @ turn.T * factor
        last.self.query.weight[rows] = projection
        last.self.key.weight[rows] = projection


def _set_positions(bert: BertModel, places: slice) -> None:
    positions, deviation = bert.embeddings.position_embeddings.weight, bert.config.initializer_range
    bert.embeddings.word_embeddings.weight[:, places] = 0.0
    angles = torch.arange(len(positions))[:, None] * torch.tensor(_rates((places.stop - places.start) // 2))
    positions.zero_()
    # Times the root of two, so that a coordinate is as large as one of a word.
    positions[:, places] = deviation * 2**0.5 * torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def _rates(count: int) -> list[float]:
    periods = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), count)
    return [2 * math.pi / period for period in periods.tolist()]


def _shift(rates: list[float], offset: int) -> Tensor:
    """The matrix that makes of the sines and cosines of a place those of the place `offset` further."""
    blocks = []
    for rate in rates:
        cos, sin = math.cos(rate * offset), math.sin(rate * offset)
        blocks.append(torch.tensor([[cos, sin], [-sin, cos]]))
    return torch.block_diag(*blocks)
