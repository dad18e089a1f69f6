"""python -m benchmarks.hopper_scan: the scan of mips_topk on Hopper, its maxima, and the whole search, apart.

Times of a scan with an empty epilogue, with the maxima, and of all five launches, beside the measured limits
of the same GPU. docs/hopper_scan.md says what to look at. It has not run yet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from realm_kernels import native
from realm_kernels.mips_topk import cuda
from realm_kernels.mips_topk.plan import cost

from . import roofline

NUM_ROWS = 13_353_718  # REALM's blocks of Wikipedia
SHAPES = [(1, 128, 8), (64, 128, 8), (128, 128, 8), (256, 128, 8), (512, 128, 8), (512, 128, 100)]
FLUSH_BYTES = 256 << 20  # more than L2 holds
REPEATS = 20


def milliseconds(function: Callable[[], object], flush: torch.Tensor) -> float:
    """The median of several calls, each with a cold L2."""
    times = []
    for _ in range(REPEATS + 3):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times[3:])[REPEATS // 2]


def main() -> None:
    reason = native.cuda_unusable()
    if not reason and torch.cuda.get_device_capability() != cuda.HOPPER:
        reason = f"the GPU is a {torch.cuda.get_device_name()}"
    if reason:
        raise SystemExit(f"hopper_scan: it needs a Hopper GPU: {reason}")
    bandwidth = roofline.measure_bandwidth("cuda")
    rate = roofline.measure_matrix_rate(torch.bfloat16, "cuda")
    print(f"{torch.cuda.get_device_name()}: {bandwidth / 1e12:.2f} TB/s, {rate / 1e12:.0f} Tflop/s bfloat16")
    print(
        "B D k: limit, empty epilogue, with maxima, whole search (ms); whole search as a share of the limit"
    )
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for batch, dim, k in SHAPES:
        rows = torch.randn(NUM_ROWS, dim, device="cuda", dtype=torch.bfloat16)
        queries = torch.randn(batch, dim, device="cuda", dtype=torch.bfloat16)
        piece = cuda.Piece(rows, 0, None)
        plan = cuda.plan_for(batch, piece, dim, k, 0, queries.dtype, cuda.multiprocessors(queries.device))
        workspace = queries.new_empty(plan["bytes"], dtype=torch.uint8)
        scores = queries.new_empty((batch, k), dtype=torch.float32)
        indices = queries.new_empty((batch, k), dtype=torch.int64)

        def search(
            queries: torch.Tensor = queries,
            piece: cuda.Piece = piece,
            scores: torch.Tensor = scores,
            indices: torch.Tensor = indices,
            workspace: torch.Tensor = workspace,
            passes: int = plan["batch"],
            **parts: bool,
        ) -> None:
            for start in range(0, queries.shape[0], passes):
                block = slice(start, start + passes)
                found = scores[block], indices[block]
                cuda.launch(queries[block], piece, None, *found, workspace, queries.shape[0], **parts)

        bytes_moved, flops = cost(batch, NUM_ROWS, dim, k, rows.element_size(), queries.element_size())
        limit = 1e3 * max(bytes_moved / bandwidth, flops / rate)
        empty = milliseconds(lambda search=search: search(with_maxima=False), flush)
        maxima = milliseconds(lambda search=search: search(whole=False), flush)
        whole = milliseconds(search, flush)
        print(f"{batch} {dim} {k}: {limit:.2f}, {empty:.2f}, {maxima:.2f}, {whole:.2f}; {limit / whole:.0%}")


if __name__ == "__main__":
    main()
