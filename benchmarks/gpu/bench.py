"""`make gpu-bench`: ours beside every installed peer, within a time, and not where tests are red."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import rows, tests
from .processes import finish, start
from .runner import Results, run_rows

SECONDS = 190
# Shares of the time; what one op does not use the next may.
SHARES = {"mips_topk": 0.60, "linear_marginal_loss": 0.23, "marginal_loss": 0.07, "span_marginal_loss": 0.05}
SHARES["score_spans"] = 0.05
COMPILE_SHARE = 0.3  # of the time of an op, at most, to compile its kernels side by side
COMPILERS = max(1, min(8, (os.cpu_count() or 2) // 2))


def shares(ops: Sequence[str], seconds: float) -> dict[str, float]:
    """Seconds from the beginning until each op must have ended, in their order."""
    total = sum(SHARES[op] for op in ops)
    ends, used = {}, 0.0
    for op in ops:
        used += SHARES[op] / total
        ends[op] = used * seconds
    return ends


def bench(
    ops: Sequence[str],
    device: dict[str, Any],
    out: Path,
    quick: bool,
    select: str = "",
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """The results, as report.py reads them; also written to benchmarks.json."""
    verdicts = tests.known_verdicts(out)
    results: dict[str, Any] = {
        "benchmarks": [],
        "left_out": {},
        "machine_info": {"gpu": device, "limits": {}, "missing_peers": []},
    }
    began = time.monotonic()
    ends = shares(ops, seconds)
    for op in ops:
        wanted = [row for row in rows.rows_of(op, quick) if select in row.name]
        closed = {row.name: why for row in wanted if (why := gate(op, verdicts, row.implementation))}
        named = [row.name for row in wanted if row.name not in closed]
        results["left_out"] |= closed
        if not named:
            continue
        results["machine_info"]["missing_peers"] += rows.absent(op)
        found = measure_op(op, named, began + ends[op], out, quick)
        results["benchmarks"] += found.entries
        results["left_out"] |= found.left_out
        results["machine_info"]["limits"] |= found.limits
        (out / "benchmarks.json").write_text(json.dumps(results, indent=1))
    (out / "benchmarks.json").write_text(json.dumps(results, indent=1))
    return results


def gate(op: str, verdicts: dict[str, tests.Verdict], implementation: str = rows.OURS) -> str:
    """Why no speed of this row is reported; empty where the tests of op, or of its backend, are not red."""
    whose = f"{op} cuda" if implementation == "ours cuda" else op
    if whose not in verdicts:
        return "its GPU tests have not run on these sources"
    return f"its GPU tests are {verdicts[whose]}" if verdicts[whose].state == "RED" else ""


def measure_op(op: str, named: list[str], deadline: float, out: Path, quick: bool) -> Results:
    command = [sys.executable, "-m", "benchmarks.gpu.rows", "--op", op, *(["--quick"] if quick else [])]
    left = deadline - time.monotonic()
    ours = [row.name for row in rows.rows_of(op, quick) if row.is_ours and row.name in set(named)]
    compile_ours(command, ours, time.monotonic() + COMPILE_SHARE * left, out / f"compile-{op}")
    return run_rows(command, named, deadline, environment=tests.environment())


def compile_ours(command: list[str], names: list[str], deadline: float, stem: Path) -> None:
    """Fill Triton's cache by running each of our rows once, in processes side by side."""
    listed = stem.with_suffix(".txt")
    listed.write_text("\n".join(names))
    running = []
    for share in range(COMPILERS):
        log = stem.with_name(f"{stem.name}-{share}.log")
        shell = ["sh", "-c", 'exec "$@" <"$0"', str(listed), *command, "--share", f"{share}/{COMPILERS}"]
        running.append(start(shell, log, tests.environment()))
    finish(running, deadline, grace=0.0)
