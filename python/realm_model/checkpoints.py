"""Checkpoints: safetensors and JSON, nothing pickled, committed by rename.

A run folder holds `checkpoints/<number>/` with state.safetensors (model, optimizer, random generators,
snapshots of the refresher), state.json (the format; stage, step, what else is a number) and tokenizer.json.
A folder is written under another name, flushed and renamed, so one that can be seen is whole; the older ones
go after that.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from .inputs import load_tokenizer

STATE, TENSORS, TOKENIZER = "state.json", "state.safetensors", "tokenizer.json"
# Raised whenever a run would go on otherwise from the same state. 1 was not written down: AdamW had all
# parameters in the module's order, and fine-tuning drew dropout from a generator that was in the state.
# 2: after the released warm-up the rate fell from its peak (optimizer.StageOptimizer).
FORMAT = 3


@dataclass(frozen=True)
class Checkpoint:
    """Nested dicts, lists, numbers and strings; tensors at any leaf."""

    state: dict[str, Any]
    tokenizer: Tokenizer = field(compare=False)
    format: int = FORMAT
    folder: Path | None = field(default=None, compare=False)  # where it was read

    def fill(self, model: nn.Module) -> None:
        """With the weights of a run of pre-training. Raises ValueError where these are of another model."""
        weights, targets = self.state.get("model", {}), model.state_dict()
        for name in sorted({*weights, *targets}):
            pair = [list(tensors[name].shape) if name in tensors else None for tensors in (targets, weights)]
            if pair[0] != pair[1]:
                raise ValueError(
                    f"checkpoint {self.folder} is not of the model of its config.json: {name} must be "
                    f"{pair[0]}, got {pair[1]}"
                )
        model.load_state_dict(weights)


def save(folder: Path, number: int, checkpoint: Checkpoint) -> None:
    """Commit checkpoint `number` of a folder and drop the others. An OSError leaves the folder as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{number:06d}"
    partial = folder / f"{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tensors: dict[str, Tensor] = {}
    plain = {"format": checkpoint.format, "state": _take_tensors(checkpoint.state, "", tensors)}
    save_file(tensors, partial / TENSORS)
    (partial / STATE).write_text(json.dumps(plain), encoding="utf-8")
    (partial / TENSORS).chmod((partial / STATE).stat().st_mode)  # save_file leaves it to the owner alone
    checkpoint.tokenizer.save(str(partial / TOKENIZER))
    for path in (*partial.iterdir(), partial):
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _flush(folder)
    for other in _folders(folder):
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def load(folder: Path) -> Checkpoint | None:
    """The last checkpoint of a folder, None where there is none: for its weights, which mean the same in
    every format so far. Raises ValueError where it is damaged, or of an unknown format.
    """
    last = _last(folder)
    if last is None:
        return None
    try:
        plain = json.loads((last / STATE).read_text(encoding="utf-8"))
        format, state = (plain["format"], plain["state"]) if "format" in plain else (1, plain)
        if format in range(1, FORMAT + 1):
            tensors = load_file(last / TENSORS)
            tokenizer = load_tokenizer(last / TOKENIZER)
            return Checkpoint(_give_tensors(state, tensors), tokenizer, format, last)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {last} is damaged: {error}") from error
    raise ValueError(
        f"checkpoint {last} must have a format from 1 to {FORMAT}, got {format!r}: use the version of "
        f"realm_model that wrote it"
    )


def resume(folder: Path) -> Checkpoint | None:
    """As load, for a run that goes on. Raises ValueError also for an older format, whose run would go on with
    other losses than it would have had.
    """
    checkpoint = load(folder)
    if checkpoint is not None and checkpoint.format != FORMAT:
        raise ValueError(
            f"checkpoint {_last(folder)} must have format {FORMAT} for the run to go on, got "
            f"{checkpoint.format}: train into another folder, or go on with the version of realm_model that "
            f"wrote it; a finished run still evaluates and answers"
        )
    return checkpoint


def _last(folder: Path) -> Path | None:
    return max(_folders(folder), default=None)


def _folders(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir() and path.name.isdigit())


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with each tensor replaced by {"tensor": its name}."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _take_tensors(v, f"{name}/{key}", tensors)] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_take_tensors(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _give_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _give_tensors(v, tensors) for key, v in value["dict"]}
    if isinstance(value, list):
        return [_give_tensors(v, tensors) for v in value]
    return value


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
