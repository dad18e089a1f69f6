"""Weights of a published directory: model.safetensors or pytorch_model.bin, in one file or in shards.

Of a .bin, which is a pickle, torch reads tensors and nothing else (weights_only); files are mapped, not read,
so that what a model does not take costs no memory.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .google import from_google, is_google

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"


def read_weights(directory: Path, architecture: str) -> tuple[dict[str, Tensor], Path]:
    """Tensors by the layout's keys of a class, and the file that was read (of shards, their index).

    A file with the names of Google's checkpoints is read as the class (google.from_google).
    Raises ValueError naming the file that is missing, damaged or holds more than tensors.
    """
    weights, path = _read(directory)
    if is_google(weights):
        try:
            weights = from_google(weights, architecture)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return weights, path


def _read(directory: Path) -> tuple[dict[str, Tensor], Path]:
    for name, load in ((SAFETENSORS, _load_safetensors), (BIN, _load_bin)):
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return load(directory / name), directory / name
        if index.is_file():
            weights: dict[str, Tensor] = {}
            for shard in _shards(index):
                weights.update(load(directory / shard))
            return weights, index
    raise ValueError(f"{directory} is no checkpoint: it must hold {SAFETENSORS} or {BIN}")


def write_weights(weights: dict[str, Tensor], directory: Path, *, safe: bool) -> None:
    """One file; the weights in the other format and shards, which would now be stale, go."""
    name = SAFETENSORS if safe else BIN
    partial = directory / f"{name}.partial"
    if safe:
        # The format has no shared tensors: every key of a tied weight gets a copy.
        seen: set[int] = set()
        for key, tensor in weights.items():
            tied = tensor.data_ptr() in seen
            seen.add(tensor.data_ptr())
            weights[key] = tensor.clone() if tied else tensor.contiguous()
        partial.touch()
        mode = partial.stat().st_mode
        save_file(weights, partial, metadata={"format": "pt"})
        partial.chmod(mode)  # save_file leaves it to the owner alone
    else:
        torch.save(weights, partial)
    # By rename, since `weights` may still be mapped from the file that is replaced.
    os.replace(partial, directory / name)
    for other in {SAFETENSORS, BIN, f"{SAFETENSORS}.index.json", f"{BIN}.index.json"} - {name}:
        (directory / other).unlink(missing_ok=True)


def fill(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Copy weights into a module whose keys are those of the layout.

    Of tied weights one key is enough; where their values differ the first of the module's keys is taken, as
    the port ties them after loading. Keys that end in embeddings.position_ids (0, 1, 2, ...; in legacy files)
    are ignored. Raises ValueError naming `path` for keys that lack, are unknown or have another shape.
    """
    targets = module.state_dict(keep_vars=True)
    tied: dict[int, Tensor] = {}
    for key, target in targets.items():
        if key in weights:
            tied.setdefault(id(target), weights[key])
    kind = type(module).__name__
    lacking = [key for key, target in targets.items() if id(target) not in tied]
    if lacking:
        raise ValueError(f"{path}: {kind} needs {_some(lacking)}, which the file lacks")
    unknown = [k for k in weights if k not in targets and not k.endswith("embeddings.position_ids")]
    if unknown:
        raise ValueError(f"{path}: {kind} has no {_some(unknown)}, which the file holds")
    with torch.no_grad():
        for key, target in targets.items():
            source = tied[id(target)]
            if source.shape != target.shape:
                raise ValueError(
                    f"{path}: {key} must be {list(target.shape)} by config.json, got {list(source.shape)}"
                )
            target.copy_(source)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {_first_line(error)}") from error


def _load_bin(path: Path) -> dict[str, Tensor]:
    try:
        weights = _torch_load(path)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it must hold tensors only, and nothing else in it is executed "
            f"({_first_line(error)})"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {_first_line(error)}") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{path} must hold tensors by name, got a {type(weights).__name__}")
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path} must hold tensors by name, got a {type(value).__name__} at {key!r}")
    return weights


def _torch_load(path: Path) -> object:
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    # The format before torch 1.6 cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)


def _shards(index: Path) -> list[str]:
    """The file names an index holds, each in the index's own directory."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} must map keys to files under weight_map: {_first_line(error)}") from error
    if outside:
        raise ValueError(f"{index} must name files beside it, got {outside[0]!r}")
    return names


def _some(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
