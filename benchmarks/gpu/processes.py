"""Child processes with a time limit and a log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE = 5.0  # seconds to end after an interrupt
TAIL = 12  # lines of a log that are shown


@dataclass(frozen=True)
class Outcome:
    returncode: int | None  # None: stopped at the limit
    seconds: float
    log: Path

    @property
    def ok(self) -> bool:
        return self.returncode == 0

    def __str__(self) -> str:
        state = "stopped: out of time" if self.returncode is None else f"exit status {self.returncode}"
        return f"{'ok' if self.ok else state}, {self.seconds:.0f} s, {self.log}"

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL:])


def heed_interrupts() -> None:
    """In this process and in what it starts: a shell's background job ignores SIGINT, and hands that on."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """In a process group of its own, so that what it started ends with it."""
    with log.open("w") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def finish(processes: Sequence[subprocess.Popen], deadline: float, grace: float = GRACE) -> list[int | None]:
    """Exit statuses; None where a process had to be stopped at the deadline (time.monotonic).

    It is interrupted first, and has `grace` seconds to write what it has.
    """
    late = [process for process in processes if not _ends(process, deadline)]
    for process in late:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
    deadline = time.monotonic() + grace
    for process in late:
        _ends(process, deadline)
        kill(process)
    return [None if process in late else process.returncode for process in processes]


def _ends(process: subprocess.Popen, deadline: float) -> bool:
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_logged(
    command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str] | None = None
) -> Outcome:
    began = time.monotonic()
    (status,) = finish([start(command, log, environment)], began + seconds)
    return Outcome(status, time.monotonic() - began, log)
