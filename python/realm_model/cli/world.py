"""A world of facts: pre-train a small REALM on it, evaluate it, ask it."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..config import preset
from .common import (
    ConfigFile,
    Device,
    DeviceName,
    RunFile,
    Timeout,
    console,
    join,
    one_clear_line,
    with_file,
)
from .prompt import ask, readable
from .training import MaybeMasks, MaybeMode, MaybeRefresh, RefreshRanks, train, with_choices

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

RunFolder = Annotated[Path, typer.Option("--run", help="A run folder that `pretrain` wrote.")]


class World(str, Enum):
    easy = "easy"
    hard = "hard"
    tiny = "tiny"


@app.command()
def pretrain(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The run folder; a run that was killed goes on from here.")],
    world: Annotated[World, typer.Option(help="How large the world is.")] = World.easy,
    data: Annotated[
        Path | None, typer.Option(help="A folder with facts.jsonl and patterns.jsonl; else generated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the world, the weights and the batches.")] = 0,
    mode: MaybeMode = None,
    masks: MaybeMasks = None,
    refresh: MaybeRefresh = None,
    refresh_every: Annotated[
        int | None,
        typer.Option(min=1, help="Steps; with more than the run has, the index stays as it began."),
    ] = None,
    frozen_retriever: Annotated[
        bool, typer.Option("--frozen-retriever", help="REALM trains the reader alone: an ablation.")
    ] = False,
    refresh_ranks: RefreshRanks = 0,
    device: DeviceName = Device.auto,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    timeout: Timeout = 1800,
    fresh: Annotated[bool, typer.Option("--fresh", help="Drop what the run folder holds.")] = False,
    config: RunFile = None,
) -> None:
    """Pre-train: Inverse Cloze Task, copy start of the reader, REALM with an index refreshed in the
    background.

    Writes config.json, metrics.jsonl, checkpoints and plots into the run folder. The same command continues a
    run that was stopped.

    Example:

        realm-model world pretrain --out runs/demo --world easy --seed 0
    """
    with one_clear_line():
        run = with_file(context, preset(world.value, None if data is None else str(data)))
        if data is not None:
            run = replace(run, world=replace(run.world, data=str(data)))
        run = with_choices(run, mode, masks, refresh)
        if refresh_every is not None:
            run = replace(run, marginal=replace(run.marginal, refresh_every=refresh_every))
        if frozen_retriever:
            run = replace(run, realm=replace(run.realm, retriever_lr=0.0))
        run = replace(run, seed=seed, threads=threads)
        train(run, out, join(device, timeout, refresh_ranks), fresh=fresh)


@app.command()
def evaluate(run: RunFolder, device: DeviceName = Device.auto, config: ConfigFile = None) -> None:
    """Evaluate the last checkpoint of a run on held-out subjects: print a table, write evaluation.json and
    plots.

    Recall is over all documents; the utility of the top one, and its gain on the prior over the objects, are
    in nats.

    Example:

        realm-model world evaluate --run runs/demo
    """
    with one_clear_line():
        from .. import report
        from ..evaluate import evaluate as evaluate_model
        from ..machine import device_named
        from ..pretrain import load_run
        from ..run_folder import write_whole

        setting, model = load_run(run, device_named(device.value))
        with console.status("evaluating"):
            result = evaluate_model(model, setting.corpus, setting.config.marginal, setting.corpus.held_out)
        write_whole(run / "evaluation.json", json.dumps(result.as_dict(), indent=2) + "\n")
        console.print(report.evaluations_table(report.read_metrics(run), result.as_dict()))
        console.print("plots: " + ", ".join(str(path) for path in report.plot(run)))
        question = report.question_text(setting)
        console.print(
            f'ask it: realm-model world answer "{question}" --run {run}', markup=False, soft_wrap=True
        )


@app.command()
def swap(
    run: RunFolder,
    seed: Annotated[int, typer.Option(help="Draws the new objects.")] = 1,
    device: DeviceName = Device.auto,
    config: ConfigFile = None,
) -> None:
    """Swap the facts of the corpus, make the index again, train nothing: do the answers follow (Appendix C)?

    Prints a table and writes swap.json.

    Example:

        realm-model world swap --run runs/demo
    """
    with one_clear_line():
        from .. import report
        from ..machine import device_named
        from ..pretrain import load_run
        from ..run_folder import write_whole
        from ..swap import corpus_swap

        setting, model = load_run(run, device_named(device.value))
        with console.status("evaluating"):
            swaps = corpus_swap(setting, model, seed)
        values = {
            who: {when: result.as_dict() for when, result in vars(swap).items()}
            for who, swap in swaps.items()
        }
        write_whole(run / "swap.json", json.dumps(values, indent=2) + "\n")
        console.print(report.swap_table(values))


@app.command()
def answer(
    question: Annotated[
        str | None,
        typer.Argument(help="A sentence with [MASK] for the answer. Without one the command is a prompt."),
    ] = None,
    run: RunFolder = Path("runs/demo"),
    device: DeviceName = Device.auto,
    config: ConfigFile = None,
) -> None:
    """Fill the [MASK] of a sentence, and show what each retrieved document was worth for it.

    Utility is log p(y|z,x) - log p(y|null,x). Runs of `realm-model pretrain` on text answer too.

    Example:

        realm-model world answer "Fene Zaband learned [MASK] as a child."
    """
    with one_clear_line():
        from .. import report
        from ..answer import answer as answer_question
        from ..evaluate import build_table
        from ..machine import device_named
        from ..pretrain import load_run

        setting, model = load_run(run, device_named(device.value))
        with console.status("building the index"):
            table = build_table(model, setting.corpus.documents)

        def show(asked: str) -> None:
            console.print(report.answer_table(answer_question(setting, model, table, asked)))

        if question is not None:
            show(readable(question))
        else:
            ask(show)
