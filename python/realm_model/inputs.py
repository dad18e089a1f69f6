"""Text to token ids: the vocabulary, the three inputs of REALM, and a world as tensors prepared once.

    query      [CLS] x [SEP]
    document   [CLS] title [SEP] body [SEP]      segments 0 and 1
    join       [CLS] x [SEP] body [SEP]          segments 0 and 1, no title: what the knowledge-augmented
    encoder reads

Shapes: B examples, N documents, L wordpieces, M target tokens.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from .config import ModelConfig
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
    return Tokenizer.from_file(str(path))


@dataclass(frozen=True)
class Statements:
    """Sentences with the tokens of their objects known, ready to be masked. Row i states fact[i]."""

    ids: Tensor  # int64 [B, L]: [CLS] x [SEP], padded
    first: Tensor  # int64 [B], the first token of the object
    last: Tensor  # int64 [B], the token after the object
    fact: Tensor  # int64 [B], which is also the number of the document that states it

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: Tensor) -> Statements:
        return Statements(self.ids[rows], self.first[rows], self.last[rows], self.fact[rows])

    def cat(self, other: Statements) -> Statements:
        pairs = zip(
            (self.ids, self.first, self.last, self.fact),
            (other.ids, other.first, other.last, other.fact),
            strict=True,
        )
        return Statements(*(torch.cat(pair) for pair in pairs))


@dataclass(frozen=True)
class Documents:
    """Titles and bodies as padded wordpieces, without special tokens. The last row is the null document."""

    titles: Tensor  # int64 [N + 1, title length]
    bodies: Tensor  # int64 [N + 1, body length]
    length: int  # of [CLS] title [SEP] body [SEP] at most

    @property
    def num_documents(self) -> int:
        return self.bodies.shape[0] - 1

    @property
    def null(self) -> int:
        """The row of the null document: no title, no body. No row of the table, it is never retrieved."""
        return self.num_documents

    def inputs(self, rows: Tensor, bodies: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ids and segments of `[CLS] title [SEP] body [SEP]`; other bodies may stand in for their own."""
        bodies = self.bodies[rows] if bodies is None else bodies
        return pack(self.titles[rows], bodies, self.length)


@dataclass(frozen=True)
class Corpus:
    """A world as tensors."""

    documents: Documents
    own: Statements  # statement i is the one document i makes
    train: Statements
    held_out: Statements
    objects_per_fact: Tensor  # int64 [facts]


def prepare(world: World, tokenizer: Tokenizer, config: ModelConfig) -> Corpus:
    """Token ids of all documents and statements of a world."""
    titles = [e.ids for e in tokenizer.encode_batch([d.title for d in world.documents])]
    bodies = [e.ids for e in tokenizer.encode_batch([d.body for d in world.documents])]
    room = config.document_length - 3
    bodies = [body[: room - len(title)] for title, body in zip(titles, bodies, strict=True)]
    documents = Documents(padded([*titles, []]), padded([*bodies, []]), config.document_length)
    own = [d.statement for d in world.documents if d.statement is not None]
    statements = [
        encode_statements(sentences, tokenizer, config.query_length)
        for sentences in (own, world.train_queries, world.held_out_queries)
    ]
    return Corpus(documents, *statements, torch.tensor(world.objects_per_fact))


def encode_statements(statements: list[Statement], tokenizer: Tokenizer, length: int) -> Statements:
    """Tokens of the statements. One too long for `length` loses its end, and of its beginning what keeps out
    the object.
    """
    ids, first, last = [], [], []
    for statement, encoding in zip(
        statements, tokenizer.encode_batch([s.text for s in statements]), strict=True
    ):
        inside = [
            i for i, (a, b) in enumerate(encoding.offsets) if a >= statement.start and b <= statement.end
        ]
        start = max(0, inside[-1] + 1 - (length - 2))
        ids.append([CLS, *encoding.ids[start : start + length - 2], SEP])
        first.append(inside[0] - start + 1)
        last.append(inside[-1] - start + 2)
    facts = torch.tensor([s.fact for s in statements], dtype=torch.int64)
    return Statements(padded(ids, length), torch.tensor(first), torch.tensor(last), facts)


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
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows], dtype=torch.int64)


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
