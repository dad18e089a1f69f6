"""Published checkpoints."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .common import ConfigFile, console, one_clear_line
from .progress import See, bars


class Index(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def convert(
    directory: Annotated[Path, typer.Argument(help="A published REALM, with config.json.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    dtype: Annotated[
        Index, typer.Option(help="Dtype of the index's rows; bfloat16 halves it.")
    ] = Index.float32,
    config: ConfigFile = None,
) -> None:
    """Write a published checkpoint as safetensors, its Open-QA index as a sharded table, without loading
    either.

    What it writes opens by `from_pretrained` of the class that is printed; an Open-QA also in `answer` and
    `evaluate`.

    Example:

        realm-model convert realm-orqa-nq-openqa --out nq --dtype bfloat16
    """
    with one_clear_line():
        from ..published import PublishedConfig
        from ..published import convert as convert_directory

        with bars(console) as add:
            see: list[See] = []

            def report(rows: int) -> None:
                if not see:
                    see.append(add("index", PublishedConfig.read(directory).num_block_records, "rows"))
                see[0](rows)

            kind = convert_directory(directory, out, dtype=dtype.value, report=report)
        console.print(f"{out}: realm_model.published.{kind}", markup=False, soft_wrap=True)
