"""Where sentences end, and what in them is salient: dates and named entities (section 3.4).

All places are characters of the text, [begin, end).
"""

from __future__ import annotations

import re
from collections.abc import Callable

Span = tuple[int, int]
# What names the entities of a text; dates are found beside it.
Tagger = Callable[[str], list[Span]]

_BORDER = re.compile(r"(?<=[.!?])[\"')\]”’]*\s+|\n+")
# A full stop behind one of these, or behind a single capital, ends no sentence.
_ABBREVIATION = re.compile(
    r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|No|Gen|Col|Lt|Capt|Sgt|Rev|Hon|Gov|Sen|Rep|Mt|Ft|Inc|Ltd|Co|"
    r"Corp|Bros|e\.g|i\.e|cf|ca|c|approx|vol|pp|ed|al))\.$"
)

_MONTH = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December|"
    r"(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.)"
)
_YEAR = r"(?:1\d{3}|20\d{2})"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_DATE = re.compile(
    rf"\b(?:{_MONTH} {_DAY}(?:, {_YEAR})?|{_DAY} (?:of )?{_MONTH}(?:,? {_YEAR})?|{_MONTH},? {_YEAR}"
    rf"|{_YEAR}s?|\d{{1,2}}(?:st|nd|rd|th) century|\d{{1,4}} (?:BCE|BC|AD|CE))(?!\w)"
)

_CAPITAL = "".join(letter for letter in map(chr, range(0x10000)) if letter.isupper())
# One word: initials such as U.S., or a capital and what follows, an apostrophe as O'Brien's first included.
_NAME = rf"(?:(?:[A-Z]\.)+|[{_CAPITAL}][\w&-]*(?:['’][A-Z]\w+)?)"
# Capitalised words in a row; small words may stand between two of them.
_ENTITY = re.compile(
    rf"(?<![\w’']){_NAME}(?: (?:(?:of the|of|the|de la|de|du|la|von|van der|van|&) )?{_NAME})*"
)
# Capitalised because a sentence begins with them, or always; they name nothing.
_FUNCTION_WORDS = """
a after all also although an and another any as at because before both but by despite during each
either even every few first following for from had has have he her here his how however i if in
including instead it its last later like many more most much my neither no not now of often on once
one only or other our over per several she since so some such than that the their them then there
these they this those though three through throughout thus to today two under unlike until upon was
we were what when where whether which while who whose why will with within without would yet you
your
"""
_AMOUNTS = {"CARDINAL", "ORDINAL", "QUANTITY", "PERCENT", "MONEY", "TIME"}  # labels of OntoNotes
_NAMELESS = frozenset(_FUNCTION_WORDS.split())


def sentences(text: str) -> list[Span]:
    """Sentences in reading order, without the white space around them; nothing else is left out."""
    found: list[Span] = []
    begin = 0
    for border in _BORDER.finditer(text):
        rest = text[border.end() : border.end() + 2].lstrip("\"'([“‘")
        if "\n" not in border.group():
            before = text[max(begin, border.start() - 12) : border.start()]
            if _ABBREVIATION.search(before) or not (rest[:1].isupper() or rest[:1].isdigit()):
                continue
        _add(found, text, begin, border.end())
        begin = border.end()
    _add(found, text, begin, len(text))
    return found


def salient_spans(text: str, tagger: Tagger) -> list[Span]:
    """Dates, and the tagger's entities where they are no part of a date; in reading order."""
    found = [match.span() for match in _DATE.finditer(text)]
    found += [span for span in tagger(text) if not any(_overlap(span, date) for date in found)]
    return sorted(set(found))


def capitalised(text: str) -> list[Span]:
    """Named entities by a light rule: runs of capitalised words.

    A single word at the beginning of a sentence is none: what is capitalised there may be any word. Function
    words that begin a run, and single capitals, are left out.
    """
    starts = {begin for begin, _ in sentences(text)}
    found: list[Span] = []
    for match in _ENTITY.finditer(text):
        begin, end = match.span()
        opens = begin in starts or text[max(0, begin - 1) : begin] in ('"', "“", "(") and begin - 1 in starts
        while True:
            word = text[begin:end].split(" ", 1)[0]
            if word.lower() not in _NAMELESS:
                break
            begin, opens = min(end, begin + len(word) + 1), False
        name = text[begin:end].rstrip("-")
        single = " " not in name
        if len(name) > 1 and any(letter.isalpha() for letter in name) and not (opens and single):
            found.append((begin, begin + len(name)))
    return found


def no_entities(text: str) -> list[Span]:
    """Dates alone are salient."""
    return []


def spacy_tagger(model: str) -> Tagger:
    """Named entities by a pipeline of spaCy, but for those that only count or measure, which the paper's
    tagger (CoNLL-2003) does not know. Raises ValueError where it or the pipeline is not installed.
    """
    try:
        import spacy

        pipeline = spacy.load(model)
    except ImportError as error:
        raise ValueError(f"the tagger spacy:{model} needs spaCy, which is not installed") from error
    except OSError as error:
        raise ValueError(f"the tagger spacy:{model} needs that pipeline: {error}".splitlines()[0]) from error
    return lambda text: [
        (entity.start_char, entity.end_char)
        for entity in pipeline(text).ents
        if entity.label_ not in _AMOUNTS
    ]


def tagger_named(name: str) -> Tagger:
    """ "rules", "dates" (no entities) or "spacy:PIPELINE"."""
    if name.startswith("spacy:"):
        return spacy_tagger(name.removeprefix("spacy:"))
    taggers = {"rules": capitalised, "dates": no_entities}
    if name not in taggers:
        raise ValueError(f"tagger must be rules, dates or spacy:PIPELINE, got {name!r}")
    return taggers[name]


def _add(found: list[Span], text: str, begin: int, end: int) -> None:
    sentence = text[begin:end]
    begin += len(sentence) - len(sentence.lstrip())
    end -= len(sentence) - len(sentence.rstrip())
    if begin < end:
        found.append((begin, end))


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]
