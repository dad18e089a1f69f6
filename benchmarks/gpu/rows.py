"""The rows of the benchmark, and the child process that measures those it is told to.

    python -m benchmarks.gpu.rows --op mips_topk < names

One JSON line as a row begins and one as it ends; what runner.py reads. With --share i/n it runs each i-th of
the named rows once and measures nothing: n processes compile side by side what the measuring one needs.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

OURS = "realm_kernels"
# To add an op: its module here offers rows(op, quick) and absent(op), and OPS of tests.py names it.
MODULES = {
    "mips_topk": "mips_topk",
    "linear_marginal_loss": "losses",
    "marginal_loss": "losses",
    "span_marginal_loss": "losses",
    "score_spans": "spans",
}


@dataclass(frozen=True)
class Call:
    """A function on the GPU, ready to be timed. It returns its results, so that its memory can be told."""

    function: Callable[[], object]
    limit: Callable[[], float]  # seconds; measures what the card can do when first asked
    check: Callable[[Any], None] | None = None  # of the result; raises where it is wrong
    repairs: Callable[[], int] | None = None  # a counter
    is_replayed: bool = False  # in a CUDA graph too
    owns_its_memory: bool = False  # torch's allocator does not see what it takes


@dataclass(frozen=True)
class Row:
    """One implementation at one shape; rows of one group do one job."""

    group: str
    implementation: str
    prepare: Callable[[], Call]
    told: dict[str, Any] = field(default_factory=dict)  # what the report needs besides: shape, order, compare

    @property
    def name(self) -> str:
        return f"{self.group} | {self.implementation}"

    @property
    def is_ours(self) -> bool:
        return self.implementation.split()[0] in (OURS, "ours")


def rows_of(op: str, quick: bool) -> list[Row]:
    """In the order of their importance: what the time is too short for is left out from the end."""
    return importlib.import_module(f"{__package__}.{MODULES[op]}").rows(op, quick)


def absent(op: str) -> list[str]:
    """Peers that are not installed."""
    return importlib.import_module(f"{__package__}.{MODULES[op]}").absent(op)


def measure(row: Row) -> dict[str, Any]:
    """An entry in the form of pytest-benchmark's JSON. Raises what the row raises."""
    import torch

    from .timing import extra_bytes, replay_of, time_calls

    call = row.prepare()
    result = call.function()  # compiles, tunes, warms up
    if call.check is not None:
        call.check(result)
    del result
    told: dict[str, Any] = {"implementation": row.implementation, "limit_seconds": call.limit()}
    if not call.owns_its_memory:
        told["extra_bytes"] = extra_bytes(call.function)
    if call.repairs is not None:
        before = call.repairs()
        call.function()
        told["repairs"] = call.repairs() - before
    times = time_calls(call.function)
    told.update(least=times.least, most=times.most)
    if call.is_replayed:
        try:
            told["replay_seconds"] = time_calls(replay_of(call.function)).median
        except RuntimeError as error:
            told["replay_refused"] = first_line(error)
            torch.cuda.synchronize()
    stats = {"median": times.median, "rounds": times.repetitions}
    return {"group": row.group, "extra_info": row.told | told, "stats": stats}


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def limits() -> dict[str, float]:
    """What the card can do, measured in this process: GB/s of a copy, TFLOP/s of a product."""
    import torch

    from .. import roofline

    found = {"copy_gigabytes_per_second": roofline.measure_bandwidth("cuda") / 1e9}
    for name, dtype in {"bfloat16": torch.bfloat16, "int8": torch.int8}.items():
        found[f"{name}_matrix_teraflops"] = roofline.measure_matrix_rate(dtype, "cuda") / 1e12
    return found


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", required=True, choices=MODULES)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--share", default="", help="i/n: only compile")
    arguments = parser.parse_args()
    named = sys.stdin.read().splitlines()
    rows = {row.name: row for row in rows_of(arguments.op, arguments.quick)}
    if arguments.share:
        which, of = map(int, arguments.share.split("/"))
        for name in named[which::of]:
            try:
                rows[name].prepare().function()
            except Exception as error:  # the measuring process meets it again, and tells
                say(name=name, failed=first_line(error))
        return
    say(limits=limits())
    for name in named:
        say(begins=name)
        try:
            say(name=name, entry=measure(rows[name]))
        except Exception as error:  # one implementation's failure is a row of the report
            say(name=name, failed=first_line(error))
            del error
        gc.collect()


if __name__ == "__main__":
    main()
