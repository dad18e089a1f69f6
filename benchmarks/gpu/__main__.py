"""python -m benchmarks.gpu [all|build|test|sanitize|bench] --out FOLDER: what `make gpu` runs."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from . import bench, build, rows, sanitize, summary, tests
from .device import NoDevice, device

PARTS = ("build", "test", "sanitize", "bench")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("part", nargs="?", default="all", choices=("all", *PARTS))
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="for logs, JSON and Markdown")
    parser.add_argument(
        "--op", action="append", choices=(*tests.OPS, tests.REST), help="only this; may be repeated"
    )
    parser.add_argument("--select", default="", help="only rows whose name contains this, as 'B=512 k=8'")
    parser.add_argument("--seconds", type=float, default=bench.SECONDS, help="of the benchmark")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that all runs")
    parser.add_argument("--embeddings", default="", help="folder of a table, as realm-model index writes it")
    arguments = parser.parse_args()
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
    for part in PARTS if arguments.part == "all" else (arguments.part,):
        began = time.monotonic()
        print(f"== {part}", flush=True)
        if part == "build":
            report.build = build.build(found, out)
            if not report.build.ok:
                print(report.build.tail())
        elif part == "test":
            report.tests = tests.run_tests(tested, out, extra)
        elif part == "sanitize":
            report.findings = sanitize.sanitize(out)
        else:
            unknown = [op for op in measured if op not in tests.known_verdicts(out)]
            if unknown:
                report.tests |= tests.run_tests(unknown, out, extra)
            report.tests = tests.known_verdicts(out)
            report.results = bench.bench(
                measured, found, out, arguments.quick, arguments.select, arguments.seconds
            )
        report.seconds[part] = time.monotonic() - began
        report.write()
    print(report.text())
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
