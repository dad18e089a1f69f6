"""Text to token ids: the vocabulary, the three inputs of REALM, and a corpus of documents and statements.

    query      [CLS] x [SEP]
    document   [CLS] title [SEP] body [SEP]      segments 0 and 1
    join       [CLS] x [SEP] body [SEP]          segments 0 and 1, no title: what the knowledge-augmented
    encoder reads

Shapes: B examples, N documents, L wordpieces, M target tokens.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn import functional

from .config import ModelConfig
from .ragged import Ragged
from .world import Statement, World

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
IGNORE = -100  # a target that is not scored
MAX_LETTERS = 1000  # of a vocabulary that is learned, as in BERT's
MAX_WORDS = 5_000_000  # that are counted at a time


def wordpiece(vocabulary: list[str]) -> Tokenizer:
    """A lower-casing WordPiece tokenizer over an ordered vocabulary."""
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def learn_vocabulary(texts: Iterable[str], size: int, whole_words: Iterable[str] = ()) -> list[str]:
    """The special tokens, each character at a word's start and inside, frequent merges, `whole_words`.

    The trainer of `tokenizers` breaks ties by the order of a hash map, differently in every process; here
    ties go to the alphabetically smaller pair, so that a seed gives one run. `whole_words` (the objects)
    become one piece each, as names that are frequent in a real corpus are. Of the letters the most frequent
    MAX_LETTERS count, and a word with another one is unknown.
    """
    words = _count_words(texts)
    whole = sorted({word for text in whole_words for word in _words(text)})
    pieces = {word: [word[0], *(f"##{c}" for c in word[1:])] for word in [*words, *whole]}
    letters = sorted({letter for word in pieces for letter in word})
    alphabet = [*letters, *(f"##{letter}" for letter in letters)]
    vocabulary = dict.fromkeys([*SPECIAL, *alphabet])

    counts: Counter[tuple[str, str]] = Counter()
    holders: dict[tuple[str, str], set[str]] = defaultdict(set)
    for word, count in words.items():
        for pair in zip(pieces[word], pieces[word][1:], strict=False):
            counts[pair] += count
            holders[pair].add(word)
    # The most frequent pair first. Entries whose count has changed since are passed over.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while len(vocabulary) + len(whole) < size and heap:
        count, best = heapq.heappop(heap)
        if count == 0 or counts.get(best) != -count:
            continue
        merged = best[0] + best[1].removeprefix("##")
        vocabulary[merged] = None
        changed: set[tuple[str, str]] = set()
        for word in holders.pop(best):
            before = pieces[word]
            pieces[word] = _merge(before, best, merged)
            for pair in zip(before, before[1:], strict=False):
                counts[pair] -= words[word]
                changed.add(pair)
            for pair in zip(pieces[word], pieces[word][1:], strict=False):
                counts[pair] += words[word]
                holders[pair].add(word)
                changed.add(pair)
        del counts[best]
        for pair in changed - {best}:
            heapq.heappush(heap, (-counts[pair], pair))
    vocabulary.update(dict.fromkeys(whole))
    return list(vocabulary)


def world_tokenizer(world: World, size: int) -> Tokenizer:
    texts = [f"{document.title} {document.body}" for document in world.documents]
    texts += [query.text for query in world.train_queries + world.held_out_queries]
    return wordpiece(learn_vocabulary(texts, size, world.object_words))


def load_tokenizer(path: Path) -> Tokenizer:
    """Raises ValueError where the file is missing or damaged."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no type of its own for what it finds wrong
        raise ValueError(f"cannot read the tokenizer {path}: {error}") from error


@dataclass(frozen=True)
class Statements:
    """Sentences with the tokens of their objects known, ready to be masked. Row i states fact[i].

    In a world of facts the object is what a document says of its subject, in text a named entity or a date.
    """

    ids: Tensor  # int64 [B, L]: [CLS] x [SEP], padded
    first: Tensor  # int64 [B], the first token of the object
    last: Tensor  # int64 [B], the token after the object
    fact: Tensor  # int64 [B], which is also the number of the document that states it
    origin: Tensor  # int64 [B], where in its body x stands word for word; -1 where it is said otherwise

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: Tensor) -> Statements:
        return Statements(*(part[rows] for part in self._parts()))

    def cat(self, other: Statements) -> Statements:
        width = max(self.ids.shape[1], other.ids.shape[1])
        ids = [functional.pad(s.ids, (0, width - s.ids.shape[1]), value=PAD) for s in (self, other)]
        rest = zip(self._parts()[1:], other._parts()[1:], strict=True)
        return Statements(torch.cat(ids), *(torch.cat(pair) for pair in rest))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.ids, self.first, self.last, self.fact, self.origin


class StatementSource(Protocol):
    """Statements by number: in memory (Statements is one), or made when they are drawn."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Statements: ...


def itself(rows: Tensor) -> Tensor:
    """Of documents that have no copies: int64 [B] -> [B, 1]."""
    return rows[:, None]


@dataclass(frozen=True)
class Documents:
    """Titles and bodies as wordpieces without special tokens, in memory or mapped from files.

    copies: of rows int64 [B] the documents with the same body, int64 [B, E], each itself among them, -1 pads.
    sentences: where the sentences of each body end, in wordpieces; None where they are not told.
    texts: the title and the body of a row as they were written.
    """

    titles: Ragged
    bodies: Ragged
    length: int  # of [CLS] title [SEP] body [SEP] at most
    copies: Callable[[Tensor], Tensor] = itself
    sentences: Ragged | None = None
    texts: Callable[[int], tuple[str, str]] = lambda row: ("", "")

    @property
    def num_documents(self) -> int:
        return len(self.bodies)

    @property
    def null(self) -> int:
        """The row of the null document: no title, no body. No row of the table, it is never retrieved."""
        return self.num_documents

    def read(self, rows: Tensor) -> Tensor:
        """Bodies of rows int64 [...]: int64 [..., L], as far as a document's length goes."""
        return self.bodies.padded(rows)[..., : self.length - 3]

    def inputs(self, rows: Tensor, bodies: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ids and segments of `[CLS] title [SEP] body [SEP]`; other bodies may stand in for their own."""
        bodies = self.read(rows) if bodies is None else bodies
        return pack(self.titles.padded(rows), bodies, self.length)


@dataclass(frozen=True)
class Corpus:
    """What REALM is trained on: documents, and statements to be masked. A world and text are both one.

    contexts: int64 [C], the documents of the Inverse Cloze Task.
    own: sentences of the documents, in their words. train: statements from elsewhere; there may be none.
    objects_per_fact: int64 [facts], among how many objects an answer is one; None where nobody knows.
    fingerprint: of the documents; "" where they are drawn from the configuration alone.
    """

    documents: Documents
    contexts: Tensor
    own: StatementSource
    train: StatementSource
    held_out: StatementSource
    objects_per_fact: Tensor | None = None
    fingerprint: str = ""


def trivial(documents: Documents, statements: Statements) -> Tensor:
    """The documents that hold a statement word for word, copies too: int64 [B, E], -1 pads.

    They may not be retrieved for it: they would be found, and nothing learned by it (section 3.4).
    """
    copies = documents.copies(statements.fact)
    return copies.masked_fill((statements.origin < 0)[:, None], -1)


def prepare(world: World, tokenizer: Tokenizer, config: ModelConfig) -> Corpus:
    """Token ids of all documents and statements of a world."""
    titles = [e.ids for e in tokenizer.encode_batch([d.title for d in world.documents])]
    bodies = [e.ids for e in tokenizer.encode_batch([d.body for d in world.documents])]
    room = config.document_length - 3
    bodies = [body[: room - len(title)] for title, body in zip(titles, bodies, strict=True)]
    documents = Documents(
        Ragged.from_lists(titles),
        Ragged.from_lists(bodies),
        config.document_length,
        texts=lambda row: (world.documents[row].title, world.documents[row].body),
    )
    own = [d.statement for d in world.documents if d.statement is not None]
    return Corpus(
        documents,
        torch.arange(documents.num_documents),
        # A body begins with its statement.
        encode_statements(own, tokenizer, config.query_length, in_documents=True),
        encode_statements(world.train_queries, tokenizer, config.query_length),
        encode_statements(world.held_out_queries, tokenizer, config.query_length),
        torch.tensor(world.objects_per_fact),
    )


def encode_statements(
    statements: list[Statement], tokenizer: Tokenizer, length: int, in_documents: bool = False
) -> Statements:
    """Tokens of the statements; in_documents: their documents begin with them, word for word."""
    texts, first, last = [], [], []
    for statement, encoding in zip(
        statements, tokenizer.encode_batch([s.text for s in statements]), strict=True
    ):
        inside = [
            i for i, (a, b) in enumerate(encoding.offsets) if a >= statement.start and b <= statement.end
        ]
        texts.append(encoding.ids)
        first.append(inside[0])
        last.append(inside[-1] + 1)
    facts = [s.fact for s in statements]
    return cut_statements(texts, first, last, facts, [0 if in_documents else -1] * len(facts), length)


def cut_statements(
    texts: list[list[int]],
    first: list[int],
    last: list[int],
    facts: list[int],
    origins: list[int],
    length: int,
) -> Statements:
    """Statements from the wordpieces of sentences and of the objects in them, [first, last).

    A sentence too long for `length` loses its end, and of its beginning what keeps out the object. An object
    that is too long itself loses its end.
    """
    room = length - 2
    last = [min(b, a + room) for a, b in zip(first, last, strict=True)]
    starts = [max(0, b - room) for b in last]
    ids = [[CLS, *text[at : at + room], SEP] for text, at in zip(texts, starts, strict=True)]
    columns = (
        [a - at + 1 for a, at in zip(first, starts, strict=True)],
        [b - at + 1 for b, at in zip(last, starts, strict=True)],
        facts,
        [origin if origin < 0 else origin + at for origin, at in zip(origins, starts, strict=True)],
    )
    return Statements(padded(ids, length), *(torch.tensor(column, dtype=torch.int64) for column in columns))


def query_inputs(text: Tensor) -> Tensor:
    """`[CLS] x [SEP]` from wordpieces [B, L] without special tokens, which may have gaps: ids."""
    one = text.new_ones(text.shape[0], 1)
    return close_gaps(torch.cat([CLS * one, text, SEP * one], dim=1))[0]


def join(queries: Tensor, bodies: Tensor) -> tuple[Tensor, Tensor]:
    """`[CLS] x [SEP] body [SEP]` from [B, Lq] queries with their special tokens and [B, Lb] bodies: ids,
    segments.

    Query tokens keep their positions, so targets are where they were.
    """
    ids = torch.cat([queries, bodies, torch.full_like(queries[:, :1], SEP)], dim=1)
    segments = torch.zeros_like(ids)
    segments[:, queries.shape[1] :] = 1
    return close_gaps(ids, segments)


def pack(titles: Tensor, bodies: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """`[CLS] title [SEP] body [SEP]` of at most `length` wordpieces: ids and segments [B, L]."""
    one = titles.new_ones(titles.shape[0], 1)
    ids = torch.cat([CLS * one, titles, SEP * one, bodies, SEP * one], dim=1)
    segments = torch.zeros_like(ids)
    segments[:, titles.shape[1] + 2 :] = 1
    ids, segments = close_gaps(ids, segments)
    return ids[:, :length], segments[:, :length]


def padded(rows: list[list[int]], width: int = 0) -> Tensor:
    """Ragged rows as int64 [B, the longest or width], filled with [PAD]."""
    width = max([width, *map(len, rows)])
    filled = [row + [PAD] * (width - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64).reshape(len(rows), width)


def trim(ids: Tensor) -> Tensor:
    """Without the columns at the end that hold only [PAD]."""
    return ids[:, : int((ids != PAD).sum(dim=1).max())] if ids.numel() else ids


def close_gaps(ids: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ids and segments [B, L] with padding moved to the end of each row, so that positions count real tokens
    only.
    """
    segments = torch.zeros_like(ids) if segments is None else segments
    order = (ids == PAD).to(torch.int8).argsort(dim=1, stable=True)
    ids = trim(ids.gather(1, order))
    segments = segments.gather(1, order)[:, : ids.shape[1]].masked_fill(ids == PAD, 0)
    return ids, segments


_NORMALIZE = normalizers.BertNormalizer(lowercase=True)
_SPLIT = pre_tokenizers.BertPreTokenizer()


def _count_words(texts: Iterable[str]) -> Counter[str]:
    words: Counter[str] = Counter()
    for text in texts:
        words.update(_words(text))
        if len(words) > MAX_WORDS:
            # Words of a single place are most of them; memory stays bounded.
            words = Counter({word: count for word, count in words.items() if count > 1})
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    kept = set(sorted(letters, key=lambda letter: (-letters[letter], letter))[:MAX_LETTERS])
    return Counter({word: count for word, count in words.items() if kept.issuperset(word)})


def _words(text: str) -> list[str]:
    return [word for word, _ in _SPLIT.pre_tokenize_str(_NORMALIZE.normalize_str(text))]


def _merge(pieces: list[str], pair: tuple[str, str], merged: str) -> list[str]:
    out: list[str] = []
    i = 0
    while i < len(pieces):
        if tuple(pieces[i : i + 2]) == pair:
            out.append(merged)
            i += 2
        else:
            out.append(pieces[i])
            i += 1
    return out
