"""What all commands share: where they print, how they fail, how they read a configuration file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()
errors = Console(stderr=True)


@contextmanager
def one_clear_line() -> Iterator[None]:
    """Errors a user can mend are one line, not a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        said = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        errors.print(f"realm-model: {said}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _read_defaults(context: typer.Context, path: Path | None) -> Path | None:
    """The values of a JSON object become the command's defaults; flags go before them."""
    if path is None:
        return None
    with one_clear_line():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a JSON object, got a {type(values).__name__}")
        known = sorted(p.name for p in context.command.params if p.name not in ("help", "config"))
        for name in values:
            if name not in known:
                raise ValueError(f"{path}: {context.info_name} has no option {name!r}: {', '.join(known)}")
    context.default_map = values
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", is_eager=True, callback=_read_defaults, help="A JSON object of options; flags override."
    ),
]
