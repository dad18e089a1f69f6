"""What a run shows: tables, plots, TensorBoard."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table
from rich.text import Text

from .answer import Answer
from .config import RunConfig
from .inputs import CLS, PAD, SEP
from .masking import mask_statements
from .pretrain import STAGES, Setting, stage_steps

SMOOTHING = 0.95  # of the loss that is shown
AROUND = 80  # characters of a document that are shown on either side of the answer
STAGE_TITLES = {"ict": "ICT warm start", "reader": "copy start", "realm": "REALM"}
COLUMNS = {
    "recall@1": "recall@1",
    "recall@5": "recall@5",
    "recall@20": "recall@20",
    "utility": "utility",
    "gain": "gain",
    "accuracy": "accuracy",
    "log_marginal": "log p",
}

Record = dict[str, Any]


def tensorboard(folder: Path, config: RunConfig) -> AbstractContextManager[Callable[[Record], None]]:
    """Every number of every record of pre-training, by the step of the whole run."""
    before = zip(STAGES, accumulate((0, *stage_steps(config))), strict=False)
    return tensorboard_of(folder, dict(before))


@contextmanager
def tensorboard_of(folder: Path, before: dict[str, int]) -> Iterator[Callable[[Record], None]]:
    """Every number of every record; before: the steps before each stage. What is redone goes first."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "TensorBoard's files need the package tensorboard, which is not installed"
        ) from error
    writers: list[Any] = []

    def see(record: Record) -> None:
        step = before[record["stage"]] + record["step"]
        if not writers:
            writers.append(SummaryWriter(str(folder), purge_step=step))
        values = record.get("evaluation", record)
        group = "held_out" if "evaluation" in record else record["stage"]
        for name, value in values.items():
            if name not in ("stage", "step") and isinstance(value, int | float):
                writers[0].add_scalar(f"{group}/{name}", value, step)

    try:
        yield see
    finally:
        for writer in writers:
            writer.close()


def evaluations_table(records: list[Record], final: dict[str, float]) -> Table:
    """After the warm starts, and now; evaluate.Evaluation explains the columns."""
    table = Table(title="held-out statements, over all documents", title_justify="left", padding=(0, 0))
    table.add_column("model", no_wrap=True)
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    last = {record["stage"]: record["evaluation"] for record in records if "evaluation" in record}
    for stage in ("ict", "reader"):
        if stage in last:
            table.add_row(STAGE_TITLES[stage], *_cells(last[stage]))
    table.add_row("now", *_cells(final), style="bold")
    return table


def swap_table(swaps: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Of swap.Swap by kind of query, as dicts."""
    table = Table(title="accuracy when the facts of the corpus are swapped", title_justify="left")
    for title in ("queries", "before", "after: the new object", "after: the old object", "recall@5 after"):
        table.add_column(title, justify="left" if title == "queries" else "right")
    for who, swap in swaps.items():
        values = [swap[when]["accuracy"] for when in ("before", "follows", "stays")]
        table.add_row(who, *(f"{value:.3f}" for value in (*values, swap["follows"]["recall@5"])))
    return table


def answer_table(answer: Answer) -> Table:
    title = f'answer: "{answer.text}"   log p(y|x) = {answer.log_marginal:.3f}'
    table = Table(title=title, title_justify="left")
    for name, justify in (("document", "left"), ("p(z|x)", "right"), ("p(y|z,x)", "right")):
        table.add_column(name, justify=justify)
    table.add_column("p(z|x,y)", justify="right")
    table.add_column("utility", justify="right")
    for candidate in answer.candidates:
        is_null = not candidate.title and not candidate.body
        words = rf"(?<!\w){re.escape(answer.text)}(?!\w)"
        places = [found.span() for found in re.finditer(words, candidate.body, re.IGNORECASE)]
        name = Text("(null document)") if is_null else excerpt(candidate.title, candidate.body, places)
        shares = (candidate.prior, candidate.likelihood, candidate.posterior)
        table.add_row(name, *map(share, shares), f"{candidate.utility:.2f}")
    return table


def share(value: float) -> str:
    """A probability: three digits of those that are not tiny, 0 where it is nothing at all."""
    return f"{value:.3f}" if value >= 5e-4 else f"{value:.0e}" if value > 0 else "0"


def excerpt(title: str, text: str, places: Sequence[tuple[int, int]] = (), around: int = AROUND) -> Text:
    """The title and the part of a text around the first of the places, [start, end) each, all marked."""
    first = places[0][0] if places else 0
    last = places[0][1] if places else first + around
    start, end = max(0, first - around), min(len(text), last + around)
    # Cut between words, where there are any.
    start = text.find(" ", start, first) + 1 or start if start > 0 else 0
    end = max(text.rfind(" ", 0, end + 1), last) if end < len(text) else end
    view = Text.assemble((title, "bold"), ": " if title else "")
    offset = len(view) + (3 if start > 0 else 0) - start
    view.append("..." if start > 0 else "").append(text[start:end]).append("..." if end < len(text) else "")
    for begin, stop in places:
        if start <= begin and stop <= end:
            view.stylize("bold reverse", begin + offset, stop + offset)
    return view


def question_text(setting: Setting) -> str:
    """The first held-out statement, masked."""
    ids, _, _ = mask_statements(setting.corpus.held_out[torch.tensor([0])], "salient", torch.Generator())
    words = [i for i in ids[0].tolist() if i not in (CLS, SEP, PAD)]
    return setting.tokenizer.decode(words, skip_special_tokens=False)


def read_metrics(run: Path) -> list[Record]:
    """The lines of metrics.jsonl; a last line that a kill cut short is left out."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def plot(run: Path) -> list[Path]:
    """loss.png, recall.png and utility.png of a run folder."""
    records = read_metrics(run)
    ends = _stage_ends(records)
    losses: dict[str, tuple[list[float], list[float]]] = {}
    curves: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for record in records:
        stage, at = record["stage"], ends[record["stage"]] + record["step"]
        if "evaluation" in record:
            for name, value in record["evaluation"].items():
                curves[name][0].append(at)
                curves[name][1].append(value)
        else:
            xs, ys = losses.setdefault(STAGE_TITLES[stage], ([], []))
            xs.append(at)
            ys.append(SMOOTHING * ys[-1] + (1 - SMOOTHING) * record["loss"] if ys else record["loss"])
    recalls = {name: curves[name] for name in ("recall@1", "recall@5", "recall@20")}
    utilities = {COLUMNS[name]: curves[name] for name in ("utility", "gain") if name in curves}
    return [
        draw(run / "loss.png", "loss, smoothed", losses, ends),
        draw(run / "recall.png", "recall on held-out statements", recalls, ends, is_share=True),
        draw(run / "utility.png", "nats", utilities, ends),
    ]


def _stage_ends(records: list[Record]) -> dict[str, int]:
    """The number of steps before each stage."""
    before: dict[str, int] = {}
    total = 0
    for stage in STAGE_TITLES:
        before[stage] = total
        total += max((record["step"] for record in records if record["stage"] == stage), default=0)
    return before


def draw(
    path: Path,
    title: str,
    curves: dict[str, tuple[list[float], list[float]]],
    ends: dict[str, int],
    is_share: bool = False,
) -> Path:
    """A PNG of curves by step; a line where each stage begins, by its number of steps before. The axis of a
    share goes from 0 to 1.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    # Of curves that lie on each other, the markers of the lower ones look out.
    for (name, (xs, ys)), size in zip(curves.items(), cycle((8, 5, 3)), strict=False):
        axes.plot(xs, ys, label=name, marker="o" if len(xs) < 30 else None, markersize=size)
    for stage, start in ends.items():
        if start > 0:
            axes.axvline(start, color="0.8", linewidth=1, zorder=0)
            axes.annotate(
                f" {STAGE_TITLES[stage]}", (start, 1), xycoords=("data", "axes fraction"),
                ha="left", va="bottom", color="0.4", fontsize="small",
            )  # fmt: skip
    if is_share:
        axes.set_ylim(-0.02, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="0.93")
    axes.set_axisbelow(True)
    axes.set_xlabel("step")
    axes.set_ylabel(title)
    axes.legend(loc="best")
    figure.savefig(path, dpi=120)
    return path


def _cells(values: dict[str, float]) -> list[str]:
    return [f"{values[name]:.3f}" if name in values else "" for name in COLUMNS]
