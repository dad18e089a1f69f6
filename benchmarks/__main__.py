"""python -m benchmarks: run the benchmark files and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer

from .report import write_report

HERE = Path(__file__).parent
OPS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main(
    op: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(OPS)}; may be given again")] = None,
    out: Annotated[Path, typer.Option(help="folder for the JSON, the Markdown tables and the plot")] = Path(
        "bench-results"
    ),
    select: Annotated[
        str, typer.Option(help="only the shapes whose name fits, as pytest -k: 'float32 and 8'")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="small shapes, to see that all runs")] = False,
) -> None:
    """Time every op beside its peers in one run, and print ratios and fractions of the measured limits.

    Example: python -m benchmarks --op mips_topk --out bench-results
    """
    unknown = sorted(set(op or []) - set(OPS))
    if unknown:
        raise typer.BadParameter(f"--op must be among {', '.join(OPS)}, got {', '.join(unknown)}")
    out.mkdir(parents=True, exist_ok=True)
    json_path = out / "benchmarks.json"
    files = [str(HERE / f"bench_{name}.py") for name in (op or OPS)]
    arguments = [
        *files,
        "-q",
        "-rN",
        f"--benchmark-json={json_path}",
        "--benchmark-disable-gc",
        "--benchmark-quiet",
        "-p",
        "no:timeout",
        "-W",
        "ignore::pytest.PytestConfigWarning",  # the timeout, which nobody reads now
        "-k",
        select,
    ]
    status = pytest.main(arguments + ["--quick"] * quick)
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"benchmarks failed ({status!r}): no speed is reported for an op that is wrong")
    print("written: " + ", ".join(str(path) for path in [json_path, *write_report(json_path)]))


if __name__ == "__main__":
    typer.run(main)
