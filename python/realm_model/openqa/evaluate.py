"""How well questions are answered: recall@k of the retriever, exact match and F1; BM25 beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..corpus.store import BlockStore
from .assemble import BlockTexts, Parts
from .questions import Question

RECALL_AT = (1, 5, 20, 100)
AT_ONCE = 64  # questions

Report = Callable[[int], None]  # sees the number of questions done


@dataclass(frozen=True)
class Evaluation:
    """Means over the questions; None where it was not asked or could not be."""

    questions: int
    recall: dict[int, float]  # at k: one of the top k blocks holds an answer, byte by byte, as released
    gold: dict[int, float] | None  # at k: one of the top k is of the document that the question is about
    exact_match: float | None
    f1: float | None

    def as_dict(self) -> dict[str, float | int | None]:
        values: dict[str, float | int | None] = {"questions": self.questions}
        values |= {f"recall@{k}": value for k, value in self.recall.items()}
        values |= {f"document@{k}": self.gold[k] if self.gold else None for k in self.recall}
        return values | {"exact_match": self.exact_match, "f1": self.f1}


def evaluate(parts: Parts, questions: Sequence[Question], report: Report = lambda done: None) -> Evaluation:
    """Recall of the retriever; exact match and F1 where the model has a reader that was trained to answer.

    F1 is None for regular expressions. Raises ValueError for a question that is too long.
    """
    parts.check(questions)
    k = min(max(RECALL_AT), len(parts.model.records))
    rows: list[np.ndarray] = []
    matches: list[bool] = []
    overlaps: list[float | None] = []
    for first in range(0, len(questions), AT_ONCE):
        batch = questions[first : first + AT_ONCE]
        texts = [question.question for question in batch]
        rows.append(parts.model.retrieve(texts, k).indices.numpy())
        if parts.can_read:
            for question, answer in zip(batch, parts.model.answer(texts), strict=True):
                matches.append(question.exact_match(answer.text))
                overlaps.append(question.f1(answer.text))
        report(first + len(batch))
    found = [overlap for overlap in overlaps if overlap is not None]
    recall, gold = recalls(np.concatenate(rows), questions, parts.model.records, parts.store)
    return Evaluation(
        questions=len(questions),
        recall=recall,
        gold=gold,
        exact_match=sum(matches) / len(matches) if matches else None,
        f1=sum(found) / len(found) if found else None,
    )


def evaluate_bm25(store: BlockStore, questions: Sequence[Question]) -> Evaluation:
    """Recall of the library bm25s with its defaults (Lucene's formula, k1 = 1.5, b = 0.75, English stop
    words), over titles and texts. Raises ValueError where it is not installed.
    """
    try:
        import bm25s
    except ImportError as error:
        raise ValueError("BM25 needs the package bm25s, which is not installed") from error
    blocks = (store[row] for row in range(len(store)))
    texts = [f"{block.title_text} {block.text}" for block in blocks]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    asked = bm25s.tokenize([question.question for question in questions], stopwords="en", show_progress=False)
    rows, _ = index.retrieve(asked, k=min(max(RECALL_AT), len(store)), show_progress=False)
    recall, gold = recalls(np.asarray(rows), questions, BlockTexts(store), store)
    return Evaluation(len(questions), recall, gold, None, None)


def recalls(
    rows: np.ndarray, questions: Sequence[Question], records: Sequence[bytes], store: BlockStore | None
) -> tuple[dict[int, float], dict[int, float] | None]:
    """By answer and by document, at every k: rows int64 [B, R] of the records, best first.

    The second is None where a question does not name its document, or no store tells whose block it is.
    """
    answered = {k: 0 for k in RECALL_AT}
    documents = {k: 0 for k in RECALL_AT}
    texts: dict[int, tuple[bytes, str | None]] = {}
    for ranked, question in zip(rows.tolist(), questions, strict=True):
        first_answer = first_document = len(ranked)
        for place, row in enumerate(ranked):
            if row not in texts:
                texts[row] = (records[row], None if store is None else store[row].document_id)
            text, document_id = texts[row]
            if first_answer > place and question.is_answered_by(text):
                first_answer = place
            if first_document > place and document_id == question.document_id:
                first_document = place
        for k in RECALL_AT:
            answered[k] += first_answer < min(k, len(ranked))
            documents[k] += first_document < min(k, len(ranked))
    n = max(len(questions), 1)
    gold = {k: count / n for k, count in documents.items()}
    known = store is not None and all(question.document_id is not None for question in questions)
    return {k: count / n for k, count in answered.items()}, gold if known else None
