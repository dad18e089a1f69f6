"""python -m benchmarks.hopper_scan: the scan of mips_topk on Hopper, its maxima, and the whole search, apart.

Times of a scan with an empty epilogue, with the maxima, and of all five launches, beside the measured limits
of the same GPU. docs/hopper_scan.md says what to look at. It has not run yet.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

import realm_kernels as rk
from realm_kernels import native
from realm_kernels.mips_topk import cuda
from realm_kernels.mips_topk.plan import cost

from . import roofline
from .gpu.timing import time_calls

WIKIPEDIA = 13_353_718  # REALM's blocks
# What is scanned, rows, width, then (queries, k): each shape of the scan, and the shapes of the promises.
TABLES = (
    ("bfloat16", WIKIPEDIA, 128, ((1, 8), (64, 8), (128, 8), (128, 100), (256, 8), (512, 8), (512, 100))),
    ("int8", WIKIPEDIA, 128, ((1, 8), (64, 8), (128, 8), (512, 8), (512, 100))),
    ("bfloat16", 1_000_000, 768, ((64, 8), (128, 8), (256, 8), (512, 8))),
)
HEADER = "scanned          N    D     B    k  limit, ms   empty  maxima   whole  of the limit  repairs  plan"


@dataclass(frozen=True)
class Job:
    """One pass after the other of B queries over one piece, into a workspace made before."""

    queries: torch.Tensor
    piece: cuda.Piece
    k: int

    @functools.cached_property
    def plan(self) -> dict[str, int | str]:
        (batch, dim), processors = self.queries.shape, cuda.load(self.queries.device)
        return cuda.plan_for(batch, self.piece, dim, self.k, 0, self.queries.dtype, processors)

    @functools.cached_property
    def results(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores, ids and workspace."""
        batch = self.queries.shape[0]
        return (
            self.queries.new_empty((batch, self.k), dtype=torch.float32),
            self.queries.new_empty((batch, self.k), dtype=torch.int64),
            self.queries.new_empty(int(self.plan["bytes"]), dtype=torch.uint8),
        )

    def run(self, with_maxima: bool = True, whole: bool = True) -> None:
        scores, indices, workspace = self.results
        batch, step = self.queries.shape[0], int(self.plan["batch"])
        for start in range(0, batch, step):
            block = slice(start, min(start + step, batch))
            found = scores[block], indices[block]
            parts = {"with_maxima": with_maxima, "whole": whole}
            cuda.launch(self.queries[block], self.piece, None, *found, workspace, batch, **parts)


def piece_of(scanned: str, num_rows: int, dim: int, device: str) -> cuda.Piece:
    """Random bfloat16 rows, as they are or with their codes."""
    rows = torch.empty(num_rows, dim, dtype=torch.bfloat16, device=device).normal_()
    if scanned == "bfloat16":
        return cuda.Piece(rows, 0, None)
    table = rk.ShardedTable.from_tensors([rows]).quantize("int8")
    assert table.codes is not None
    mean, _, codes, bounds = table.codes.tensors()
    return cuda.Piece(rows, 0, None, (mean, codes, bounds))


def milliseconds(function: Callable[[], object]) -> float:
    function()
    return 1e3 * time_calls(function).median


def line_of(job: Job, bandwidth: float, rate: float) -> str:
    (batch, dim), num_rows = job.queries.shape, job.piece.rows.shape[0]
    scanned, plan = job.piece.scanned(), job.plan
    moved, flops = cost(batch, num_rows, dim, job.k, 1 if scanned == "int8" else 2, 2)
    limit = 1e3 * max(moved / bandwidth, flops / rate)
    empty = milliseconds(lambda: job.run(with_maxima=False))
    maxima = milliseconds(lambda: job.run(whole=False))
    before = cuda.gpu.repairs(job.queries.device)
    job.run()
    repairs = cuda.gpu.repairs(job.queries.device) - before
    whole = milliseconds(job.run)
    told = " ".join(
        f"{name}={plan[name]}" for name in ("shape", "cluster", "kept", "selected", "stages", "batch")
    )
    return (
        f"{scanned:<9}{num_rows:>10}{dim:>5}{batch:>6}{job.k:>5}{limit:>11.3f}{empty:>8.3f}{maxima:>8.3f}"
        f"{whole:>8.3f}{limit / whole:>14.0%}{repairs:>9}  {told}"
    )


def measure(shrink: int, device: str = "cuda") -> None:
    """Prints a line a shape as it is measured: what is stopped has told what it had."""
    bandwidth = roofline.measure_bandwidth(device)
    rates = {
        "bfloat16": roofline.measure_matrix_rate(torch.bfloat16, device),
        "int8": roofline.measure_matrix_rate(torch.int8, device),
    }
    told = ", ".join(f"{rate / 1e12:.0f} Tflop/s {name}" for name, rate in rates.items())
    print(f"{bandwidth / 1e12:.2f} TB/s, {told}\n{HEADER}", flush=True)
    for scanned, num_rows, dim, calls in TABLES:
        piece = piece_of(scanned, num_rows // shrink, dim, device)
        for batch, k in calls:
            queries = torch.randn(batch, dim, device=device).bfloat16()
            print(line_of(Job(queries, piece, k), bandwidth, rates[scanned]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shrink", type=int, default=1, help="so many times fewer rows, to see that all runs"
    )
    arguments = parser.parse_args()
    reason = native.cuda_unusable()
    if not reason and torch.cuda.get_device_capability() != cuda.HOPPER:
        reason = f"the GPU is a {torch.cuda.get_device_name()}"
    if reason:
        raise SystemExit(f"hopper_scan: it needs a Hopper GPU: {reason}")
    print(torch.cuda.get_device_name())
    measure(arguments.shrink)


if __name__ == "__main__":
    main()
