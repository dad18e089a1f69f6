"""A start from nothing: a reader that copies, and sees where words of its query stand, untrained.

To fill a mask from a document is to find the place in it that stands among the same words, and to say what
stands there; to answer a question is to find a place near which many of its words stand. From random weights
a small BERT comes to neither on a small corpus. Two layers can say both, so the weights are set to:

    positions         sines and cosines, in coordinates of their own
    first attention   each head looks at one neighbour (OFFSETS), since a rotation of the sines is a shift;
                      it adds a random projection of that word, turned away from the word that stands there.
                      The last heads look for the word itself in the query, and mark it where it is found
    last attention    one half of the heads: places of the document with like neighbours, the rarer word
                      before the other; the word that stands there is the value, in the manner of an
                      induction head (Olsson et al., 2022, arXiv 2209.11895). The other half sums the marks
                      before and behind a place (WINDOWS), the rarer words before the others
    prediction head   the identity: the decoder is tied to the words

The rest does nearly nothing beside the residual stream. With one layer [MASK] knows nothing of its
neighbours; all that is left is to copy the rare words of the document.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import BertModel

from .lexical import IDF, NEARLY_NOTHING, OWN, POOLED, ask_for_idf, set_words
from .model import KnowledgeAugmentedEncoder

# Coordinates: what the query's words have and no other, the mark, and from here on the sums of each head.
ASKED, MARK, SUMS = 2, 3, 4

OFFSETS = (-1, 1, -2, 2)  # of the neighbours that the heads look at, in turn
WINDOWS = (-4, 4, -2, 2)  # the middle of the places whose marks a head sums, in turn
SHORTEST, LONGEST = 3.0, 200.0  # periods of the sines, in wordpieces
SHARP = 2.0  # how far a neighbour stands out from its own neighbours, in the logits of the first attention
BROAD = 0.5  # the same of the middle of a window
MATCH = 40.0  # the logit of like words or neighbours; less and all places are alike, more and chance decides
IN_QUERY = 6.0  # what a word of the query has before the same one in the document, where it is looked for
NOT_FOUND = 22.0  # what [CLS] has there: between a like word and an unlike one
BODY = 6.0  # what a word of the document has before one of the query, in the logits of the last attention
CLEAR = 4.0  # how large the coordinates above are; a word's are about 1


@torch.no_grad()
def start_reading(reader: KnowledgeAugmentedEncoder, idf: Tensor) -> None:
    """Set the weights of a reader to copy and to mark. idf: lexical.log_idf of the documents, [V]."""
    bert = reader.lm.bert
    set_words(bert, idf)
    last = bert.encoder.layer[-1]
    nn.init.eye_(last.attention.self.value.weight)
    nn.init.eye_(last.attention.output.dense.weight).mul_(POOLED)
    if len(bert.encoder.layer) > 1:
        _read_in_two_layers(bert)
    ask_for_idf(last.attention.self)
    bert.embeddings.token_type_embeddings.weight[1, IDF] = BODY * bert.config.initializer_range
    dense = reader.lm.cls.predictions.transform.dense
    nn.init.eye_(dense.weight)
    dense.weight[[IDF, OWN]] = 0.0


def _read_in_two_layers(bert: BertModel) -> None:
    first, last = bert.encoder.layer[0].attention, bert.encoder.layer[-1].attention
    hidden, width = bert.config.hidden_size, first.self.attention_head_size
    heads = torch.arange(hidden).split(width)  # the rows of each
    count = len(heads)
    marks, sums = max(1, count // 4) if count > 1 else 0, count // 2
    near, marking = heads[: count - marks], heads[count - marks :]
    copying, summing = heads[: count - sums], heads[count - sums :]
    sines = 2 * max(1, min(8, width // 4))
    places = slice(SUMS + sums, SUMS + sums + sines)
    bert.embeddings.word_embeddings.weight[:, ASKED : places.start] = 0.0
    bert.embeddings.token_type_embeddings.weight[0, ASKED] = CLEAR * bert.config.initializer_range
    _set_positions(bert, places)
    words = torch.ones(hidden)
    words[: places.stop] = 0.0

    turn = torch.linalg.qr(torch.randn(hidden, hidden)).Q[:, : len(near) * width] * words[:, None]
    first.output.dense.weight[:, : len(near) * width] = turn
    for number, rows in enumerate(near):
        _look_at(first.self, rows, places, OFFSETS[number % len(OFFSETS)], SHARP)
        first.self.value.weight[rows] = torch.randn(width, hidden) / hidden**0.5 * words
    first.output.dense.weight[MARK] = 0.0
    # A word that the query lacks looks at [CLS], which is neither asked for nor a mark.
    for rows in marking:
        _compare(first.self, rows, torch.diag(words))
        _add(first.self, rows[0], ASKED, IN_QUERY / CLEAR)
        _add(first.self, rows[1], OWN, NOT_FOUND / hidden**0.5)
        first.self.value.weight[rows[0]] = 0.0
        first.self.value.weight[rows[0], ASKED] = 1 / CLEAR
        first.self.value.weight[rows[0], OWN] = -1 / hidden**0.5
        first.output.dense.weight[MARK, rows[0]] = CLEAR / marks

    for rows in copying:
        _compare(last.self, rows, turn.T)  # all neighbours at once
    for number, rows in enumerate(summing):
        _look_at(last.self, rows, places, WINDOWS[number % len(WINDOWS)], BROAD)
        nn.init.normal_(last.output.dense.weight[:, rows], std=NEARLY_NOTHING / hidden**0.5)
        last.self.value.weight[rows[0]] = 0.0
        last.self.value.weight[rows[0], MARK] = 1.0
        last.output.dense.weight[SUMS + number] = 0.0
        last.output.dense.weight[SUMS + number, rows[0]] = CLEAR


def _look_at(attention: nn.Module, rows: Tensor, places: slice, offset: int, sharp: float) -> None:
    """The head of these rows looks at the place `offset` further, from wherever it is."""
    sines, width = places.stop - places.start, len(rows)
    attention.key.weight[rows] = attention.query.weight[rows] = 0.0
    # The last rows: the first may ask for the idf.
    attention.key.weight[rows[-sines:], places] = torch.eye(sines)
    shift = _shift(_rates(sines // 2), offset)
    attention.query.weight[rows[-sines:], places] = sharp * width**0.5 * shift


def _compare(attention: nn.Module, rows: Tensor, seen: Tensor) -> None:
    """The head of these rows looks for places like its own, in a random projection of what is seen: of the
    n coordinates of seen [n, H] x, each about as large as one.
    """
    width, count = len(rows), max(1, int(seen.any(dim=1).sum()))
    projection = torch.randn(width, len(seen)) / width**0.5 @ seen
    both = MATCH**0.5 * width**0.25 / count**0.5 * projection
    attention.query.weight[rows] = attention.key.weight[rows] = both


def _add(attention: nn.Module, row: Tensor, coordinate: int, factor: float) -> None:
    """The row adds a coordinate of the key, times the factor, to the logits of its head."""
    attention.query.weight[row] = attention.key.weight[row] = 0.0
    attention.query.bias[row] = attention.attention_head_size**0.5
    attention.key.weight[row, coordinate] = factor


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
