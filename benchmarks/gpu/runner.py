"""Runs rows in a child and outlives what they do: a row may fail, fault, hang or come too late.

The child is `python -m benchmarks.gpu.rows`, or whatever speaks as it does: a JSON line as a row begins, one
as it ends.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .processes import kill

ROW_SECONDS = 90.0  # without a word: it hangs


@dataclass
class Results:
    """What became of the rows of one op."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # by name, why
    limits: dict[str, float] = field(default_factory=dict)


def run_rows(
    command: Sequence[str],
    names: Sequence[str],
    deadline: float,
    row_seconds: float = ROW_SECONDS,
    environment: dict[str, str] | None = None,
) -> Results:
    """Until the deadline (time.monotonic). A row that ends its process is told; the next process goes on."""
    results, left = Results(), list(names)
    while left and time.monotonic() < deadline:
        before = len(left)
        _run_child(command, left, deadline, row_seconds, results, environment)
        if len(left) == before:  # it died before any row: so would the next
            for name in left:
                results.left_out[name] = "the process ended before it"
            return results
    for name in left:
        results.left_out[name] = "no time was left"
    return results


def _run_child(
    command: Sequence[str],
    left: list[str],
    deadline: float,
    row_seconds: float,
    results: Results,
    environment: dict[str, str] | None,
) -> None:
    """One child over what is left; takes from `left` what it dealt with."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n".join(left))
    process.stdin.close()
    said: queue.Queue[str | None] = queue.Queue()
    stdout = process.stdout

    def read() -> None:
        for line in stdout:
            said.put(line)
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    current, last_words = "", ""
    while True:
        patience = min(row_seconds, deadline - time.monotonic())
        try:
            line = said.get(timeout=max(0.0, patience))
        except queue.Empty:
            kill(process)
            if time.monotonic() < deadline and current:
                left.remove(current)
                results.left_out[current] = f"hung for {row_seconds:.0f} s"
            return
        if line is None:
            status = process.wait()
            if current:
                left.remove(current)
                results.left_out[current] = f"ended its process with status {status}: {last_words[:200]}"
            elif status != 0 and left:
                results.left_out[left.pop(0)] = f"its process ended with status {status}: {last_words[:200]}"
            return
        told = _parsed(line)
        if told is None:
            last_words = line.strip() or last_words
        elif "limits" in told:
            results.limits = told["limits"]
        elif "begins" in told:
            current = told["begins"]
        elif "name" in told:
            left.remove(told["name"])
            current = ""
            if "entry" in told:
                results.entries.append(told["entry"])
            else:
                results.left_out[told["name"]] = told["failed"]


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of the protocol; None for what a library printed."""
    if not line.startswith("{"):
        return None
    try:
        told = json.loads(line)
    except json.JSONDecodeError:
        return None
    return told if isinstance(told, dict) and told.keys() & {"limits", "begins", "name"} else None
