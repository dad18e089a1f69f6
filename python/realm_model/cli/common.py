"""What all commands share: where they print, how they fail, how they read a configuration file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..config import RunConfig, override

if TYPE_CHECKING:
    from ..machine import Machine

console = Console()
errors = Console(stderr=True)


@contextmanager
def one_clear_line() -> Iterator[None]:
    """Errors a user can mend are one line, not a traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        lost = isinstance(error, RuntimeError)
        if lost and not _is_lost_rank(error):
            raise
        said = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        errors.print(f"realm-model: {said}", style="red", markup=False, soft_wrap=True)
        if lost:
            # Threads may still wait for that rank: Python's own end would wait for them, or abort in them.
            sys.stdout.flush()
            os._exit(1)
        raise typer.Exit(1) from None


def _is_lost_rank(error: Exception) -> bool:
    import realm_kernels as rk  # with torch, which takes seconds

    return isinstance(error, rk.LostRankError)


def _read_options(context: typer.Context, path: Path | None) -> Path | None:
    """The values of a JSON object become the command's defaults; flags go before them."""
    if path is not None:
        with one_clear_line():
            _take(context, path, [])
    return path


def _read_run(context: typer.Context, path: Path | None) -> Path | None:
    """The same; what is no option of the command may be a part of a run's configuration."""
    if path is not None:
        with one_clear_line():
            _take(context, path, [part.name for part in fields(RunConfig)])
    return path


def with_file(context: typer.Context, config: RunConfig) -> RunConfig:
    """A configuration with what the file of the command says of its parts."""
    return override(config, context.obj, str(context.params["config"])) if context.obj else config


def _take(context: typer.Context, path: Path, parts: list[str]) -> None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(values).__name__}")
    # An option by its flag, without the dashes before it, or by its name.
    options = {}
    for parameter in context.command.params:
        if parameter.name not in ("help", "config"):
            flags = [flag.lstrip("-").replace("-", "_") for flag in parameter.opts]
            options |= dict.fromkeys([parameter.name, *flags], parameter.name)
    context.default_map, context.obj = {}, {}
    for name, value in values.items():
        option = options.get(name.replace("-", "_"))
        if value is None:
            continue
        if option is not None and not isinstance(value, dict):
            context.default_map[option] = value
        elif name in parts:
            context.obj[name] = value
        else:
            known = ", ".join(sorted({*options, *parts}))
            raise ValueError(f"{path}: {context.info_name} has no option {name!r}: {known}")


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


DeviceName = Annotated[Device, typer.Option("--device", help="auto: a GPU where there is one.")]
Timeout = Annotated[
    float, typer.Option(help="Seconds that a rank of torchrun waits for another before it counts as lost.")
]


def join(device: Device, timeout: float, refresh_ranks: int = 0) -> Machine:
    """The machine of a command that trains, in its place in the job where torchrun started it."""
    from ..machine import Machine, device_named
    from ..ranks import Ranks

    if not timeout > 0:
        raise ValueError(f"timeout must be more than 0 seconds, got {timeout:g}")
    machine = Machine(device_named(device.value), refresh_ranks, timeout)
    console.quiet = Ranks.join(machine.device, timeout).rank > 0
    return machine


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", is_eager=True, callback=_read_options, help="A JSON object of options; flags override."
    ),
]
RunFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_read_run,
        help="A JSON object of options, and of parts of a run as its config.json has them; flags override.",
    ),
]
