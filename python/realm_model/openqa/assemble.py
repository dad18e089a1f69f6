"""One OpenQA from three folders: a model, a corpus, and the index of that corpus by that model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import torch

from ..corpus.store import BlockStore
from ..machine import CPU
from ..published import OpenQA
from ..run_folder import is_run
from .folder import (
    has_reader,
    index_identity,
    load_embedder,
    load_reader,
    tuned_length,
    tuned_with,
    with_words,
    words_in,
)
from .index import Identity, open_index
from .questions import Question

# What the embedder and the reader of one OpenQA must share: OpenQA has one config for both.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Beams:
    """How many blocks are retrieved in fine-tuning and how many are read, and how long a join may be: the
    defaults are the released ones. Each is cut to what the corpus and the model have.

    length: None is that of the run of fine-tuning, or 320.
    """

    searcher: int = 5000
    reader: int = 5
    length: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("searcher beam", self.searcher), ("reader beam", self.reader)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


RELEASED = Beams()
LENGTH = 320  # of a join, as released


@dataclass(frozen=True)
class Parts:
    """The model and what it was put together from; a whole published Open-QA has neither of the two."""

    model: OpenQA
    can_read: bool  # whether its reader was trained to read answers
    identity: Identity | None = None  # of the index
    store: BlockStore | None = None

    def check(self, questions: Sequence[Question]) -> None:
        """Raise ValueError for the first question that is longer than the encoders read."""
        most = self.model.config.max_position_embeddings
        encodings = self.model.tokenizer.encode_batch([question.question for question in questions])
        for question, encoding in zip(questions, encodings, strict=True):
            if len(encoding) > most:
                raise ValueError(
                    f"question {question.id}: it may have {most - 2} wordpieces, got {len(encoding) - 2}"
                )

    def title(self, row: int) -> str:
        """Of a block; published blocks have none."""
        return "" if self.store is None else self.store[row].title_text


class BlockTexts(Sequence[bytes]):
    """The texts of a corpus's blocks, read when they are asked for: the records of an OpenQA."""

    def __init__(self, store: BlockStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.store.text(index)


def assemble(
    model: Path,
    corpus: Path,
    index: Path,
    beams: Beams = RELEASED,
    seed: int = 0,
    device: torch.device = CPU,
) -> Parts:
    """Open the three folders and make sure that they belong together.

    A model without a reader gets a fresh one by the seed, on its encoder where it has one. Raises ValueError
    naming the folder, the rule and what was found.
    """
    store = BlockStore.open(corpus)
    embedder = load_embedder(model)
    reader = load_reader(model, seed, embedder.config)
    words = words_in(model, store, embedder.config)
    embedder, reader = with_words(embedder, words), with_words(reader, words)
    table, identity = open_index(index, device=device)
    identity.require(index, index_identity(model, store, embedder), corpus, model)
    for name in _SHARED:
        own, other = getattr(embedder.config, name), getattr(reader.config, name)
        if own != other:
            raise ValueError(f"{model}: embedder and reader must have one {name}, got {own} and {other}")
    config = replace(
        embedder.config,
        **{name: getattr(reader.config, name) for name in ("span_hidden_size", "max_span_width")},
        reader_layer_norm_eps=reader.config.reader_layer_norm_eps,
        num_block_records=len(store),
        searcher_beam_size=min(beams.searcher, len(store)),
        reader_beam_size=min(beams.reader, len(store)),
        reader_seq_len=min(
            beams.length or tuned_length(model) or LENGTH, embedder.config.max_position_embeddings
        ),
    )
    qa = OpenQA(config, table, BlockTexts(store), store.tokenizer)
    # A twin embedder serves as the published one does.
    qa.embedder, qa.reader = embedder, reader
    return Parts(qa.eval().to(device), has_reader(model), identity, store)


def open_openqa(
    model: Path,
    corpus: Path | None,
    index: Path | None,
    beams: Beams = RELEASED,
    device: torch.device = CPU,
) -> Parts:
    """assemble(). Where neither is given, the corpus and the index of a run of fine-tuning, or the blocks and
    the index of a whole published Open-QA.
    """
    if (corpus is None) != (index is None):
        raise ValueError("--corpus and --index go together; a run of fine-tuning knows its own")
    if corpus is None or index is None:
        corpus, index = tuned_with(model)
    if corpus is None or index is None:
        if is_run(model):
            raise ValueError(f"{model} is a run without a corpus and an index: name --corpus and --index")
        return Parts(OpenQA.from_pretrained(model).to(device), can_read=True)
    return assemble(model, corpus, index, beams, device=device)
