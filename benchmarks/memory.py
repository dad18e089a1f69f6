"""Search a table on disk within a fraction of its size: the memory it takes, and the speed it keeps.

    python -m benchmarks.memory --rows 4000000 --batch 1 32 --window-mib 64 256

Prints for each batch the peak of resident memory above what the process had before, anonymous and mapped
pages together (VmHWM of /proc/self/status, reset before each search), and the rate at which rows pass, for a
StreamedTable of each window and for the whole table mapped. The files are in the page cache after the first
search unless memory lacks for them: the rate is that of the cache, or else of the disk.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

import realm_kernels as rk

T = TypeVar("T")


def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as path:
        with rk.TableWriter(path, dim=arguments.dim, dtype=torch.float32) as writer:
            for _ in range(0, arguments.rows, 1 << 16):
                writer.append(torch.randn(1 << 16, arguments.dim))
        size = writer.rows * arguments.dim * 4
        print(f"{writer.rows:,} rows, {size / 2**20:,.0f} MiB, k = {arguments.k}")
        print(
            f"{'B':>5} {'window, MiB':>12} {'peak, MiB':>10} {'of the table':>13} {'GB/s':>6} {'x whole':>8}"
        )
        for batch in arguments.batch:
            queries = torch.randn(batch, arguments.dim)
            whole = rk.ShardedTable.open(path)
            rk.mips_topk(queries, whole, arguments.k)
            del whole
            # Opened anew, or its pages would be there already.
            _, peak, seconds = measured(
                lambda q=queries: rk.mips_topk(q, rk.ShardedTable.open(path), arguments.k)
            )
            lines = [("whole", peak, seconds)]
            for window in arguments.window_mib:
                table = rk.StreamedTable(path, window_bytes=window << 20)
                table.mips_topk(queries[:1], 1)
                lines.append((window, *measured(lambda t=table, q=queries: t.mips_topk(q, arguments.k))[1:]))
            for window, peak, took in lines:
                print(
                    f"{batch:>5} {window:>12} {peak / 2**20:>10.0f} {peak / size:>13.0%} "
                    f"{size / took / 1e9:>6.2f} {seconds / took:>8.2f}"
                )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--window-mib", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    return parser.parse_args()


def measured(search: Callable[[], T]) -> tuple[T, int, float]:
    start = time.perf_counter()
    result, peak = peak_of(search)
    return result, peak, time.perf_counter() - start


def peak_of(work: Callable[[], T]) -> tuple[T, int]:
    """What `work` returns, and the bytes of resident memory at its peak above those before it."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    result = work()
    return result, resident("VmHWM") - before


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
