"""Published checkpoints."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .common import console, one_clear_line


class Index(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def convert(
    directory: Annotated[Path, typer.Argument(help="A published REALM, with config.json.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    dtype: Annotated[Index, typer.Option(help="Of the index's rows; bfloat16 halves it.")] = Index.float32,
) -> None:
    """Write a published checkpoint as safetensors, its Open-QA index as a sharded table, without loading
    either.

    Example: `realm-model convert realm-orqa-nq-openqa --out nq --dtype bfloat16`
    """
    with one_clear_line():
        from ..published import convert as convert_directory

        with console.status("converting"):
            kind = convert_directory(directory, out, dtype=dtype.value)
        console.print(f"{out}: realm_model.published.{kind}", markup=False, soft_wrap=True)
