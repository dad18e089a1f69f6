"""Every choice of a run, as small dataclasses: one for each part that reads them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

C = TypeVar("C")


@dataclass(frozen=True)
class WorldConfig:
    """How large the world is. `data` names a folder with facts.jsonl and patterns.jsonl; None generates the
    world.
    """

    data: str | None = None
    subjects: int = 400
    facts_per_subject: int = 10
    relations: int = 10
    document_patterns: int = 1
    query_patterns: int = 1
    objects_per_relation: int = 50
    min_objects: int = 5
    one_word_objects: bool = True
    max_name_chars: int = 17
    held_out: float = (
        0.15  # of the subjects; their queries are for evaluation only, their documents are not hidden
    )


@dataclass(frozen=True)
class TextConfig:
    """A corpus of text in the place of the world."""

    directory: str  # a corpus, as `realm-model corpus` writes it
    held_out: float = 0.05  # of the blocks; their sentences are for evaluation only
    # What looks for its block: a sentence, as in ORQA, or a run of wordpieces anywhere in it. There are
    # few sentences in a small corpus, and a retriever learns by heart which block each is of.
    ict: Literal["sentence", "span"] = "sentence"
    ict_wordpieces: int = 0  # of a sentence, from its beginning, or a span; 0: as many as a query may have
    ict_queries: int = 1  # that are drawn from a block at once: a block costs as much as ten of them
    ict_remove: float = 0.9  # the share of them taken out of their block (ORQA)


@dataclass(frozen=True)
class ModelConfig:
    """Two small BERTs, one for the retriever and one for the reader."""

    vocab_size: int = 2000
    hidden: int = 64
    layers: int = 2
    # Of the reader; 0: as the retriever. One layer cannot read: what [MASK] or a word of the document looks
    # for could not depend on the words beside it.
    reader_layers: int = 0
    heads: int = 2
    intermediate: int = 0  # the width of the feed-forward layers; 0: four times `hidden`
    activation: str = "gelu_pytorch_tanh"  # BERT's gelu_new as one fused op
    projection: int = 64  # the width of an embedding
    shared_head: bool = False  # one projection for queries and documents (released), or one for each
    query_length: int = 22  # wordpieces, [CLS] and [SEP] included
    document_length: int = 40
    # f(x, z) is the inner product of two layer-normalised vectors times this. The paper has no factor; with
    # vectors of norm 8 it keeps the softmax over documents soft enough to be moved.
    score_scale: float = 0.125
    dropout: float = 0.0
    # From nothing, begin as a matcher and a copier of words (lexical.py), not at random.
    lexical: bool = False
    # BERT's 0.02 suits a width of 768; at 64 it leaves the Inverse Cloze Task at a fifth of its recall.
    initializer_range: float = 0.1
    # Of the position and segment embeddings. As large as the word embeddings, they take two thirds of what
    # the first LayerNorm passes on, and the retriever is much slower to tell relations apart.
    position_initializer_range: float = 0.01


@dataclass(frozen=True)
class StageConfig:
    """One stage of training: AdamW with linear warm-up and decay."""

    steps: int
    batch: int
    accumulate: int = (
        1  # batches whose gradients are averaged in one step; the ICT's negatives are of one batch
    )
    retriever_lr: float = 0.0  # 0: the retriever is not trained in this stage
    reader_lr: float = 0.0
    warmup: float = 0.1  # of the steps; 0: as released, min(10000, max(100, steps / 10)) steps


@dataclass(frozen=True)
class RealmConfig:
    """What only the REALM stage reads."""

    mode: Literal["sequence", "token"] = "sequence"
    masks: Literal["salient", "token", "span"] = "salient"
    candidates: int = 8  # the null document and the top 7, as in the paper
    # Queries that are sentences of the corpus itself: all of them where it is text. Their document may not be
    # retrieved; as no other of a world states the fact, the null document has something to explain.
    corpus_share: float = 0.0625
    refresh: Literal["async", "fixed_lag"] = "fixed_lag"
    refresh_every: int = 50
    refresh_lag: int = 10  # of a fixed-lag refresh, from snapshot to swap


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Written to config.json of its folder."""

    seed: int = 0
    threads: int = 2
    world: WorldConfig = field(default_factory=WorldConfig)
    text: TextConfig | None = None  # where given, there is no world
    start: str | None = None  # a BERT-like checkpoint that both networks begin as
    bfloat16: bool = False  # forward passes under autocast
    model: ModelConfig = field(default_factory=ModelConfig)
    # A short start: it finds the subject and leaves the relation, which the ICT does not teach, to REALM.
    ict: StageConfig = StageConfig(steps=150, batch=128, retriever_lr=2e-3)
    reader: StageConfig = StageConfig(steps=250, batch=96, reader_lr=2e-3)
    realm: StageConfig = StageConfig(steps=400, batch=32, retriever_lr=7e-4, reader_lr=1e-3, warmup=0.2)
    marginal: RealmConfig = field(default_factory=RealmConfig)
    evaluate_every: int = 100
    checkpoint_every: int = 100


# Generated names are made of few syllables. With more pieces than this every name becomes words of its own,
# and the recall@20 after the Inverse Cloze Task is a third of what it is by their pieces (docs/results.md).
GENERATED_VOCABULARY = 1000


def text_preset(name: str, corpus: str) -> RunConfig:
    """For the corpus of text in a folder: "squad" is small and starts from nothing, as docs/results.md tells;
    "bert" has the lengths and rates of the paper, to start from a checkpoint.
    """
    if name == "squad":
        return RunConfig(
            text=TextConfig(corpus, ict="span", ict_wordpieces=16, ict_queries=4, ict_remove=0.5),
            # One projection for both sides, so that a query lies near the documents that share its words
            # before anything is learned; the error of that is one over the root of its width.
            model=ModelConfig(
                hidden=256,
                layers=1,
                reader_layers=2,
                heads=4,
                intermediate=256,
                projection=256,
                shared_head=True,
                query_length=64,
                document_length=160,
                score_scale=0.1,
                lexical=True,
            ),
            ict=StageConfig(steps=400, batch=256, retriever_lr=1e-3),
            reader=StageConfig(steps=100, batch=48, reader_lr=1e-3),
            realm=StageConfig(steps=150, batch=16, retriever_lr=1e-4, reader_lr=5e-4, warmup=0.2),
            marginal=RealmConfig(corpus_share=1.0),
        )
    if name == "bert":
        return RunConfig(
            text=TextConfig(corpus),
            # The released retriever has no factor; inner products of vectors of norm 11 are one-hot at once.
            model=ModelConfig(
                projection=128, shared_head=True, query_length=96, document_length=304, dropout=0.1
            ),
            ict=StageConfig(steps=100_000, batch=64, retriever_lr=1e-4, warmup=0.0),
            reader=StageConfig(steps=0, batch=1),
            realm=StageConfig(steps=200_000, batch=8, retriever_lr=3e-5, reader_lr=3e-5, warmup=0.0),
            marginal=RealmConfig(corpus_share=1.0, refresh="async", refresh_every=500),
            evaluate_every=1000,
            checkpoint_every=1000,
        )
    raise ValueError(f"preset must be squad or bert, got {name!r}")


def preset(name: str, data: str | None = None) -> RunConfig:
    """The worlds of docs/results.md: "easy" and "hard"; "tiny" is for tests. `data` as in WorldConfig. Of the
    presets for text (text_preset) `data` is the corpus.
    """
    if name in ("squad", "bert"):
        if data is None:
            raise ValueError(f"preset {name} needs the folder of a corpus")
        return text_preset(name, data)
    base = RunConfig(world=WorldConfig(data=data))
    if data is None:
        base = replace(base, model=replace(base.model, vocab_size=GENERATED_VOCABULARY))
    if name == "easy":
        return base
    if name == "hard":
        world = replace(base.world, relations=24, document_patterns=4, query_patterns=4)
        return replace(
            base, world=world, ict=replace(base.ict, steps=400), realm=replace(base.realm, steps=600)
        )
    if name == "tiny":
        world = replace(base.world, subjects=120, facts_per_subject=6, relations=6, objects_per_relation=30)
        return replace(
            base,
            world=world,
            ict=replace(base.ict, steps=120),
            reader=replace(base.reader, steps=200),
            realm=replace(base.realm, steps=100, batch=16),
            marginal=replace(base.marginal, refresh_every=25, refresh_lag=5),
        )
    raise ValueError(f"preset must be easy, hard, tiny, squad or bert, got {name!r}")


def override(config: C, values: dict[str, Any], where: str) -> C:
    """A configuration with `values`, as JSON gives them, in the place of its own; those of a part are an
    object. Raises ValueError naming `where` and the key of the first that is unknown or of another type.
    """
    kinds = get_type_hints(type(config))
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"{where} has no {name!r}: it has {', '.join(kinds)}")
        own, kind = getattr(config, name), kinds[name]
        if is_dataclass(own) and isinstance(value, dict):
            changed[name] = override(own, value, f"{where}: {name}")
        elif is_dataclass(own) or not _is_of(value, kind):
            raise ValueError(f"{where}: {name} must be {_in_words(kind)}, got {value!r}")
        else:
            changed[name] = float(value) if kind is float else value
    return replace(config, **changed)  # type: ignore[type-var]


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if kind is float else kind)


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_in_words(one) for one in get_args(kind))
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(kind, "an object")


def with_masks(config: RunConfig, masks: Literal["salient", "token", "span"]) -> RunConfig:
    """The ablations' masks. The copy start then alternates between them and objects, and is twice as long: so
    it copies objects as often as any other, and the stage after it begins with a reader as good.
    """
    steps = config.reader.steps * (1 if masks == "salient" else 2)
    reader, marginal = replace(config.reader, steps=steps), replace(config.marginal, masks=masks)
    return replace(config, reader=reader, marginal=marginal)


def to_json(config: RunConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> RunConfig:
    """Raises ValueError or TypeError where the text is not the configuration of a run."""
    values: dict[str, Any] = json.loads(text)
    if isinstance(values, dict) and "questions" in values:
        raise ValueError("it is that of a run of fine-tuning")
    parts = {
        "world": WorldConfig,
        "text": TextConfig,
        "model": ModelConfig,
        "ict": StageConfig,
        "reader": StageConfig,
        "realm": StageConfig,
        "marginal": RealmConfig,
    }
    return RunConfig(**{name: parts[name](**v) if name in parts and v else v for name, v in values.items()})


def read_config(run: Path) -> RunConfig:
    """The configuration of a run folder. Raises ValueError where there is none."""
    path = run / "config.json"
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{run} is no run folder: cannot read {path.name}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a run of pre-training: {error}") from error
