"""`make gpu-test`: every test that a GPU makes a difference to, shared out over processes.

What is red here has no speed there: bench.py asks. Where the time was too short for some of the tests the
verdict is UNFINISHED, and is told beside the speeds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .processes import finish, start

ROOT = Path(__file__).parents[2]
SECONDS = 170
OPS = ("mips_topk", "linear_marginal_loss", "marginal_loss", "span_marginal_loss", "score_spans")
REST = "table"
# What makes a test file one that a GPU makes a difference to: it looks for one, puts what it tests on DEVICE,
# or marks tests for one.
FOR_A_GPU = re.compile(r"torch\.cuda\.is_available\(\)|\bDEVICE\b|mark\.gpu\b|cuda_unusable\(\)")
MARKED = re.compile(r"mark\.gpu\b")
# About what needs no GPU, or the interpreter that is not used where one is.
NOT_THERE = {"test_gpu_harness.py", "test_triton_interpreter.py"}
# Of these files only some tests: the other backends are the CPU's.
TRITON, CUDA = ["-k", "triton"], ["-k", "cuda"]
SELECTED = {"test_marginal_loss.py": (TRITON, CUDA), "test_score_spans.py": (TRITON,)}
SELECTED["test_span_marginal_loss.py"] = (TRITON,)
# Compiling is what takes the time, on one core a process.
PROCESSES = {"test_mips_topk_triton.py": 8, "test_mips_topk_triton_gpu.py": 5}
PROCESSES_OF_OTHERS = 3


def selections(op: str) -> list[list[str]]:
    """What pytest is given, a list a file: all of the file, or the tests it marks for a GPU."""
    found = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text()
        if path.name not in NOT_THERE and FOR_A_GPU.search(text) and op_of(path.name) == op:
            marked = ["-m", "gpu"] if MARKED.search(text) else []
            for selected in SELECTED.get(path.name, ([],)):
                found.append([f"tests/{path.name}", *marked, *selected])
    return found


def verdict_of(op: str, selection: Sequence[str]) -> str:
    """Whose verdict these tests are: the op's, or that of its CUDA backend, which nobody gets unasked."""
    return f"{op} cuda" if "_cuda" in selection[0] or selection[-2:] == CUDA else op


def op_of(name: str) -> str:
    """The op that a test file is named for; REST for files about something else."""
    return next((op for op in OPS if name.startswith(f"test_{op}")), REST)


@dataclass
class Verdict:
    """Of the tests of one op: how many ended how, and what went wrong."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    died: int = 0  # processes
    stopped: int = 0  # processes that were out of time: some of their tests have not run
    problems: list[str] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)  # of skips

    @property
    def state(self) -> str:
        if self.failed or self.died or not self.passed:
            return "RED"
        return "UNFINISHED" if self.stopped else "green"

    @property
    def is_green(self) -> bool:
        return self.state == "green"

    def __str__(self) -> str:
        text = f"{self.state}: {self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        text += f", {self.died} processes died" if self.died else ""
        return text + (f", {self.stopped} processes out of time" if self.stopped else "")


def read_junit(path: Path, verdict: Verdict) -> None:
    """Add what a process of pytest wrote."""
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if problem is not None:
            verdict.failed += 1
            verdict.problems.append(f"{name}: {(problem.get('message') or '').splitlines()[:1]}")
        elif skip is not None:
            verdict.skipped += 1
            reason = skip.get("message") or ""
            verdict.reasons[reason] = verdict.reasons.get(reason, 0) + 1
        else:
            verdict.passed += 1


def run_tests(ops: list[str], out: Path, extra: list[str], seconds: float = SECONDS) -> dict[str, Verdict]:
    """The tests of these ops side by side, each process with its share; written to tests.json.

    A verdict for each op, and one for the CUDA backend of each that has one.
    """
    deadline = time.monotonic() + seconds
    running = []
    for op in ops:
        for number, selection in enumerate(selections(op)):
            processes = PROCESSES.get(Path(selection[0]).name, PROCESSES_OF_OTHERS)
            for share in range(processes):
                stem = out / f"test-{op}-{number}-{share}"
                junit = stem.with_suffix(".xml")
                junit.unlink(missing_ok=True)
                command = [sys.executable, "-m", "pytest", *selection, "-q", f"--junitxml={junit}"]
                command += [f"--share={share}/{processes}", *extra]
                process = start(command, stem.with_suffix(".log"), environment())
                running.append((verdict_of(op, selection), junit, process))
    verdicts: dict[str, Verdict] = defaultdict(Verdict)
    statuses = finish([process for _, _, process in running], deadline)
    for (whose, junit, _), status in zip(running, statuses, strict=True):
        verdict = verdicts[whose]
        if junit.exists():
            read_junit(junit, verdict)
        if status is None:
            verdict.stopped += 1
        # 0 all passed, 1 some failed, 5 nothing was selected, as where there are fewer tests than processes.
        elif status not in (0, 1, 5):
            verdict.died += 1
            verdict.problems.append(f"{junit.with_suffix('.log')}: exit status {status}")
    remember(verdicts, out)
    return verdicts


def environment() -> dict[str, str]:
    """Threads share the cores among the processes; the interpreter of Triton is not what is tested."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return found | {"OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(path)}


def remember(verdicts: dict[str, Verdict], out: Path) -> None:
    path = out / "tests.json"
    known = {op: asdict(verdict) for op, verdict in known_verdicts(out).items()}
    known |= {op: asdict(verdict) for op, verdict in verdicts.items()}
    path.write_text(json.dumps({"sources": fingerprint(), "verdicts": known}, indent=1))


def known_verdicts(out: Path) -> dict[str, Verdict]:
    """What is known of these very sources; nothing where they changed since."""
    path = out / "tests.json"
    if not path.exists():
        return {}
    told: dict[str, Any] = json.loads(path.read_text())
    if told["sources"] != fingerprint():
        return {}
    return {op: Verdict(**verdict) for op, verdict in told["verdicts"].items()}


def fingerprint() -> str:
    """Of the kernels, their tests and the modules built from them."""
    digest = hashlib.sha256()
    for folder in ("realm_kernels", "csrc", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".so", ".cu", ".cuh", ".h", ".cpp", ".inl"):
                digest.update(str(path.relative_to(ROOT)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def skip_reasons(verdicts: dict[str, Verdict]) -> Counter[str]:
    total: Counter[str] = Counter()
    for verdict in verdicts.values():
        total.update(verdict.reasons)
    return total
