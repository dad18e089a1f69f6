"""What the commands that pre-train share, on a world and on text."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.logging import RichHandler

from ..config import RunConfig
from .common import console

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
            sinks = [stack.enter_context(report.progress(console, config))]
            if tensorboard and ranks.rank == 0:
                sinks.append(stack.enter_context(report.tensorboard(out / "tensorboard", config)))
            pretrain(config, out, lambda record: [sink(record) for sink in sinks], last, fresh, machine)
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on from the last checkpoint in {out}")
        raise typer.Exit(130) from None
    if ranks.rank > 0:
        return
    console.print("plots: " + ", ".join(str(path) for path in report.plot(out)))
