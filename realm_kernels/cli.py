"""realm-kernels: look after tables on disk."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
    from rich.table import Table
except ImportError as error:
    sys.exit(f'realm-kernels: {error}; its command line needs pip install "realm-kernels[cli]"')

# torch takes seconds to import: the commands import what needs it, so that --help is at once.

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")
tables = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(tables, name="table", help="Tables on disk: verify, info, convert.")
console = Console()
errors = Console(stderr=True)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a table.")]


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@tables.command()
def verify(directory: Directory) -> None:
    """Compare every byte with its checksum, and name each file that is damaged or missing (exit status 1).

    Example: `realm-kernels table verify index`
    """
    with _one_clear_line():
        from .table import manifest
        from .table.verification import verify as check

        try:
            total = sum(shard.size for shard in manifest.read(directory).shards)
        except ValueError:
            total = 0  # check() says why
        with _progress("MB") as progress:
            task = progress.add_task("verifying", total=total / 1e6)
            problems = check(directory, lambda count: progress.advance(task, count / 1e6))
        for problem in problems:
            errors.print(f"damaged: {problem}", style="red", markup=False, soft_wrap=True)
        if problems:
            raise typer.Exit(1)
        console.print(f"{directory}: whole, {total / 1e6:,.1f} MB", markup=False, soft_wrap=True)


@tables.command()
def info(directory: Directory) -> None:
    """Print what a table holds and what is beside it, from the manifest alone.

    Example: `realm-kernels table info index`
    """
    with _one_clear_line():
        from .table import manifest
        from .validation import dtype_name

        current = manifest.read(directory)
        named = {shard.file for shard in current.shards}
        beside = [
            p for p in directory.iterdir() if manifest.SHARD_NAME.fullmatch(p.name) and p.name not in named
        ]
        held = sum(1 for p in directory.iterdir() if manifest.RETIRED_NAME.fullmatch(p.name))
        grid = Table(title=str(directory), show_header=False)
        for name, value in [
            ("version", f"{current.version}"),
            ("rows", f"{current.rows - current.tombstones:,}"),
            ("tombstones", f"{current.tombstones:,}"),
            ("next id", f"{current.next_id:,}"),
            ("width", f"{current.dim}"),
            ("dtype", dtype_name(current.dtype)),
            ("shards", f"{len(current.shards):,}"),
            ("size", f"{sum(shard.size for shard in current.shards) / 1e6:,.1f} MB"),
            ("older versions in use", f"{held}"),
            ("their own files", f"{sum(p.stat().st_size for p in beside) / 1e6:,.1f} MB"),
        ]:
            grid.add_row(name, value)
        console.print(grid)


@tables.command()
def convert(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE...", help="Files in the order of their rows, a table, or a checkpoint."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for a table, or a new file.")],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the rows that are written; unsaid, the source's.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Which array of a file; unsaid, the only one, or block_emb.")
    ] = None,
    shard_rows: Annotated[int, typer.Option(help="Rows per file of a table.", min=1)] = 1 << 20,
) -> None:
    """Make a table of .npy, .npz, .safetensors, .bin or flat .faiss files, or of a REALM checkpoint's
    block_emb; or write a table as .npy, .safetensors or .faiss. Streams: a piece of 16 MiB is in memory.

    Examples: `realm-kernels table convert embeddings_0.npy embeddings_1.npy index --dtype bfloat16`,
    `realm-kernels table convert index index.faiss`
    """
    with _one_clear_line():
        from .table import formats, manifest
        from .table.sharded import ShardedTable

        chosen = None if dtype is None else manifest.DTYPES[dtype.value]
        if out.suffix in formats.SUFFIXES:
            if len(sources) != 1:
                raise ValueError(f"{out}: a file is written from one table, got {len(sources)} sources")
            table = ShardedTable.open(sources[0])
            rows = formats.live_rows(table)
            with _progress("rows") as progress:
                task = progress.add_task("writing", total=rows)
                for done in formats.export(table, out, chosen):
                    progress.update(task, completed=done)
            console.print(f"{out}: {rows:,} rows", markup=False, soft_wrap=True)
            if table.row_ids is not None:
                console.print("row i of the file is the i-th row that is left; its id may be another number")
            return
        opened = [formats.open_source(source, key) for source in sources]
        with _progress("rows") as progress:
            task = progress.add_task("writing", total=sum(source.rows for source in opened))
            for count in formats.import_sources(opened, out, chosen, shard_rows):
                progress.advance(task, count)
        console.print(f"{out}: {sum(source.rows for source in opened):,} rows", markup=False, soft_wrap=True)


def main() -> None:
    app()


class _Rate(ProgressColumn):
    """Units a second, over the whole task."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> str:
        seconds = task.finished_time or task.elapsed or 0.0
        return f"{task.completed / seconds:,.0f} {self.unit}/s" if seconds > 0 else ""


def _progress(unit: str) -> Progress:
    """A bar with what is done, of how much, and how fast."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        _Rate(unit),
        console=errors,
    )


@contextmanager
def _one_clear_line() -> Iterator[None]:
    """Errors a user can mend are one line, not a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        said = str(error)
        if isinstance(error, OSError) and error.filename:
            said = f"{error.filename}: {error.strerror}"
        errors.print(f"realm-kernels: {said}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    main()
