"""What the commands that pre-train share, on a world and on text."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.logging import RichHandler

from ..config import RunConfig, with_masks
from .common import console
from .progress import Bars, See, bars

if TYPE_CHECKING:
    from ..machine import Machine


class Mode(str, Enum):
    sequence = "sequence"
    token = "token"


class Masks(str, Enum):
    salient = "salient"
    token = "token"
    span = "span"


class Refresh(str, Enum):
    fixed_lag = "fixed_lag"
    asynchronous = "async"


RefreshRanks = Annotated[
    int, typer.Option(help="Ranks of the torchrun job, its last ones, that embed documents and do not train.")
]


# None leaves what the preset or the configuration file says.
MaybeMode = Annotated[
    Mode | None, typer.Option(help="The marginal of the paper (the default), or of the released code.")
]
MaybeMasks = Annotated[Masks | None, typer.Option(help="Salient spans (the default), or an ablation.")]
MaybeRefresh = Annotated[
    Refresh | None, typer.Option(help="Swap the index at a fixed step, or when it is ready.")
]


def with_choices(
    config: RunConfig, mode: Mode | None, masks: Masks | None, refresh: Refresh | None
) -> RunConfig:
    given = {"mode": mode, "refresh": refresh}
    chosen = {name: choice.value for name, choice in given.items() if choice is not None}
    config = replace(config, marginal=replace(config.marginal, **chosen))
    return config if masks is None else with_masks(config, masks.value)


def train(
    config: RunConfig,
    out: Path,
    machine: Machine,
    last: str = "realm",
    tensorboard: bool = False,
    fresh: bool = False,
) -> None:
    """Pre-train into a run folder up to stage `last`, with progress; write the plots."""
    from .. import report
    from ..pretrain import pretrain
    from ..ranks import Ranks

    ranks = Ranks.current()
    # A refresh that fails is the refresher's to log; the run goes on with the index it has.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    try:
        with ExitStack() as stack:
            sinks = [_progress(stack.enter_context(bars(console)), config)]
            if tensorboard and ranks.rank == 0:
                sinks.append(stack.enter_context(report.tensorboard(out / "tensorboard", config)))
            pretrain(config, out, lambda record: [sink(record) for sink in sinks], last, fresh, machine)
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on from the last checkpoint in {out}")
        raise typer.Exit(130) from None
    if ranks.rank > 0:
        return
    console.print("plots: " + ", ".join(str(path) for path in report.plot(out)))


def _progress(add: Bars, config: RunConfig) -> Callable[[dict[str, Any]], None]:
    """A bar for each stage with its loss and the age of the index; a line for each evaluation."""
    from ..pretrain import STAGES, stage_steps
    from ..report import SMOOTHING, STAGE_TITLES

    steps = dict(zip(STAGES, stage_steps(config), strict=True))
    stages: dict[str, See] = {}
    losses: dict[str, float] = {}

    def see(record: dict[str, Any]) -> None:
        stage = record["stage"]
        if stage not in stages:
            stages[stage] = add(STAGE_TITLES[stage], steps[stage], "steps")
        if "evaluation" in record:
            title, values = STAGE_TITLES[stage], record["evaluation"]
            console.print(
                f"{title:<14} {record['step']:>5}  recall@1 {values['recall@1']:.3f}  @5 "
                f"{values['recall@5']:.3f}  @20 {values['recall@20']:.3f}  utility {values['utility']:.2f}  "
                f"accuracy {values['accuracy']:.3f}",
                soft_wrap=True,
            )
            return
        loss = record["loss"]
        losses[stage] = SMOOTHING * losses.get(stage, loss) + (1 - SMOOTHING) * loss
        age = f"  age {record['age']}" if "age" in record else ""
        stages[stage](record["step"] + 1, f"loss {losses[stage]:.3f}{age}")

    return see
