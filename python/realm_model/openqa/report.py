"""What Open-QA shows: evaluations as one table, an answer with its reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..published import Answer
from ..report import AROUND, SMOOTHING, draw, excerpt, read_metrics, share
from .evaluate import RECALL_AT

_PLOTTED = {
    "loss": "loss",
    "retrieved": "a retrieved block holds an answer",
    "read": "a block that is read does",
}


def evaluations_table(rows: list[dict[str, Any]]) -> Table:
    """Of rows as `evaluate` writes them; evaluate.Evaluation explains the columns."""
    shown = [f"recall@{k}" for k in RECALL_AT] + [f"document@{k}" for k in RECALL_AT] + ["exact_match", "f1"]
    shown = [name for name in shown if any(row.get(name) is not None for row in rows)]
    counts = sorted({row["questions"] for row in rows})
    title = f"{' or '.join(map(str, counts))} questions"
    table = Table(title=title, title_justify="left", padding=(0, 0))
    table.add_column("model", no_wrap=True)
    for name in shown:
        # Short and on two lines, so that all of them fit into 80 columns.
        short = name.replace("_", "\n").replace("@", "\n@").replace("document", "doc.")
        table.add_column(short, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["name"], *(_number(row.get(name)) for name in shown))
    return table


def plot(run: Path) -> list[Path]:
    """loss.png and found.png of a run of fine-tuning: its loss, and how often a block held an answer."""
    smooth: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in _PLOTTED}
    for record in read_metrics(run):
        for name, (xs, ys) in smooth.items():
            value = record[name]
            xs.append(record["step"])
            ys.append(SMOOTHING * ys[-1] + (1 - SMOOTHING) * value if ys else value)
    curves = {_PLOTTED[name]: curve for name, curve in smooth.items()}
    loss = {"fine-tuning": curves.pop(_PLOTTED["loss"])}
    return [
        draw(run / "loss.png", "loss, smoothed", loss, {}),
        draw(run / "found.png", "share of the questions, smoothed", curves, {}, is_share=True),
    ]


def answer_view(answer: Answer, titles: dict[int, str]) -> Group:
    """The answer, its evidence with the answer marked, and every block read with what it was worth."""
    headline = Text.assemble("answer: ", (answer.evidence[answer.start : answer.end] or "(none)", "bold"))
    headline.append(f"   reader logit {answer.score:.3f}")
    places = [(answer.start, answer.end)] if answer.end > answer.start else []
    evidence = excerpt(_name(answer.block, titles), answer.evidence, places, 3 * AROUND)
    table = Table(title="blocks read", title_justify="left")
    table.add_column("document")
    for name in ("f(x,z)", "p(z|x)", "p(y|z,x)", "p(z|x,y)", "utility"):
        table.add_column(name, justify="right", no_wrap=True)
    for block in answer.read:
        text = excerpt(_name(block.block, titles), block.text, block.places)
        shares = map(share, (block.prior, block.likelihood, block.posterior))
        table.add_row(text, f"{block.relevance:.2f}", *shares, f"{block.utility:.2f}")
    return Group(headline, evidence, table)


def _name(row: int, titles: dict[int, str]) -> str:
    return titles.get(row) or f"block {row}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
