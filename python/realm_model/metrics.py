"""Is it an answer: whether a block holds one, and how well a prediction matches the references.

Normalisation and the regular expressions are those of the released code (language/orqa, eval_utils), F1 is
SQuAD's.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces; Unicode decomposed (NFD)."""
    text = unicodedata.normalize("NFD", text).lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction is one of the references, both normalised.

    >>> exact_match("the Beatles!", ["Beatles", "The Fab Four"])
    True
    """
    return normalize_answer(prediction) in {normalize_answer(reference) for reference in references}


def f1(prediction: str, references: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over normalised words, with the best reference.

    Where one side has no word left the two must both have none, as in SQuAD 2.
    """
    return max(
        (_f1(normalize_answer(prediction).split(), reference) for reference in references), default=0.0
    )


def regex_match(text: str, patterns: Sequence[str], *, anchored: bool = True) -> bool:
    """CuratedTREC: whether a pattern matches at the text's start, or, not anchored, anywhere; nothing is
    normalised.

    Case is ignored and ^ and $ match at each line, as in the released code, where predictions are matched at
    the start, and where a pattern that is no regular expression never matches. Here it is a ValueError: such
    a data set is damaged.
    """
    match = re.match if anchored else re.search
    for pattern in patterns:
        try:
            if match(pattern, text, re.IGNORECASE | re.MULTILINE):
                return True
        except re.error as error:
            raise ValueError(f"regex_match: {pattern!r} is no regular expression: {error}") from error
    return False


def holds_answer(block: bytes, answers: Sequence[str]) -> bool:
    """Whether a block holds an answer, as released: a substring, byte by byte."""
    return any(answer.encode() in block for answer in answers)


def find_answers(ids: Sequence[int], answers: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Where answers stand in a block, as in the port: equal wordpieces; (first, last) of each occurrence.

    An answer without a wordpiece (of control characters, say) stands nowhere.
    """
    found = []
    for answer in filter(None, answers):
        first = 0
        while True:
            try:
                first = ids.index(answer[0], first)
            except ValueError:
                break
            if list(ids[first : first + len(answer)]) == list(answer):
                found.append((first, first + len(answer) - 1))
            first += 1
    return found


def _f1(prediction: list[str], reference: str) -> float:
    words = normalize_answer(reference).split()
    if not prediction or not words:
        return float(prediction == words)
    common = sum((Counter(prediction) & Counter(words)).values())
    return 2 * common / (len(prediction) + len(words))
