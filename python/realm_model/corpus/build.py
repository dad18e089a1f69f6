"""Documents to a BlockStore: sentences packed greedily into blocks, streaming, committed by rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from ..inputs import SPECIAL, learn_vocabulary, wordpiece
from ..published.tokenizer import VOCABULARY, read_tokenizer, write_tokenizer
from ..ragged import RaggedWriter
from .documents import Document
from .sentences import Span, Tagger, salient_spans, sentences, tagger_named
from .store import COLUMNS, FORMAT, MANIFEST, BlockStore

BATCH = 256  # documents that are tokenised at a time
FINGERPRINTED = ("titles", "bodies")

Progress = Callable[[str, int, int], None]  # what is done, documents so far, blocks so far


def build_corpus(
    documents: Iterable[Document],
    directory: str | Path,
    vocabulary: str | Path | None = None,
    vocabulary_size: int = 8000,
    block_wordpieces: int = 288,
    tagger: str | Tagger = "rules",
    progress: Progress | None = None,
) -> BlockStore:
    """Write the corpus of `documents` to a new directory, and open it.

    Sentences of a document are packed greedily into blocks of up to block_wordpieces (288 in the paper), not
    counting title and special tokens; a longer sentence is cut between words. Blocks never hold two
    documents. Documents are streamed; memory does not grow with their number, but for eight bytes each.
    vocabulary: a vocab.txt or a tokenizer.json, or a directory with one; None learns lower-case wordpieces
        from the documents, which are then spooled to the disk. In the store the special tokens come first
        ([PAD] 0 to [MASK] 4) and the rest in its order.
    vocabulary_size: of a vocabulary that is learned.
    tagger: of named entities, by name or as a function of a text; a document's own spans go before it.

    The directory appears whole or not at all. Raises ValueError for a directory that exists, a bad document
    (see read_documents; an id seen before; a text without a wordpiece), a vocabulary that cannot serve, and a
    corpus without a salient span.
    """
    directory = Path(directory)
    if directory.exists():
        raise ValueError(f"{directory} exists: a corpus is written to a new directory")
    if block_wordpieces < 1:
        raise ValueError(f"build_corpus: block_wordpieces must be at least 1, got {block_wordpieces}")
    tagger = tagger_named(tagger) if isinstance(tagger, str) else tagger
    progress = progress or (lambda what, documents, blocks: None)
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        documents = _distinct(documents)
        if vocabulary is None:
            tokenizer, documents = _learn(documents, partial, vocabulary_size, progress)
        else:
            tokenizer = _given(Path(vocabulary))
        write_tokenizer(tokenizer, partial)
        writer = _Writer(partial)
        with writer:
            _write_blocks(documents, tokenizer, block_wordpieces, tagger, writer, progress)
        writer.finish(tokenizer, block_wordpieces)
        for path in (*partial.iterdir(), partial):
            _flush(path)
        partial.rename(directory)
        _flush(directory.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return BlockStore.open(directory)


def pack_sentences(sizes: list[int], limit: int) -> list[list[int]]:
    """Greedy packing: the numbers of the sentences of each block. One beyond the limit stands alone."""
    blocks: list[list[int]] = []
    room = 0
    for number, size in enumerate(sizes):
        if not blocks or size > room:
            blocks.append([])
            room = limit
        blocks[-1].append(number)
        room -= size
    return blocks


class _Writer:
    """The columns of a store, and what its manifest counts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stack = ExitStack()
        self.columns = {name: RaggedWriter(directory / name, dtype) for name, (dtype, _) in COLUMNS.items()}
        self.hashes = bytearray()  # of the bodies, eight bytes each
        self.documents = self.blocks = 0
        self.source = ""  # of the first document

    def __enter__(self) -> _Writer:
        for column in self.columns.values():
            self.stack.enter_context(column)
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def append(self, **row: object) -> None:
        for name, column in self.columns.items():
            column.append(row[name])  # type: ignore[arg-type]
        self.hashes += _hash(np.asarray(row["bodies"], "<i4").tobytes())
        self.blocks += 1

    def finish(self, tokenizer: Tokenizer, block_wordpieces: int) -> None:
        """Group equal bodies, and write the manifest."""
        if self.blocks == 0:
            raise ValueError("build_corpus: there must be at least one document, got none")
        if self.columns["spans"].total == 0:
            raise ValueError(
                f"{self.source or 'build_corpus'}: the corpus that begins here must hold a salient span to "
                f"be masked, got none in {self.blocks} blocks: choose another tagger or give spans"
            )
        distinct, group = np.unique(np.frombuffer(bytes(self.hashes), "<u8"), return_inverse=True)
        order = group.argsort(kind="stable").astype("<i8")
        ends = np.bincount(group, minlength=len(distinct)).cumsum().astype("<i8")
        order.tofile(self.directory / "copies.values")
        ends.tofile(self.directory / "copies.ends")
        group.astype("<i8").tofile(self.directory / "group.values")
        np.arange(1, self.blocks + 1, dtype="<i8").tofile(self.directory / "group.ends")
        fingerprint = hashlib.sha256((self.directory / VOCABULARY).read_bytes())
        for name in FINGERPRINTED:
            fingerprint.update(self.columns[name].digest.digest())
        manifest = {
            "format": FORMAT,
            "fingerprint": fingerprint.hexdigest(),
            "documents": self.documents,
            "blocks": self.blocks,
            "distinct": len(distinct),
            "wordpieces": self.columns["bodies"].total,
            "sentences": self.columns["sentences"].total,
            "salient_spans": self.columns["spans"].total,
            "vocabulary": tokenizer.get_vocab_size(),
            "block_wordpieces": block_wordpieces,
        }
        (self.directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _write_blocks(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    limit: int,
    tagger: Tagger,
    writer: _Writer,
    progress: Progress,
) -> None:
    stream = iter(documents)
    while batch := list(islice(stream, BATCH)):
        titles = tokenizer.encode_batch([d.title for d in batch], add_special_tokens=False)
        texts = tokenizer.encode_batch([d.text for d in batch], add_special_tokens=False)
        for document, title, text in zip(batch, titles, texts, strict=True):
            writer.source = writer.source or document.source
            ids, offsets = text.ids, text.offsets
            if not ids:
                raise ValueError(f"{document.source or document.id}: text must hold a wordpiece, got none")
            salient = salient_spans(document.text, tagger) if document.spans is None else document.spans
            spans = _token_ranges(offsets, salient)
            for ranges in _blocks(document.text, text, offsets, limit):
                first, last = ranges[0][0], ranges[-1][1]
                inside = [span for span in spans if any(a <= span[0] and span[1] <= b for a, b in ranges)]
                writer.append(
                    titles=title.ids,
                    bodies=ids[first:last],
                    texts=document.text[offsets[first][0] : offsets[last - 1][1]].encode(),
                    title_texts=document.title.encode(),
                    document_ids=document.id.encode(),
                    sentences=[(a - first, b - first) for a, b in ranges],
                    spans=[(a - first, b - first) for a, b in inside],
                )
            writer.documents += 1
        progress("blocks", writer.documents, writer.blocks)


def _blocks(text: str, encoding: Encoding, offsets: list[Span], limit: int) -> Iterator[list[Span]]:
    """Of each block of an encoded text the wordpieces [first, last) of its sentences."""
    pieces: list[Span] = []
    for first, last in _token_ranges(offsets, sentences(text)):
        pieces += [(first, last)] if last - first <= limit else _cut(encoding.word_ids, first, last, limit)
    for numbers in pack_sentences([last - first for first, last in pieces], limit):
        yield [pieces[number] for number in numbers]


def _cut(words: list[int | None], first: int, last: int, limit: int) -> Iterator[Span]:
    """A sentence in parts of up to `limit` wordpieces, cut between words where a word is not longer."""
    while last - first > limit:
        end = first + limit
        while end > first and words[end] == words[end - 1]:
            end -= 1
        end = end if end > first else first + limit
        yield first, end
        first = end
    yield first, last


def _token_ranges(offsets: list[Span], spans: Iterable[Span]) -> list[Span]:
    """Spans of characters as wordpieces [first, last), each with all wordpieces it touches; none is empty."""
    begins, ends = zip(*offsets, strict=True)
    found = [(bisect_right(ends, begin), bisect_left(begins, end)) for begin, end in spans]
    return [(first, last) for first, last in dict.fromkeys(found) if first < last]


def _distinct(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents. Raises ValueError at the first id that came before (by a hash of 64 bits)."""
    sorted_ids = np.empty(0, np.uint64)
    recent: set[int] = set()
    for document in documents:
        value = int.from_bytes(_hash(document.id.encode()), "little")
        place = int(np.searchsorted(sorted_ids, np.uint64(value)))
        known = place < len(sorted_ids) and int(sorted_ids[place]) == value
        if known or value in recent:
            raise ValueError(
                f"{document.source or 'document'}: id must be its own, got {document.id!r} again"
            )
        recent.add(value)
        # A million numbers in a set, the rest in eight bytes each.
        if len(recent) >= 1 << 20:
            sorted_ids = np.union1d(sorted_ids, np.fromiter(recent, np.uint64))
            recent.clear()
        yield document


def _learn(
    documents: Iterable[Document], directory: Path, size: int, progress: Progress
) -> tuple[Tokenizer, Iterator[Document]]:
    """A tokenizer of the documents, and the documents once more, from a spool in `directory`."""
    spool = directory / "spool.jsonl"

    def texts() -> Iterator[str]:
        number = 0
        with spool.open("w", encoding="utf-8") as file:
            for number, document in enumerate(documents, start=1):
                file.write(json.dumps(asdict(document)) + "\n")
                yield document.title
                yield document.text
                if number % BATCH == 0:
                    progress("vocabulary", number, 0)
        progress("vocabulary", number, 0)

    def again() -> Iterator[Document]:
        with spool.open(encoding="utf-8") as file:
            for line in file:
                values = json.loads(line)
                yield Document(**values | {"spans": None if values["spans"] is None else values["spans"]})
        spool.unlink()

    words = learn_vocabulary(texts(), size)
    if len(words) > size:
        raise ValueError(
            f"build_corpus: vocabulary_size must be at least {len(words)}, the special tokens and the "
            f"letters of these documents, got {size}"
        )
    return wordpiece(words), again()


def _given(path: Path) -> Tokenizer:
    """The tokenizer of a file or a directory, with the special tokens first."""
    given = read_tokenizer(path, sys.maxsize)
    vocabulary = given.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    tokenizer = wordpiece([*SPECIAL, *(word for word in words if word not in SPECIAL)])
    tokenizer.normalizer = given.normalizer
    return tokenizer


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
