"""`make gpu-sanitize`: our kernels on small shapes under compute-sanitizer's tools, side by side.

A tool counts only where it finds what was planted: faulty.py writes out of bounds on purpose.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..kernels import cuda_kernels, triton_kernels
from .processes import finish, start
from .tests import environment

SECONDS = 90
SHARES = max(1, min(8, os.cpu_count() or 1))  # processes that compile
TOOLS = ("memcheck", "racecheck", "synccheck")
ERRORS = 99  # what the tool exits with where it found any
PLACES = (os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.+)")


@dataclass(frozen=True)
class Finding:
    tool: str
    ok: bool
    said: str

    def __str__(self) -> str:
        return f"{self.tool}: {self.said}"


def find_tool() -> str | None:
    folders = [f"{place}/{folder}" for place in PLACES for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders)
    )


def kernel_filters() -> list[str]:
    """Options that name our kernels: those of the libraries are not looked into.

    A filter is a part of a name and no pattern (`kns`: the kernel's substring), and a kernel is watched that
    any filter fits. The planted fault comes first: were the last filter the only one, it would be missed.
    """
    names = {name.rpartition(":")[2] for name in triton_kernels()} | set(cuda_kernels())
    options: list[str] = []
    for name in ["faulty_kernel", *sorted(names)]:
        options += ["--kernel-regex", f"kns={name}"]
    return options


def command_of(tool: str, executable: str, log: Path, module: str) -> list[str]:
    return [
        executable,
        *("--tool", tool, "--error-exitcode", str(ERRORS), "--log-file", str(log)),
        *("--target-processes", "application-only", *kernel_filters()),
        sys.executable,
        "-m",
        f"benchmarks.gpu.{module}",
    ]


def read_finding(tool: str, status: int | None, log: Path) -> Finding:
    """Clean only where the program ended well and the tool says so."""
    text = log.read_text(errors="replace") if log.exists() else ""
    summary = SUMMARY.search(text)
    said = summary[1] if summary else "no summary"
    if status is None:
        said += "; stopped: out of time"
    elif status not in (0, ERRORS):
        said += f"; the program ended with status {status}"
    return Finding(tool, status == 0 and summary is not None, f"{said} ({log})")


def finds_errors(finding: Finding) -> bool:
    """By what the tool says: a fault ends the CUDA context, and the program then ends one way or another."""
    errors = re.match(r"(\d+) error", finding.said)
    return errors is not None and int(errors[1]) > 0


def sanitize(out: Path, seconds: float = SECONDS) -> list[Finding]:
    executable = find_tool()
    if executable is None:
        return [Finding("compute-sanitizer", False, "not found: put it on PATH or set CUDA_HOME")]
    deadline = time.monotonic() + seconds
    # Each allocation by itself, so that what lies behind it is nobody's.
    clean = environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Compiles everything once, and shows that the calls are right without the tools.
    small = [sys.executable, "-m", "benchmarks.gpu.small"]
    plain = [
        start([*small, f"{share}/{SHARES}"], out / f"sanitize-plain-{share}.log", clean)
        for share in range(SHARES)
    ]
    for share, status in enumerate(finish(plain, deadline)):
        if status != 0:
            log = out / f"sanitize-plain-{share}.log"
            return [Finding("small shapes", False, f"without any tool: exit status {status} ({log})")]
    watched = {
        "memcheck of a planted fault": ("memcheck", "faulty"),
        **{tool: (tool, "small") for tool in TOOLS},
    }
    logs = {title: out / f"sanitize-{title.replace(' ', '-')}.log" for title in watched}
    running = []
    for title, (tool, module) in watched.items():
        logs[title].unlink(missing_ok=True)
        command = command_of(tool, executable, logs[title], module)
        running.append(start(command, logs[title].with_suffix(".out"), clean))
    findings = []
    for title, status in zip(watched, finish(running, deadline), strict=True):
        finding = read_finding(title, status, logs[title])
        if watched[title][1] == "faulty":
            finding = Finding(title, finds_errors(finding), finding.said)
        findings.append(finding)
    return findings
