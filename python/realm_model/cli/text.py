"""REALM on text: build a corpus, warm the retriever up, pre-train."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from ..config import RunConfig, StageConfig, with_masks
from ..config import preset as preset_named
from .common import ConfigFile, console, one_clear_line
from .training import Masks, Mode, Refresh, drop_run, train


class Preset(str, Enum):
    squad = "squad"
    bert = "bert"


Corpus = Annotated[Path, typer.Option("--corpus", help="A folder that `corpus` wrote.")]
RunOut = Annotated[
    Path, typer.Option("--out", help="The run folder; a run that was killed goes on from here.")
]
Sizes = Annotated[
    Preset, typer.Option("--preset", help="squad: small, from nothing. bert: the paper's, for --from.")
]
Start = Annotated[
    Path | None,
    typer.Option("--from", help="What both networks begin as: a BERT-like checkpoint, or a run folder."),
]
Steps = Annotated[int | None, typer.Option(help="Of this stage, in the place of the preset's.")]
Batch = Annotated[int | None, typer.Option(help="Of this stage, in the place of the preset's.")]
Accumulate = Annotated[int, typer.Option(help="Batches to a step.")]
Bfloat16 = Annotated[bool, typer.Option("--bfloat16", help="Forward passes under autocast.")]
Seed = Annotated[int, typer.Option(help="Draws the held-out blocks, the weights and the batches.")]
Threads = Annotated[int, typer.Option(help="Of torch.")]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Write its files beside metrics.jsonl.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Drop what the run folder holds.")]


def corpus(
    files: Annotated[list[Path], typer.Argument(help=".jsonl, .tsv or SQuAD's .json; see below.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    vocabulary: Annotated[
        Path | None, typer.Option(help="A vocab.txt or a checkpoint with one; else learned from the text.")
    ] = None,
    vocabulary_size: Annotated[int, typer.Option(help="Of a vocabulary that is learned.")] = 8000,
    block: Annotated[int, typer.Option(help="Wordpieces of a block at most.")] = 288,
    tagger: Annotated[
        str, typer.Option(help="Of named entities: rules, dates (none), or spacy:PIPELINE.")
    ] = "rules",
    config: ConfigFile = None,
) -> None:
    """Pack documents into blocks of wordpieces, at the borders of sentences, with their salient spans.

    JSON lines hold id, title, text (and spans, characters of the text, in the place of the tagger's); TSV has
    these columns, or those of its header, as psgs_w100.tsv. A bad line is named, and nothing is written.

    Example: `realm-model corpus paragraphs.jsonl --out runs/squad/corpus --block 128`
    """
    with one_clear_line():
        from ..corpus import build_corpus, read_documents

        columns = (TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, refresh_per_second=4) as bars:
            task = bars.add_task("reading", total=None)

            def see(what: str, documents: int, blocks: int) -> None:
                speed = documents / max(bars.tasks[task].elapsed or 0, 1e-3)
                shown = f"{what}: {documents:,} documents, {blocks:,} blocks, {speed:,.0f} documents/s"
                bars.update(task, description=shown)

            documents = (document for path in files for document in read_documents(path))
            store = build_corpus(documents, out, vocabulary, vocabulary_size, block, tagger, see)
        console.print(
            f"{out}: {len(store)} blocks of {store.num_documents} documents, {len(store.bodies.values)} "
            f"wordpieces, {len(store.salient.values)} salient spans, fingerprint {store.fingerprint[:12]}",
            markup=False,
            soft_wrap=True,
        )


def ict(
    corpus: Corpus,
    out: RunOut,
    preset: Sizes = Preset.squad,
    start: Start = None,
    steps: Steps = None,
    batch: Batch = None,
    bfloat16: Bfloat16 = False,
    seed: Seed = 0,
    threads: Threads = 2,
    tensorboard: TensorBoard = False,
    fresh: Fresh = False,
    config: ConfigFile = None,
) -> None:
    """Warm the retriever up by the Inverse Cloze Task: a sentence looks for the block it was taken from.

    The run folder serves `index` as it is, and `pretrain --from` it leaves this stage out.

    Example: `realm-model ict --corpus runs/squad/corpus --out runs/squad/ict`
    """
    with one_clear_line():
        run = _configure(corpus, preset, start, bfloat16, seed, threads)
        run = replace(run, ict=_stage(run.ict, steps, batch))
        if fresh:
            drop_run(out)
        train(run, out, last="ict", tensorboard=tensorboard)


def pretrain(
    corpus: Corpus,
    out: RunOut,
    preset: Sizes = Preset.squad,
    start: Start = None,
    steps: Steps = None,
    batch: Batch = None,
    accumulate: Accumulate = 1,
    mode: Annotated[
        Mode, typer.Option(help="The marginal of the paper, or of the released code.")
    ] = Mode.sequence,
    masks: Annotated[Masks, typer.Option(help="Salient spans, or an ablation.")] = Masks.salient,
    refresh: Annotated[
        Refresh | None, typer.Option(help="Swap the index at a fixed step, or when it is ready.")
    ] = None,
    bfloat16: Bfloat16 = False,
    seed: Seed = 0,
    threads: Threads = 2,
    tensorboard: TensorBoard = False,
    fresh: Fresh = False,
    config: ConfigFile = None,
) -> None:
    """Pre-train on text: Inverse Cloze Task (not where --from is a run), copy start of the reader, REALM with
    an index refreshed in the background. --steps, --batch and --accumulate are of the last.

    Writes config.json, metrics.jsonl, checkpoints and plots into the run folder. The same command continues a
    run that was stopped.

    Example: `realm-model pretrain --corpus runs/squad/corpus --out runs/squad/realm`
    """
    with one_clear_line():
        run = with_masks(_configure(corpus, preset, start, bfloat16, seed, threads), masks.value)
        marginal = replace(run.marginal, mode=mode.value)
        if refresh is not None:
            marginal = replace(marginal, refresh=refresh.value)
        realm = replace(_stage(run.realm, steps, batch), accumulate=accumulate)
        if fresh:
            drop_run(out)
        train(replace(run, marginal=marginal, realm=realm), out, tensorboard=tensorboard)


def _configure(
    corpus: Path, name: Preset, start: Path | None, bfloat16: bool, seed: int, threads: int
) -> RunConfig:
    config = replace(preset_named(name.value, str(corpus)), bfloat16=bfloat16, seed=seed, threads=threads)
    if start is None:
        return config
    from ..start import start_from

    return start_from(config, start)


def _stage(config: StageConfig, steps: int | None, batch: int | None) -> StageConfig:
    return replace(config, steps=steps or config.steps, batch=batch or config.batch)
