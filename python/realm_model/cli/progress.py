"""How far a command has come: bars on a terminal; in a pipe or a file, where nobody watches, lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 30.0  # seconds
RATE_OVER = 60.0  # seconds, of a bar

See = Callable[..., None]  # see(done, shown=""): how many are done, and what to say beside


class Bars(Protocol):
    def __call__(self, title: str, total: int, unit: str) -> See:
        """A new bar of `total` units, below the others."""


@contextmanager
def bars(console: Console) -> Iterator[Bars]:
    """Bars with the rate and the time left. Where the console is no terminal each is a line every half minute
    and one when it ends.
    """
    if not console.is_terminal:
        lines: list[_Lines] = []

        def add_lines(title: str, total: int, unit: str) -> See:
            lines.append(_Lines(console, title, total, unit))
            return lines[-1].see

        yield add_lines
        for line in lines:
            line.end()
        return
    # 80 columns hold all of it, with a loss and the age of an index beside.
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(
        *columns, console=console, refresh_per_second=4, speed_estimate_period=RATE_OVER
    ) as progress:

        def add_bar(title: str, total: int, unit: str) -> See:
            task = progress.add_task(title, total=total, rate="", shown="")

            def see(done: int, shown: str = "") -> None:
                speed = progress.tasks[task].speed
                rate = _rate(speed, unit) if speed else ""
                progress.update(task, completed=done, rate=rate, shown=shown)

            return see

        yield add_bar


class _Lines:
    def __init__(self, console: Console, title: str, total: int, unit: str) -> None:
        self.console, self.title, self.total, self.unit = console, title, total, unit
        self.began = self.told = time.monotonic()  # told: when the last line was printed
        self.first = self.told_done = 0
        self.done: int | None = None
        self.shown = ""

    def see(self, done: int, shown: str = "") -> None:
        if self.done is None:
            self.first = self.told_done = done  # a run that goes on begins here
        self.done, self.shown = done, shown
        now = time.monotonic()
        if now - self.told < LINE_EVERY or done == self.total:
            return
        speed = (done - self.told_done) / (now - self.told)
        left = f"{_clock((self.total - done) / speed)} left" if speed > 0 else ""
        self._print(_rate(speed, self.unit), left)
        self.told, self.told_done = now, done

    def end(self) -> None:
        if self.done is not None:
            seconds = time.monotonic() - self.began
            speed = (self.done - self.first) / max(seconds, 1e-3)
            self._print(_rate(speed, self.unit), f"after {_clock(seconds)}")

    def _print(self, *parts: str) -> None:
        words = [f"{self.title}: {self.done}/{self.total}", *parts[:1], self.shown, *parts[1:]]
        line = "  ".join(word for word in words if word)
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rate(speed: float, unit: str) -> str:
    return f"{speed:,.0f} {unit}/s" if speed >= 100 else f"{speed:.1f} {unit}/s"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
