"""Question sets from files, and their split by article. Every error names the file and the line.

    JSON lines   {"question": ..., "answers": [...]} a line, or "answer" as NQ-open has it; "id" and
                 "paragraph", the id of the document that holds the answer, where they are known
    .json        {"data": [{"title": ..., "paragraphs": [{"context": ..., "qas": [...]}]}]}, as SQuAD's

CuratedTREC's answers are regular expressions in files of the first form; nothing in a file says so, the
caller does.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..corpus.documents import read_lines, require_unicode
from ..metrics import exact_match, f1, holds_answer, regex_match


@dataclass(frozen=True)
class Question:
    """document_id: of the document that holds the answer, None where nobody knows it. is_regex: the answers
    are regular expressions.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    document_id: str | None = None
    is_regex: bool = False

    def exact_match(self, prediction: str) -> bool:
        """After SQuAD's normalisation; a regular expression as the released code matches one."""
        judge = regex_match if self.is_regex else exact_match
        return judge(prediction, self.answers)

    def regex_found(self, prediction: str) -> bool | None:
        """Whether a regular expression is found anywhere in the prediction; None for other answers."""
        return regex_match(prediction, self.answers, anchored=False) if self.is_regex else None

    def f1(self, prediction: str) -> float | None:
        """None for regular expressions, which have no words to share."""
        return None if self.is_regex else f1(prediction, self.answers)

    def is_answered_by(self, block: bytes) -> bool:
        """Whether a block holds an answer: byte by byte, as released; a regular expression anywhere."""
        if not self.is_regex:
            return holds_answer(block, self.answers)
        return regex_match(block.decode("utf-8", "replace"), self.answers, anchored=False)


def read_questions(path: str | Path, *, is_regex: bool = False) -> Iterator[Question]:
    """The questions of a file, one at a time. SQuAD 2's questions without an answer are left out.

    Raises ValueError, naming the file and the line (or SQuAD's question), for a file that cannot be read,
    what is not JSON in UTF-8, a question or an answer that lacks or is empty, an id that comes twice, and a
    regular expression that is none.
    """
    path = Path(path)
    seen: set[str] = set()
    try:
        for question, where in _read_squad(path) if path.suffix == ".json" else _read_jsonl(path):
            if question.id in seen:
                raise ValueError(f"{where}: id {question.id!r} comes twice")
            seen.add(question.id)
            if is_regex:
                question = _as_regex(question, where)
            yield question
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    if not seen:
        raise ValueError(f"{path} holds no question")


def write_questions(questions: Iterable[Question], path: Path) -> None:
    """As JSON lines that read_questions reads."""
    with path.open("w", encoding="utf-8") as file:
        for question in questions:
            values = asdict(question)
            record = {"id": values["id"], "question": values["question"], "answers": values["answers"]}
            if question.document_id is not None:
                record["paragraph"] = question.document_id
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def split_by_article(
    questions: Sequence[Question], titles: dict[str, str], articles: int | None, seed: int
) -> tuple[list[Question], list[Question]]:
    """Questions about `articles` articles drawn by the seed, and those about the others.

    articles: None for three of four.
    titles: of the documents, by id.

    No article gives questions to both sides, so none of the held-out ones was seen in training. Raises
    ValueError for a question without a known document, and where `articles` leaves no article for one of the
    sides.
    """
    article = {}
    for question in questions:
        if question.document_id not in titles:
            raise ValueError(
                f"split_by_article: each question must name a document of the corpus, question "
                f"{question.id!r} names {question.document_id!r}"
            )
        article[question.id] = titles[question.document_id]
    names = sorted(set(article.values()))
    if len(names) < 2:
        raise ValueError(
            f"split_by_article: the questions must be about two articles or more, got {', '.join(names)}"
        )
    articles = max(1, len(names) * 3 // 4) if articles is None else articles
    if not 0 < articles < len(names):
        raise ValueError(
            f"split_by_article: articles must be in [1, {len(names) - 1}], as the questions are about "
            f"{len(names)} articles, got {articles}"
        )
    chosen = set(random.Random(seed).sample(names, articles))
    sides: tuple[list[Question], list[Question]] = ([], [])
    for question in questions:
        sides[article[question.id] not in chosen].append(question)
    return sides


def _read_jsonl(path: Path) -> Iterator[tuple[Question, str]]:
    for number, (line, where) in enumerate(read_lines(path)):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: must be JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: must be an object with question and answers, got {line[:40]!r}")
        given = record.get("id", number)
        answers = record.get("answers", record.get("answer"))
        yield _question(given, record.get("question"), answers, record.get("paragraph"), where), where


def _read_squad(path: Path) -> Iterator[tuple[Question, str]]:
    try:
        articles = json.loads(path.read_bytes().decode("utf-8"))["data"]
        for article in articles:
            title = article["title"].replace("_", " ")
            for number, paragraph in enumerate(article["paragraphs"]):
                for qa in paragraph["qas"]:
                    if qa.get("is_impossible"):
                        continue
                    # SQuAD repeats an answer that several people gave.
                    answers = list(dict.fromkeys(answer["text"] for answer in qa["answers"]))
                    where = f"{path}, question {qa['id']}"
                    yield _question(qa["id"], qa["question"], answers, f"{title}#{number}", where), where
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: must be JSON in UTF-8: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: must be SQuAD's data, title, paragraphs, qas, id, question, answers: {error!r}"
        ) from error


def _question(given: Any, question: Any, answers: Any, document_id: Any, where: str) -> Question:
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: question must be a text that is not empty, got {question!r}")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"{where}: answers must be a list of texts, got {answers!r}")
    for answer in answers:
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"{where}: an answer must be a text that is not empty, got {answer!r}")
    for name, text in (("question", question), *(("answers", answer) for answer in answers)):
        require_unicode(text, name, where)
    if document_id is not None and not isinstance(document_id, str):
        raise ValueError(f"{where}: paragraph must be the id of a document, got {document_id!r}")
    return Question(str(given), question, tuple(answers), document_id)


def _as_regex(question: Question, where: str) -> Question:
    for pattern in question.answers:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{where}: {pattern!r} is no regular expression: {error}") from error
    return Question(question.id, question.question, question.answers, question.document_id, is_regex=True)
