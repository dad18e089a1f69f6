"""A world of facts: pre-train a small REALM on it, evaluate it, ask it."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..config import preset
from .common import Device, DeviceName, Timeout, console, join, one_clear_line
from .training import Masks, Mode, Refresh, RefreshRanks, train

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

RunFolder = Annotated[Path, typer.Option("--run", help="A run folder that `pretrain` wrote.")]


class World(str, Enum):
    easy = "easy"
    hard = "hard"
    tiny = "tiny"


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="The run folder; a run that was killed goes on from here.")],
    world: Annotated[World, typer.Option(help="How large the world is.")] = World.easy,
    data: Annotated[
        Path | None, typer.Option(help="A folder with facts.jsonl and patterns.jsonl; else generated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the world, the weights and the batches.")] = 0,
    mode: Annotated[
        Mode, typer.Option(help="The marginal of the paper, or of the released code.")
    ] = Mode.sequence,
    masks: Annotated[Masks, typer.Option(help="Salient spans, or an ablation.")] = Masks.salient,
    refresh: Annotated[
        Refresh, typer.Option(help="Swap the index at a fixed step, or when it is ready.")
    ] = Refresh.fixed_lag,
    refresh_ranks: RefreshRanks = 0,
    device: DeviceName = Device.auto,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
    timeout: Timeout = 1800,
    fresh: Annotated[bool, typer.Option("--fresh", help="Drop what the run folder holds.")] = False,
) -> None:
    """Pre-train: Inverse Cloze Task, copy start of the reader, REALM with an index refreshed in the
    background.

    Writes config.json, metrics.jsonl, checkpoints and plots into the run folder. The same command continues a
    run that was stopped.

    Example: `realm-model world pretrain --out runs/demo --world easy --seed 0`
    """
    base = preset(world.value, None if data is None else str(data))
    config = replace(
        base,
        seed=seed,
        threads=threads,
        marginal=replace(base.marginal, mode=mode.value, masks=masks.value, refresh=refresh.value),
    )
    with one_clear_line():
        train(config, out, join(device, timeout, refresh_ranks), fresh=fresh)


@app.command()
def evaluate(run: RunFolder, device: DeviceName = Device.auto) -> None:
    """Evaluate the last checkpoint of a run on held-out subjects: print a table, write evaluation.json and
    plots.

    Example: `realm-model world evaluate --run runs/demo`
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
) -> None:
    """Swap the facts of the corpus, make the index again, train nothing: do the answers follow (Appendix C)?

    Prints a table and writes swap.json.

    Example: `realm-model world swap --run runs/demo`
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
    question: Annotated[str, typer.Argument(help="A sentence of the world with [MASK] for the answer.")],
    run: RunFolder = Path("runs/demo"),
    device: DeviceName = Device.auto,
) -> None:
    """Fill the [MASK] of a sentence, and show what each retrieved document was worth for it.

    Example: `realm-model world answer "Fene Zaband works as a [MASK]." --run runs/demo`
    """
    with one_clear_line():
        from .. import report
        from ..answer import answer as answer_question
        from ..machine import device_named
        from ..pretrain import load_run

        setting, model = load_run(run, device_named(device.value))
        console.print(report.answer_table(answer_question(setting, model, question)))
