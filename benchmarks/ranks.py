"""A search across ranks beside its parts: the search here alone, and the exchanges alone.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.ranks --rows 200000 --batch 32 512 --k 8 100

Prints for every shape the milliseconds of each, and the bytes that a rank receives, by plan.traffic. A time
is that of the slowest rank, and the least of --repeats: what other work on the machine adds is left out.
"""

import argparse
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

import realm_kernels as rk
from realm_kernels.mips_topk.plan import traffic
from realm_kernels.ranks import Ranks


def main() -> None:
    arguments = parse()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # torchrun gives each process of a machine a number of its own there.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world, dim = dist.get_rank(), dist.get_world_size(), arguments.dim
    torch.manual_seed(rank)
    rows = torch.randn(arguments.rows // world, dim).bfloat16().to(device)
    table = rk.DistributedTable.from_local(rows)
    if rank == 0:
        print(f"W={world} N={table.num_rows} D={dim}, milliseconds")
        print(f"{'B':>6} {'k':>4} {'whole':>9} {'search':>9} {'exchange':>9} {'bytes received':>15}")
    for batch in arguments.batch:
        queries = torch.randn(batch, dim, device=device)
        all_queries = queries.repeat(world, 1)
        for k in arguments.k:
            steps = [
                lambda queries=queries, k=k: rk.mips_topk(queries, table, k),
                lambda queries=all_queries, k=k: rk.mips_topk(queries, rows, k),
                lambda queries=queries, k=k: exchange(table.ranks, queries, k),
            ]
            times = [f"{least(step, arguments.repeats, device):9.2f}" for step in steps]
            if rank == 0:
                print(f"{batch:>6} {k:>4} {' '.join(times)} {traffic(world, batch, dim, k, 4):>15,}")
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="of all ranks together")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[32], help="queries of each rank")
    parser.add_argument("--k", type=int, nargs="+", default=[8])
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args()


def exchange(ranks: Ranks, queries: torch.Tensor, k: int) -> None:
    """What a search exchanges, with nothing searched."""
    batches = [len(queries)] * ranks.size
    ranks.agree("mips_topk", [0] * 8)
    ranks.gather(queries, batches, "queries")
    candidates = queries.new_empty(sum(batches), 12 * k, dtype=torch.uint8)
    ranks.exchange(candidates, batches, batches, "candidates")


def least(step: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Milliseconds of a step on the slowest rank, the least of `repeats` after two to warm up."""
    seconds = []
    for _ in range(repeats + 2):
        dist.barrier()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(seconds[2:], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest.min()) * 1e3


if __name__ == "__main__":
    main()
