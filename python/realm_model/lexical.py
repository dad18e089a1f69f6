"""A start from nothing: a retriever that matches words before it has learned anything.

A random embedder finds nothing, and a few minutes of the Inverse Cloze Task on a small corpus hardly make up
for it. Yet a sum of random vectors, one for each word, weighted by how rare the word is, is a random
projection of tf-idf: inner products of two such sums estimate those of the two bags of words, with an error
of 1/sqrt(D). All of that is within what a BERT can say, so the weights are set to say it:

    word embeddings   random; the first coordinate holds the log of the idf
    [CLS]             the second coordinate alone, so that it stays out of the sum's way
    last attention    [CLS] asks for the first coordinate: softmax(log idf) weighs the words by their idf;
                      values and output are the identity, enlarged
    the rest          close to nothing beside the residual stream
    projection        orthogonal, blind for the first two coordinates

The reader's start is told in reading.py. Nothing of either is fixed: training begins here and moves every
weight.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertModel

from .inputs import CLS, MASK, SPECIAL, Documents
from .model import Embedder

IDF, OWN = 0, 1  # the coordinates of the log of the idf and of [CLS] and [MASK]
SILENT = -3.0  # the log of the idf of what is no word; the most frequent words are about there
SAMPLE = 100_000  # blocks that are counted, evenly spaced; rarer words are one in as many
POOLED = 4.0  # the sum of many words is this much shorter than one of them
NEARLY_NOTHING = 0.1  # how large a branch is beside the residual stream


@torch.no_grad()
def start_matching(retriever: Embedder, idf: Tensor) -> None:
    """Set the weights of an embedder to match words. idf: log_idf of the documents, [V]."""
    set_words(retriever.bert, idf)
    layer = retriever.bert.encoder.layer[-1]
    ask_for_idf(layer.attention.self)
    nn.init.eye_(layer.attention.self.value.weight)
    nn.init.eye_(layer.attention.output.dense.weight).mul_(POOLED)
    for head in {retriever.query_head, retriever.document_head}:
        nn.init.orthogonal_(head[0].weight)
        head[0].weight[:, [IDF, OWN]] = 0.0


def set_words(bert: BertModel, idf: Tensor) -> None:
    """Random words with their idf, special tokens apart from them, and branches that do nearly nothing."""
    words, deviation = bert.embeddings.word_embeddings.weight, bert.config.initializer_range
    words.normal_(std=deviation)
    words[:, IDF] = deviation * idf
    words[[CLS, MASK]] = 0.0
    words[[CLS, MASK], IDF] = deviation * SILENT
    words[[CLS, MASK], OWN] = deviation * words.shape[1] ** 0.5
    for layer in bert.encoder.layer:
        attention = layer.attention.self
        for linear in (attention.query, attention.key, layer.attention.output.dense, layer.output.dense):
            nn.init.normal_(linear.weight, std=NEARLY_NOTHING / linear.in_features**0.5)


def ask_for_idf(attention: nn.Module) -> None:
    """The first row of each head adds the log of the idf to its logits: the softmax divides by the root of
    the head's width.
    """
    width = attention.attention_head_size
    attention.key.weight[::width] = 0.0
    attention.key.weight[::width, IDF] = 1.0
    attention.query.weight[::width] = 0.0
    attention.query.bias[::width] = width**0.5


def log_idf(documents: Documents, tokenizer: Tokenizer) -> Tensor:
    """log log(N / n_w) of each wordpiece, n_w of N documents hold it: [V]. Punctuation is no word."""
    total = documents.num_documents
    rows = torch.arange(0, total, max(1, total // SAMPLE))
    counts = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int64)
    for chunk in rows.split(1024):
        ids = documents.inputs(chunk)[0].sort(dim=1).values
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        counts += ids[first].bincount(minlength=len(counts))
    idf = ((len(rows) + 1) / (counts + 0.5)).log()
    words = [tokenizer.id_to_token(row) for row in range(len(counts))]
    is_word = torch.tensor([any(letter.isalnum() for letter in word) for word in words])
    is_word[: len(SPECIAL)] = False
    return idf.log().nan_to_num(SILENT).clamp(min=SILENT).masked_fill(~is_word, SILENT)
