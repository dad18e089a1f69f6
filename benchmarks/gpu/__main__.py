"""python -m benchmarks.gpu [all|build|test|sanitize|bench] --out FOLDER: what `make gpu` runs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import bench, build, rows, sanitize, summary, tests
from .device import NoDevice, device
from .processes import heed_interrupts

# In the order of what they settle: where the time is too short, the last ones are. Seconds of each.
PARTS = {
    "build": build.SECONDS,
    "test": tests.SECONDS,
    "bench": bench.SECONDS,
    "sanitize": sanitize.SECONDS,
}


def ends_of(parts: Sequence[str], minutes: float | None) -> dict[str, float]:
    """Seconds from the beginning until each part must have ended: what one leaves over the next one has.

    minutes: of all these parts; None: as PARTS has them.
    """
    total = sum(PARTS[part] for part in parts)
    scale = 1.0 if minutes is None else 60 * minutes / total
    return {part: scale * sum(PARTS[p] for p in parts[: i + 1]) for i, part in enumerate(parts)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("part", nargs="?", default="all", choices=("all", *PARTS))
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="for logs, JSON and Markdown")
    parser.add_argument(
        "--op", action="append", choices=(*tests.OPS, tests.REST), help="only this; may be repeated"
    )
    parser.add_argument("--select", default="", help="only rows whose name contains this, as 'B=512 k=8'")
    whole = sum(PARTS.values()) / 60
    parser.add_argument(
        "--minutes", type=float, help=f"of all that is run; without it {whole:g} of all parts"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that all runs")
    parser.add_argument("--embeddings", default="", help="folder of a table, as realm-model index writes it")
    arguments = parser.parse_args()
    heed_interrupts()
    try:
        found = device()
    except NoDevice as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    report = summary.Summary(found, out)
    extra = [f"--embeddings={arguments.embeddings}"] if arguments.embeddings else []
    tested = arguments.op or [*tests.OPS, tests.REST]
    measured = [op for op in (arguments.op or list(rows.MODULES)) if op in rows.MODULES]
    parts = list(PARTS) if arguments.part == "all" else [arguments.part]
    ends, first = ends_of(parts, arguments.minutes), time.monotonic()
    for part in parts:
        began = time.monotonic()
        seconds = first + ends[part] - began
        print(f"== {part}, {seconds:.0f} s at most", flush=True)
        if part == "build":
            report.build = build.build(found, out, seconds)
            if not report.build.ok:
                print(report.build.tail())
        elif part == "test":
            report.tests = tests.run_tests(tested, out, extra, seconds)
        elif part == "sanitize":
            report.findings = sanitize.sanitize(out, seconds)
        else:
            unknown = [op for op in measured if op not in tests.known_verdicts(out)]
            if unknown:
                tests.run_tests(unknown, out, extra, seconds / 2)
            report.tests = tests.known_verdicts(out)
            left = began + seconds - time.monotonic()
            report.results = bench.bench(measured, found, out, arguments.quick, arguments.select, left)
        report.seconds[part] = time.monotonic() - began
        report.write()
    print(report.text())
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
