"""BlockStore: the blocks of a corpus as token ids in memory-mapped files, written once and never changed.

A directory holds corpus.json (counts and fingerprint), the vocabulary (vocab.txt and the tokenizer's files)
and the columns below, each a Ragged with one row for every block.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..published.tokenizer import read_tokenizer
from ..ragged import Ragged

FORMAT = 1
MANIFEST = "corpus.json"
# Column -> dtype and width of a value. texts, names and ids are UTF-8; sentences and spans are [begin, end)
# in wordpieces of the body; copies[group[i]] are the rows whose bodies equal that of block i.
COLUMNS = {
    "titles": ("<i4", 0),
    "bodies": ("<i4", 0),
    "texts": ("u1", 0),
    "title_texts": ("u1", 0),
    "document_ids": ("u1", 0),
    "sentences": ("<i4", 2),
    "spans": ("<i4", 2),
}


@dataclass(frozen=True)
class Block:
    """title and body: int32 wordpiece ids, without special tokens. text: what the body was made of."""

    title: np.ndarray
    body: np.ndarray
    text: str
    title_text: str
    document_id: str


@dataclass(frozen=True)
class BlockStore:
    """Blocks 0 to len - 1, in the order of the documents.

    fingerprint: of the vocabulary, titles and bodies. An index belongs to the store of the same fingerprint.
    titles, bodies: token ids; sentences, spans: places in the bodies; all Ragged.
    """

    directory: Path
    tokenizer: Tokenizer
    fingerprint: str
    num_documents: int
    block_wordpieces: int
    titles: Ragged
    bodies: Ragged
    sentences: Ragged
    salient: Ragged
    copies: Ragged
    group: np.ndarray
    _texts: Ragged
    _title_texts: Ragged
    _document_ids: Ragged

    @staticmethod
    def open(directory: str | Path) -> BlockStore:
        """Map a directory that build_corpus wrote. Raises ValueError naming what lacks or is damaged."""
        directory = Path(directory)
        values = read_manifest(directory)
        rows = values["blocks"]
        columns = {
            name: Ragged.open(directory / name, rows, dtype, width)
            for name, (dtype, width) in COLUMNS.items()
        }
        return BlockStore(
            directory=directory,
            tokenizer=read_tokenizer(directory, values["vocabulary"]),
            fingerprint=values["fingerprint"],
            num_documents=values["documents"],
            block_wordpieces=values["block_wordpieces"],
            titles=columns["titles"],
            bodies=columns["bodies"],
            sentences=columns["sentences"],
            salient=columns["spans"],
            copies=Ragged.open(directory / "copies", values["distinct"], "<i8"),
            group=Ragged.open(directory / "group", rows, "<i8").values,
            _texts=columns["texts"],
            _title_texts=columns["title_texts"],
            _document_ids=columns["document_ids"],
        )

    def __len__(self) -> int:
        return len(self.bodies)

    def __getitem__(self, row: int) -> Block:
        """Raises IndexError for a row outside of the store."""
        texts = (self._texts, self._title_texts, self._document_ids)
        text, title_text, document_id = (column[row].tobytes().decode("utf-8") for column in texts)
        return Block(self.titles[row], self.bodies[row], text, title_text, document_id)

    def text(self, row: int) -> bytes:
        """What the body was made of, as UTF-8."""
        return self._texts[row].tobytes()

    def spans(self, row: int) -> np.ndarray:
        """Salient spans of a body, int32 [n, 2]: wordpieces [begin, end), in reading order."""
        return self.salient[row]

    def twins(self, rows: Tensor) -> Tensor:
        """The blocks with the same body, each itself among them: int64 [B] -> [B, E], -1 pads."""
        return self.copies.padded(torch.from_numpy(self.group[rows.numpy()]), fill=-1)


def read_manifest(directory: Path) -> dict[str, Any]:
    """corpus.json. Raises ValueError where the directory has none that can be read here."""
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{directory} is no corpus: cannot read {MANIFEST}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else values
        raise ValueError(f"{path} must be of format {FORMAT}, got {found!r}")
    keys = ("blocks", "distinct", "documents", "vocabulary", "block_wordpieces")
    lacking = [key for key in keys if not isinstance(values.get(key), int)]
    if lacking or not isinstance(values.get("fingerprint"), str):
        raise ValueError(f"{path} is damaged: {(lacking or ['fingerprint'])[0]} lacks")
    return values
