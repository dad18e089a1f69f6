"""Open-QA on text: the index of a corpus, fine-tuning, evaluation, answers."""

from __future__ import annotations

import json
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import ConfigFile, Device, DeviceName, Timeout, console, join, one_clear_line
from .progress import bars
from .prompt import ask, readable
from .published import Index

if TYPE_CHECKING:
    from ..openqa.questions import Question

Corpus = Annotated[Path, typer.Option("--corpus", help="A folder that `corpus` wrote.")]
Model = Annotated[
    Path, typer.Option("--model", help="A run folder with an embedder, or a published directory.")
]
IndexFolder = Annotated[Path, typer.Option("--index", help="A folder that `index` wrote.")]
MaybeCorpus = Annotated[
    Path | None,
    typer.Option("--corpus", help="A folder that `corpus` wrote; a fine-tuned run knows its own."),
]
MaybeIndex = Annotated[Path | None, typer.Option("--index", help="A folder that `index` wrote.")]
Questions = Annotated[
    Path, typer.Option("--questions", help="JSON lines (question, answers or answer), or a SQuAD file.")
]
Regex = Annotated[bool, typer.Option("--regex", help="Answers are regular expressions, as CuratedTREC's.")]
Length = Annotated[
    int | None,
    typer.Option(help="Wordpieces of question and block together; else as it was tuned, or 320."),
]
Threads = Annotated[int, typer.Option(help="Threads of torch.")]


class Form(str, Enum):
    released = "released"
    paper = "paper"


class HasAnswer(str, Enum):
    raw = "raw"
    wordpieces = "wordpieces"


class Precision(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


def index(
    corpus: Corpus,
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder of the index; one that is there is replaced whole.")],
    dtype: Annotated[
        Index, typer.Option(help="Dtype of the index's rows; bfloat16 halves it.")
    ] = Index.float32,
    device: DeviceName = Device.auto,
    threads: Threads = 2,
    config: ConfigFile = None,
) -> None:
    """Encode all blocks of a corpus with the embedder of a model.

    The index knows by fingerprint whose it is; another corpus or another model is refused.

    Example:

        realm-model index --corpus wiki --model realm --out index
    """
    with one_clear_line():
        from ..corpus import BlockStore
        from ..machine import device_named, use_threads
        from ..openqa.folder import load_embedder, with_words, words_in
        from ..openqa.index import build_index
        from ..published.conversion import DTYPES

        place = device_named(device.value)
        use_threads(threads)
        store, embedder = BlockStore.open(corpus), load_embedder(model)
        embedder = with_words(embedder, words_in(model, store, embedder.config)).to(place)
        with bars(console) as add:
            see = add("encoding", len(store), "blocks")
            identity = build_index(embedder, store, out, dtype=DTYPES[dtype.value], report=see)
        console.print(
            f"{out}: {len(store)} blocks of corpus {identity.corpus[:12]} by model {identity.model[:12]}",
            markup=False,
            soft_wrap=True,
        )


def split(
    corpus: Corpus,
    questions: Questions,
    out: Annotated[Path, typer.Option(help="The folder for train.jsonl and held_out.jsonl.")],
    articles: Annotated[
        int | None, typer.Option(help="Articles to train on, else three of four; the others are held out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the articles.")] = 0,
    config: ConfigFile = None,
) -> None:
    """Split questions by the article (the title of their document) that they are about.

    No article gives questions to both sides: what is held out was not seen in training.

    Example:

        realm-model split --corpus wiki --questions questions.jsonl --out .
    """
    with one_clear_line():
        from ..corpus import BlockStore
        from ..openqa.questions import read_questions, split_by_article, write_questions

        store = BlockStore.open(corpus)
        blocks = (store[row] for row in range(len(store)))
        titles = {block.document_id: block.title_text for block in blocks}
        sides = split_by_article(list(read_questions(questions)), titles, articles, seed)
        out.mkdir(parents=True, exist_ok=True)
        for name, side in zip(("train", "held_out"), sides, strict=True):
            write_questions(side, out / f"{name}.jsonl")
            console.print(f"{out / name}.jsonl: {len(side)} questions", markup=False, soft_wrap=True)


def finetune(
    corpus: Corpus,
    model: Model,
    index: IndexFolder,
    questions: Questions,
    out: Annotated[Path, typer.Option(help="The run folder; a run that was killed goes on from here.")],
    steps: Annotated[int, typer.Option(help="Of the optimizer.")] = 1000,
    batch: Annotated[int, typer.Option(help="Questions at a time.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches to a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak of the rate; 1e-5 as released.")] = 1e-5,
    form: Annotated[
        Form, typer.Option(help="One softmax over the spans of all blocks, or one for each.")
    ] = Form.released,
    has_answer: Annotated[
        HasAnswer, typer.Option(help="What makes a block answer: its bytes, or the join's wordpieces.")
    ] = HasAnswer.raw,
    searcher_beam: Annotated[int, typer.Option(help="Blocks in the retriever's loss.")] = 5000,
    reader_beam: Annotated[int, typer.Option(help="Blocks that are read.")] = 5,
    length: Annotated[int, typer.Option(help="Of question and block together, in wordpieces.")] = 320,
    precision: Annotated[Precision, typer.Option(help="bfloat16 is autocast.")] = Precision.float32,
    seed: Annotated[int, typer.Option(help="Draws the span head, the batches and dropout.")] = 0,
    device: DeviceName = Device.auto,
    threads: Threads = 2,
    timeout: Timeout = 1800,
    checkpoint_every: Annotated[int, typer.Option(help="Steps.")] = 100,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write its files beside metrics.jsonl.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Drop what the run folder holds.")] = False,
    config: ConfigFile = None,
) -> None:
    r"""Fine-tune the embedder of questions and the reader; the index is fixed.

    Writes config.json, metrics.jsonl, checkpoints and at the end the model and plots into the run folder. The
    same command continues a run that was stopped. Under torchrun the ranks share every batch.

    Example:

        realm-model finetune --corpus wiki --model realm --index index \
            --questions train.jsonl --out tuned --lr 5e-4 --steps 150
    """
    with one_clear_line():
        from ..openqa import report
        from ..openqa.finetune import FinetuneConfig
        from ..openqa.finetune import finetune as run
        from ..ranks import Ranks
        from ..report import tensorboard_of

        place = join(device, timeout).device
        ranks = Ranks.current()
        settings = FinetuneConfig(
            model=str(model),
            corpus=str(corpus),
            index=str(index),
            questions=str(questions),
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            lr=lr,
            form=form.value,
            has_answer=has_answer.value,
            searcher_beam=searcher_beam,
            reader_beam=reader_beam,
            length=length,
            precision=precision.value,
            seed=seed,
            threads=threads,
            checkpoint_every=checkpoint_every,
        )
        try:
            with ExitStack() as stack:
                see = stack.enter_context(bars(console))("fine-tuning", steps, "steps")
                sinks = [lambda record: see(record["step"] + 1, f"loss {record['loss']:.3f}")]
                if tensorboard and ranks.rank == 0:
                    sinks.append(stack.enter_context(tensorboard_of(out / "tensorboard", {"finetune": 0})))
                run(settings, out, lambda record: [sink(record) for sink in sinks], fresh, place)
        except KeyboardInterrupt:
            console.print(f"stopped; the same command goes on from the last checkpoint in {out}")
            raise typer.Exit(130) from None
        if ranks.rank > 0:
            return
        console.print("plots: " + ", ".join(str(path) for path in report.plot(out)))
        console.print(f"ask it: realm-model answer --model {out}", markup=False, soft_wrap=True)


def evaluate(
    model: Model,
    questions: Questions,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    corpus: MaybeCorpus = None,
    index: MaybeIndex = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the row in the table; else the model's folder.")
    ] = None,
    beside: Annotated[
        list[Path] | None, typer.Option(help="JSON files of earlier evaluations, to stand above.")
    ] = None,
    bm25: Annotated[bool, typer.Option("--bm25", help="BM25's recall too (needs bm25s).")] = False,
    regex: Regex = False,
    reader_beam: Annotated[int, typer.Option(help="Blocks that are read.")] = 5,
    length: Length = None,
    device: DeviceName = Device.auto,
    threads: Threads = 2,
    config: ConfigFile = None,
) -> None:
    r"""Recall@1, 5, 20 and 100, and exact match and F1 where the model was fine-tuned: a table and JSON.

    recall@k: one of the top k blocks holds an answer, byte by byte. doc.@k: one of them is of the document
    that the question names.

    Example:

        realm-model evaluate --model tuned --questions held_out.jsonl \
            --bm25 --out tuned.json
    """
    with one_clear_line():
        from ..machine import device_named, use_threads
        from ..openqa import report
        from ..openqa.assemble import Beams, open_openqa
        from ..openqa.evaluate import evaluate as evaluate_model
        from ..openqa.evaluate import evaluate_bm25
        from ..openqa.questions import read_questions
        from ..run_folder import write_whole

        use_threads(threads)
        rows: list[dict[str, Any]] = [row for path in beside or () for row in _read_rows(path)]
        asked: list[Question] = list(read_questions(questions, is_regex=regex))
        if not out.parent.is_dir():
            raise ValueError(f"cannot write {out}: {out.parent} is no folder")
        beams = Beams(reader=reader_beam, length=length)
        parts = open_openqa(model, corpus, index, beams, device_named(device.value))
        own: list[dict[str, Any]] = []
        if bm25:
            if parts.store is None:
                raise ValueError("--bm25 needs --corpus")
            own.append({"name": "BM25", **evaluate_bm25(parts.store, asked).as_dict()})
        with bars(console) as add:
            see = add("answering" if parts.can_read else "retrieving", len(asked), "questions")
            result = evaluate_model(parts, asked, see)
        own.append({"name": name or model.name, **result.as_dict()})
        write_whole(out, json.dumps(own, indent=2) + "\n")
        console.print(report.evaluations_table(rows + own))


def answer(
    question: Annotated[str | None, typer.Argument(help="Without one the command is a prompt.")] = None,
    model: Model = Path("runs/squad/tuned"),
    corpus: MaybeCorpus = None,
    index: MaybeIndex = None,
    reader_beam: Annotated[int, typer.Option(help="Blocks that are read.")] = 5,
    length: Length = None,
    device: DeviceName = Device.auto,
    threads: Threads = 2,
    config: ConfigFile = None,
) -> None:
    """Answer a question and show why: what was read, and what each document was worth for the answer.

    Each has its relevance f(x,z), prior, likelihood and posterior, and its utility,
    log p(y|z,x) - log p(y|x): above 0 it says the answer better than all that was read does.

    Example:

        realm-model answer "Who wrote Hamlet?" --model tuned
    """
    with one_clear_line():
        from ..machine import device_named, use_threads
        from ..openqa import report
        from ..openqa.assemble import Beams, open_openqa

        if not model.exists():
            raise ValueError(f"{model} is not there: name with --model a run that `finetune` wrote")
        use_threads(threads)
        beams = Beams(reader=reader_beam, length=length)
        parts = open_openqa(model, corpus, index, beams, device_named(device.value))
        if not parts.can_read:
            raise ValueError(f"{model} has no reader that was trained to answer: fine-tune it first")

        def show(asked: str) -> None:
            found = parts.model.answer([asked])[0]
            titles = {block.block: parts.title(block.block) for block in found.read}
            console.print(report.answer_view(found, titles))

        if question is not None:
            show(readable(question))
        else:
            ask(show)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        raise ValueError(f"{path} must hold the rows that `evaluate` writes")
    return rows
