"""REALM on text: build a corpus, warm the retriever up, pre-train."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..config import RunConfig, StageConfig
from ..config import preset as preset_named
from .common import ConfigFile, Device, DeviceName, RunFile, Timeout, console, join, one_clear_line, with_file
from .progress import Bars, See, bars
from .training import MaybeMasks, MaybeMode, MaybeRefresh, RefreshRanks, train, with_choices


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
Steps = Annotated[int | None, typer.Option(help="Steps of this stage; else the preset's.")]
Batch = Annotated[int | None, typer.Option(help="Batch of this stage; else the preset's.")]
Accumulate = Annotated[int | None, typer.Option(help="Batches to a step; else the preset's.")]
Bfloat16 = Annotated[bool, typer.Option("--bfloat16", help="Forward passes under autocast.")]
Seed = Annotated[int, typer.Option(help="Draws the held-out blocks, the weights and the batches.")]
Threads = Annotated[int, typer.Option(help="Threads of torch.")]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Write its files beside metrics.jsonl.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Drop what the run folder holds.")]


def corpus(
    files: Annotated[list[Path], typer.Argument(help=".jsonl, .tsv (also .gz) or SQuAD's .json; see below.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    vocabulary: Annotated[
        Path | None, typer.Option(help="A vocab.txt or a checkpoint with one; else learned from the text.")
    ] = None,
    vocabulary_size: Annotated[int, typer.Option(help="Wordpieces of a vocabulary that is learned.")] = 8000,
    block: Annotated[int, typer.Option(help="Wordpieces of a block at most.")] = 288,
    tagger: Annotated[
        str, typer.Option(help="Who finds named entities: rules, dates (dates only), or spacy:PIPELINE.")
    ] = "rules",
    config: ConfigFile = None,
) -> None:
    """Pack documents into blocks of wordpieces, at the borders of sentences, with their salient spans.

    JSON lines hold id, title, text (and spans, characters of the text, in the place of the tagger's); TSV has
    these columns, or those of its header, as psgs_w100.tsv. A bad line is named, and nothing is written.

    Example:

        realm-model corpus paragraphs.jsonl --out wiki --block 128
    """
    with one_clear_line():
        from ..corpus import build_corpus
        from ..corpus.documents import read_files

        with bars(console) as add:
            reading = _Reading(add, files)
            documents = read_files(files, reading.bytes)
            store = build_corpus(documents, out, vocabulary, vocabulary_size, block, tagger, reading.see)
        console.print(
            f"{out}: {len(store)} blocks of {store.num_documents} documents, {len(store.bodies.values)} "
            f"wordpieces, {len(store.salient.values)} salient spans, fingerprint {store.fingerprint[:12]}",
            markup=False,
            soft_wrap=True,
        )


def ict(
    context: typer.Context,
    corpus: Corpus,
    out: RunOut,
    preset: Sizes = Preset.squad,
    start: Start = None,
    steps: Steps = None,
    batch: Batch = None,
    bfloat16: Bfloat16 = False,
    device: DeviceName = Device.auto,
    seed: Seed = 0,
    threads: Threads = 2,
    timeout: Timeout = 1800,
    tensorboard: TensorBoard = False,
    fresh: Fresh = False,
    config: RunFile = None,
) -> None:
    """Warm the retriever up by the Inverse Cloze Task: a sentence looks for the block it was taken from.

    The run folder serves `index` as it is, and `pretrain --from` it leaves this stage out.

    Example:

        realm-model ict --corpus wiki --out ict
    """
    with one_clear_line():
        run = _configure(context, corpus, preset, start, bfloat16, seed, threads)
        run = replace(run, ict=_stage(run.ict, steps, batch))
        train(run, out, join(device, timeout), "ict", tensorboard, fresh)


def pretrain(
    context: typer.Context,
    corpus: Corpus,
    out: RunOut,
    preset: Sizes = Preset.squad,
    start: Start = None,
    steps: Steps = None,
    batch: Batch = None,
    accumulate: Accumulate = None,
    mode: MaybeMode = None,
    masks: MaybeMasks = None,
    refresh: MaybeRefresh = None,
    refresh_ranks: RefreshRanks = 0,
    bfloat16: Bfloat16 = False,
    device: DeviceName = Device.auto,
    seed: Seed = 0,
    threads: Threads = 2,
    timeout: Timeout = 1800,
    tensorboard: TensorBoard = False,
    fresh: Fresh = False,
    config: RunFile = None,
) -> None:
    """Pre-train on text: Inverse Cloze Task (not where --from is a run), copy start of the reader, REALM with
    an index refreshed in the background. --steps, --batch and --accumulate are of the last.

    Writes config.json, metrics.jsonl, checkpoints and plots into the run folder. The same command continues a
    run that was stopped. Under torchrun the ranks share every batch, and --refresh-ranks of them embed the
    documents instead: `torchrun --nproc-per-node 4 -m realm_model pretrain --refresh-ranks 2 ...`

    Example:

        realm-model pretrain --corpus wiki --from ict --out realm
    """
    with one_clear_line():
        run = _configure(context, corpus, preset, start, bfloat16, seed, threads)
        run = with_choices(run, mode, masks, refresh)
        realm = _stage(run.realm, steps, batch)
        run = replace(
            run, realm=replace(realm, accumulate=realm.accumulate if accumulate is None else accumulate)
        )
        train(run, out, join(device, timeout, refresh_ranks), "realm", tensorboard, fresh)


class _Reading:
    """The bars of a corpus: how far the files are read, and, where the first reading learns the vocabulary,
    how many of their documents are packed in the second.
    """

    def __init__(self, add: Bars, files: list[Path]) -> None:
        self.add, self.read, self.documents = add, 0, 0
        self.size = sum(path.stat().st_size for path in files if path.is_file())
        self.stages: dict[str, See] = {}

    def bytes(self, read: int) -> None:
        self.read = read

    def see(self, what: str, documents: int, blocks: int) -> None:
        is_second = what == "blocks" and "vocabulary" in self.stages
        if what not in self.stages:
            if is_second:
                self.stages["vocabulary"](self.read // 1000, f"{self.documents:,} documents")
            sizes = (self.documents, "docs") if is_second else (self.size // 1000, "kB")
            self.stages[what] = self.add(what, *sizes)
        if is_second:
            self.stages[what](documents, f"{blocks:,} blocks")
            return
        self.documents = documents
        learns = what == "vocabulary" and self.read == self.size  # which takes a while
        shown = f"{documents:,} documents" + (", learning" if learns else "")
        self.stages[what](self.read // 1000, shown)


def _configure(
    context: typer.Context,
    corpus: Path,
    name: Preset,
    start: Path | None,
    bfloat16: bool,
    seed: int,
    threads: int,
) -> RunConfig:
    """The preset, what the configuration file says of its parts, the options, and the sizes of --from."""
    config = with_file(context, preset_named(name.value, str(corpus)))
    if config.text is not None:
        config = replace(config, text=replace(config.text, directory=str(corpus)))
    config = replace(config, bfloat16=bfloat16, seed=seed, threads=threads)
    if start is None:
        return config
    from ..start import start_from

    return start_from(config, start)


def _stage(config: StageConfig, steps: int | None, batch: int | None) -> StageConfig:
    steps, batch = (
        own if given is None else given for given, own in ((steps, config.steps), (batch, config.batch))
    )
    return replace(config, steps=steps, batch=batch)
