"""Text as a corpus with masked statements: every sentence that names somebody or something, or dates it."""

from __future__ import annotations

import random
from array import array
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig, TextConfig
from ..inputs import Corpus, Documents, Statements, cut_statements
from ..ragged import Ragged
from .store import BlockStore

MAX_MASKED = 10  # wordpieces of a salient span that are masked (released code)
MAX_HELD_OUT = 500  # statements; more of them make an evaluation slower and hardly surer


class SpanStatements:
    """The salient spans of some blocks of a store: statement r is the sentence around span r, which may be
    masked. Made when it is drawn, so that their number costs eight bytes a block.

    A uniform draw is one of spans: a sentence with two of them is drawn twice as often as one with one.
    """

    def __init__(self, store: BlockStore, blocks: np.ndarray, length: int) -> None:
        """blocks: int64, their rows. length: of `[CLS] x [SEP]` at most."""
        self.store, self.blocks, self.length = store, blocks, length
        ends = np.asarray(store.salient.ends)
        counts = np.diff(ends, prepend=0)[blocks]
        self.ends = counts.cumsum()
        self.first_span = ends[blocks] - counts

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, rows: Tensor) -> Statements:
        numbers = rows.numpy()
        places = np.searchsorted(self.ends, numbers, side="right")
        spans = self.first_span[places] + numbers - np.where(places > 0, self.ends[places - 1], 0)
        texts, first, last, origins = [], [], [], []
        for block, span in zip(self.blocks[places], spans, strict=True):
            begin, end = (int(place) for place in self.store.salient.values[span])
            sentences = self.store.sentences[int(block)]
            number = int(np.searchsorted(sentences[:, 0], begin, side="right")) - 1
            low, high = (int(place) for place in sentences[number])
            texts.append(self.store.bodies[int(block)][low:high].tolist())
            first.append(begin - low)
            last.append(min(end, begin + MAX_MASKED) - low)
            origins.append(low)
        return cut_statements(texts, first, last, self.blocks[places].tolist(), origins, self.length)


def prepare_text(store: BlockStore, text: TextConfig, model: ModelConfig, seed: int) -> Corpus:
    """A store as a corpus. A share of the blocks is held out: no stage draws a sentence of theirs, and one of
    each asks for its block in an evaluation, where the block lacks it. All blocks may be retrieved.

    Raises ValueError for blocks longer than the model reads, and for fewer than two to train on.
    """
    if store.block_wordpieces + 3 > model.document_length:
        raise ValueError(
            f"the model reads documents of {model.document_length} wordpieces, [CLS] and two [SEP] included: "
            f"blocks may have {model.document_length - 3}, {store.directory} has them of up to "
            f"{store.block_wordpieces}"
        )
    rng = random.Random(seed)
    blocks = array("q", range(len(store)))
    rng.shuffle(blocks)  # type: ignore[arg-type]
    count = round(text.held_out * len(blocks))
    held_out, train = blocks[:count], np.sort(np.array(blocks[count:], dtype=np.int64))
    parts = np.diff(np.asarray(store.sentences.ends), prepend=0)
    contexts = train[parts[train] > 1]  # a block of one sentence has no rest
    own = SpanStatements(store, train, model.query_length)
    if len(contexts) < 2 or len(own) == 0:
        raise ValueError(
            f"{store.directory} must hold two blocks of two sentences and a salient span to train on, got "
            f"{len(contexts)} and {len(own)}"
        )
    able = (block for block in held_out if parts[block] > 1 and len(store.spans(block)))
    asking = np.fromiter(islice(able, MAX_HELD_OUT), dtype=np.int64)
    questions = SpanStatements(store, asking, model.query_length)
    begins = questions.ends - np.diff(questions.ends, prepend=0)
    drawn = [rng.randrange(low, high) for low, high in zip(begins, questions.ends, strict=True)]
    documents = Documents(
        store.titles,
        store.bodies,
        model.document_length,
        copies=store.twins,
        sentences=Ragged(store.sentences.values[:, 1], store.sentences.ends),
        texts=lambda row: (store[row].title_text, store[row].text),
    )
    return Corpus(
        documents,
        torch.from_numpy(contexts),
        own,
        train=SpanStatements(store, np.empty(0, np.int64), model.query_length),
        held_out=questions[torch.tensor(drawn, dtype=torch.int64)],
        fingerprint=store.fingerprint,
    )


def open_text(text: TextConfig, model: ModelConfig, seed: int) -> tuple[BlockStore, Corpus]:
    store = BlockStore.open(Path(text.directory))
    return store, prepare_text(store, text, model, seed)
