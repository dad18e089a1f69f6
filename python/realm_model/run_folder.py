"""The folder of a run, of pre-training or of fine-tuning: config.json, metrics.jsonl, checkpoints/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CONFIG, METRICS, CHECKPOINTS = "config.json", "metrics.jsonl", "checkpoints"

Record = dict[str, Any]  # one line of metrics.jsonl


class MetricsLog:
    """metrics.jsonl: appended line by line, cut back to the last checkpoint on resume."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("ab")

    def write(self, record: Record) -> None:
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()

    def size(self) -> int:
        return self.file.tell()

    def cut(self, size: int) -> None:
        self.file.truncate(min(size, self.size()))
        self.file.seek(0, 2)

    def close(self) -> None:
        self.file.close()


def require_droppable(out: Path) -> None:
    """Raise ValueError where `out` holds anything but a run: a model has a config.json, too."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is not a run folder: it is a file, so --fresh leaves it alone")
    names = {path.name for path in out.iterdir()}
    if names - {CONFIG} and not {CONFIG, METRICS} <= names:
        lacking = CONFIG if CONFIG not in names else METRICS
        raise ValueError(f"{out} is not a run folder: it has no {lacking}, so --fresh leaves it alone")


def begin(out: Path, fresh: bool) -> None:
    """Make the folder; `fresh`: drop the run that it holds. Raises ValueError, or OSError in one line."""
    if fresh:
        require_droppable(out)
        if out.exists():
            shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write the run folder {out}: {error.strerror}") from error
