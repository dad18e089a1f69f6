"""A world of facts small enough to train from scratch, in which retrieval is the only road to an answer.

A fact is (subject, relation, object). A document states one fact with a document pattern and names the
subject in a filler sentence; a query states the fact with a *different* pattern, and its object will be
masked. Objects are drawn anew for every seed, so no memory of the real world answers a query, and the
document that does is known: recall@k is exact. Each subject also has one document that states nothing (a
distractor).

The names, relations and patterns come from a generator of our own or from a folder with facts.jsonl
(relation, subject, object) and patterns.jsonl (relation, pattern with [X] and [Y]).
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from .config import WorldConfig

SUBJECTS = 3000  # names that are made up; a world draws its own of them
FILLERS = (
    "Little else is told about [X].",
    "Many records in the archive mention [X].",
    "The entry on [X] was revised last year.",
    "Several readers have asked about [X].",
    "More can be found under the name [X].",
    "This note on [X] is kept short.",
)


@dataclass(frozen=True)
class Statement:
    """A sentence, the characters [start, end) of its object, and the number of the fact it states."""

    text: str
    start: int
    end: int
    fact: int


@dataclass(frozen=True)
class Document:
    """Title (the subject) and body: the statement, where the document makes one, then the fillers."""

    title: str
    body: str
    statement: Statement | None


@dataclass(frozen=True)
class Source:
    """What a world is drawn from: subject names, and for each relation its objects and its patterns."""

    subjects: list[str]
    objects: dict[str, list[str]]
    patterns: dict[str, list[str]]


@dataclass(frozen=True)
class World:
    """Fact i is stated by document i; the distractors follow. Queries of held-out subjects are for
    evaluation.
    """

    documents: list[Document]
    train_queries: list[Statement]
    held_out_queries: list[Statement]
    object_words: list[str]
    objects: list[list[str]]  # of each fact: those of its relation, of which its own is one

    @property
    def num_facts(self) -> int:
        return len(self.objects)

    @property
    def objects_per_fact(self) -> list[int]:
        return [len(names) for names in self.objects]


def load_source(folder: Path) -> Source:
    """Names, objects and patterns of a folder with facts.jsonl (subject, relation, object) and patterns.jsonl
    (relation, pattern with [X] for the subject and [Y] for the object).
    """
    facts, patterns = _read_jsonl(folder / "facts.jsonl"), _read_jsonl(folder / "patterns.jsonl")
    objects: dict[str, Counter[str]] = defaultdict(Counter)
    for fact in facts:
        objects[fact["relation"]][fact["object"]] += 1
    by_relation: dict[str, list[str]] = defaultdict(list)
    for line in patterns:
        by_relation[line["relation"]].append(line["pattern"])
    subjects = sorted({fact["subject"] for fact in facts})
    # The most frequent objects first: a world keeps the head of this list.
    ordered = {
        relation: sorted(count, key=lambda name: (-count[name], name)) for relation, count in objects.items()
    }
    return Source(subjects, ordered, dict(by_relation))


def generate_source() -> Source:
    """Names, objects and patterns made here; the same ones every time, as a world has its own seed."""
    data = json.loads(resources.files("realm_model").joinpath("generated.json").read_text(encoding="utf-8"))
    rng = random.Random(0)

    def word() -> str:
        syllables = rng.choices(data["name_syllables"], k=rng.choice((1, 2, 2)))
        return ("".join(syllables) + rng.choice(data["name_endings"])).capitalize()

    names: dict[str, None] = {}
    while len(names) < SUBJECTS:
        names[f"{word()} {word()}"] = None
    objects = {relation: data["pools"][pool] for relation, (pool, _) in data["relations"].items()}
    patterns = {relation: list(lines) for relation, (_, lines) in data["relations"].items()}
    return Source(sorted(names), objects, patterns)


def draw_world(source: Source, config: WorldConfig, seed: int) -> World:
    """Draw subjects, relations, patterns and objects. Raises ValueError where the source is too small."""
    rng = random.Random(seed)
    relations = _choose_relations(source, config, rng)
    subjects = _choose_subjects(source, config, rng)
    held_out = set(rng.sample(range(len(subjects)), round(config.held_out * len(subjects))))

    documents: list[Document] = []
    train: list[Statement] = []
    evaluation: list[Statement] = []
    objects: list[list[str]] = []
    for number, subject in enumerate(subjects):
        for relation in rng.sample(relations, config.facts_per_subject):
            fact = len(objects)
            name = rng.choice(relation.objects)
            objects.append(relation.objects)
            statement = _state(rng.choice(relation.document_patterns), subject, name, fact)
            body = f"{statement.text} {_fill(rng, subject)}"
            documents.append(Document(subject, body, statement))
            queries = [_state(pattern, subject, name, fact) for pattern in relation.query_patterns]
            if number in held_out:
                evaluation.append(rng.choice(queries))
            else:
                train.extend(queries)
    for subject in subjects:
        body = f"{_fill(rng, subject)} {_fill(rng, subject)}"
        documents.append(Document(subject, body, None))
    words = sorted({name for relation in relations for name in relation.objects})
    return World(documents, train, evaluation, words, objects)


def swap_objects(world: World, seed: int) -> World:
    """Another object for every fact, drawn from its relation's by the seed, in documents and queries alike:
    the corpus swap of Appendix C. Nothing else changes.
    """
    rng = random.Random(seed)
    said = {d.statement.fact: d.statement for d in world.documents if d.statement is not None}
    new = []
    for fact, names in enumerate(world.objects):
        own = said[fact].text[said[fact].start : said[fact].end]
        new.append(rng.choice([name for name in names if name != own]))

    def restate(old: Statement) -> Statement:
        text = f"{old.text[: old.start]}{new[old.fact]}{old.text[old.end :]}"
        return Statement(text, old.start, old.start + len(new[old.fact]), old.fact)

    documents = []
    for document in world.documents:
        statement = document.statement
        if statement is not None:
            body = restate(statement).text + document.body[len(statement.text) :]
            document = Document(document.title, body, restate(statement))
        documents.append(document)
    train, held_out = ([restate(q) for q in part] for part in (world.train_queries, world.held_out_queries))
    return World(documents, train, held_out, world.object_words, world.objects)


@dataclass(frozen=True)
class _Relation:
    objects: list[str]
    document_patterns: list[str]
    query_patterns: list[str]


def _choose_relations(source: Source, config: WorldConfig, rng: random.Random) -> list[_Relation]:
    """Relations with enough objects and patterns; each relation's patterns are dealt to documents and
    queries.
    """
    shared = Counter(pattern for patterns in source.patterns.values() for pattern in _distinct(patterns))
    eligible: list[_Relation] = []
    for relation in sorted(source.patterns):
        # A pattern of two relations does not say which of them it states.
        patterns = [p for p in _distinct(source.patterns[relation]) if shared[p] == 1]
        objects = [name for name in source.objects.get(relation, ()) if _is_object(name, config)]
        objects = objects[: config.objects_per_relation]
        if len(patterns) < 2 or len(objects) < config.min_objects:
            continue
        rng.shuffle(patterns)
        in_documents = min(config.document_patterns, len(patterns) // 2)
        in_queries = patterns[in_documents : in_documents + config.query_patterns]
        eligible.append(_Relation(objects, patterns[:in_documents], in_queries))
    if len(eligible) < config.relations:
        raise ValueError(
            f"the world wants {config.relations} relations with two patterns of their own and "
            f"{config.min_objects} objects, the source has {len(eligible)}"
        )
    return rng.sample(eligible, config.relations)


def _choose_subjects(source: Source, config: WorldConfig, rng: random.Random) -> list[str]:
    names = [name for name in source.subjects if len(name) <= config.max_name_chars]
    if len(names) < config.subjects:
        raise ValueError(
            f"the world wants {config.subjects} subjects of at most {config.max_name_chars} characters, "
            f"the source has {len(names)}"
        )
    return rng.sample(names, config.subjects)


def _is_object(name: str, config: WorldConfig) -> bool:
    return name.isalpha() if config.one_word_objects else True


def _distinct(patterns: list[str]) -> list[str]:
    """Patterns that differ in more than case, spaces and the closing stop."""
    return list(
        dict.fromkeys(" ".join(p.strip(" .,").split()) + "." for p in patterns if p.count("[Y]") == 1)
    )


def _state(pattern: str, subject: str, name: str, fact: int) -> Statement:
    before, after = pattern.replace("[X]", subject).split("[Y]")
    return Statement(f"{before}{name}{after}", len(before), len(before) + len(name), fact)


def _fill(rng: random.Random, subject: str) -> str:
    return rng.choice(FILLERS).replace("[X]", subject)


def _read_jsonl(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON lines: {error}") from error
