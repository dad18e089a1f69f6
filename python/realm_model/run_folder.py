"""The folder of a run, of pre-training or of fine-tuning: config.json, metrics.jsonl, checkpoints/."""

from __future__ import annotations

import json
import os
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


def write_whole(path: Path, text: str) -> None:
    """The file is what it was, or all of `text`, whenever the process dies."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def is_run(directory: Path) -> bool:
    """A run folder, whose model is in its checkpoints: not one of fine-tuning that has ended."""
    begun = (directory / CHECKPOINTS).is_dir() or (directory / METRICS).is_file()
    return begun and not (directory / "embedder").is_dir()


def require_own(out: Path, fresh: bool) -> None:
    """Raise ValueError where `out` is a folder of something else: nothing of it is touched.

    fresh: it will be dropped, and a model has a config.json, too.
    """
    if not out.is_dir():
        return  # a file in the way is found when the folder is made
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    needed = (CONFIG, METRICS) if fresh else (CONFIG,)
    lacking = [name for name in needed if name not in names]
    if names - {CONFIG} and lacking:
        raise ValueError(
            f"{out} is not a run folder: it has no {lacking[0]}, so it is left alone: choose a new one"
        )


def begin(out: Path, fresh: bool) -> None:
    """Make the folder; `fresh`: drop the run that it holds. Raises OSError where that cannot be."""
    if fresh and out.is_dir():
        # By rename: half a run, which a kill would leave, could be neither gone on with nor dropped.
        dropped = out.with_name(f".{out.name}.dropped")
        shutil.rmtree(dropped, ignore_errors=True)
        os.replace(out, dropped)
        shutil.rmtree(dropped)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write the run folder {out}: {error.strerror}") from error
