"""What tests/test_table_distributed.py runs in each rank, as function(rank, size, ...).

Each rank makes the problem of all ranks from one seed, and compares its part with one process over all rows.
"""

import random
import shutil
import time

import pytest
import ranks_pool
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

import realm_kernels as rk
from realm_kernels import ranks
from realm_kernels.testing import assert_same_topk

DIM = 8
LOST_AFTER = 4  # seconds, the timeout of the group in which a rank is lost


def table_rows(kind, num_rows, generator):
    if kind == "integers":  # every tie is real, also between ranks
        return torch.randint(-2, 3, (num_rows, DIM), generator=generator).float()
    rows = torch.randn(num_rows, DIM, generator=generator)
    if kind == "duplicates":
        rows = rows[:2].repeat(num_rows, 1)[:num_rows]
    elif kind == "special":
        for value in (torch.nan, torch.inf, -torch.inf, -0.0, 1e30, 1e-40):
            rows[torch.rand(num_rows, generator=generator) < 0.12] = value
    return rows


def split_of(total, parts, draw):
    """Uneven, and every now and then with an empty part."""
    cuts = sorted(draw.choice([0, total] + [draw.randint(0, total)] * 6) for _ in range(parts - 1))
    return [after - before for before, after in zip([0, *cuts], [*cuts, total], strict=True)]


class Problem:
    """One search by all ranks: rows, queries, exclusions and masks of every rank, and k."""

    def __init__(self, seed, size, kind="random", masked=False, dtypes=(torch.float32, torch.float32)):
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.num_rows = draw.randint(1, 60)
        self.rank_rows = split_of(self.num_rows, size, draw)
        self.rows = table_rows(kind, self.num_rows, generator).to(dtypes[1])
        self.batches = [draw.choice([0, 1, 2, 5]) for _ in range(size)]
        queries = table_rows("integers" if kind == "integers" else "random", sum(self.batches), generator)
        if kind == "special" and len(queries):
            queries[::3, 1] = draw.choice([torch.nan, torch.inf, 0.0])
        self.queries = queries.to(dtypes[0])
        self.k = draw.choice([1, self.num_rows, draw.randint(1, self.num_rows)])
        self.exclude = [None] * size
        self.row_mask = None
        if masked:
            self.exclude = [
                torch.randint(-1, self.num_rows, (batch, draw.choice([0, 1, 6])), generator=generator)
                if draw.random() < 0.8
                else None
                for batch in self.batches
            ]
            self.row_mask = torch.rand(self.num_rows, generator=generator) < draw.choice([0.1, 0.7, 1.0])

    def mine(self, rank):
        """(rows, queries, the arguments exclude and row_mask) of this rank."""
        mask = None if self.row_mask is None else self.row_mask.split(self.rank_rows)[rank]
        arguments = {"exclude": self.exclude[rank], "row_mask": mask}
        return self.rows.split(self.rank_rows)[rank], self.queries.split(self.batches)[rank], arguments

    def expected(self, rank):
        _, queries, arguments = self.mine(rank)
        arguments["row_mask"] = self.row_mask
        return rk.mips_topk(queries, self.rows, self.k, **arguments)


def spread(rows, draw):
    """A rank's rows as the caller may hold them: a tensor, or a ShardedTable of several shards."""
    if draw.random() < 0.5:
        return rows
    return rk.ShardedTable.from_tensors(rows.split(split_of(len(rows), 3, draw)))


def search(rank, size, seeds, kind, masked, dtypes=(torch.float32, torch.float32)):
    for seed in seeds:
        problem = Problem(seed, size, kind, masked, dtypes)
        rows, queries, arguments = problem.mine(rank)
        table = rk.DistributedTable.from_local(spread(rows, random.Random(rank + seed)))
        assert (table.num_rows, table.rank_rows) == (problem.num_rows, tuple(problem.rank_rows))
        top = rk.mips_topk(queries, table, problem.k, **arguments)
        assert type(top.scores) is torch.Tensor and not top.scores.requires_grad
        assert_same_topk(top, problem.expected(rank))
    return seed


def search_by_dtensor(rank, size, seeds):
    mesh = init_device_mesh("cpu", (size,))
    for seed in seeds:
        problem = Problem(seed, size, "integers", masked=True)
        rows, queries, arguments = problem.mine(rank)
        shape = problem.rows.shape
        table = DTensor.from_local(
            rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=problem.rows.stride()
        )
        top = rk.mips_topk(queries, table, problem.k, **arguments)
        assert type(top.scores) is torch.Tensor and type(top.indices) is torch.Tensor
        assert_same_topk(top, problem.expected(rank))
    return seed


def gradient_of_queries(rank, size, seeds, dtypes):
    for seed in seeds:
        problem = Problem(seed, size, "integers", masked=True, dtypes=dtypes)
        rows, queries, arguments = problem.mine(rank)
        weights = torch.randn(len(queries), problem.k, generator=torch.Generator().manual_seed(seed))
        gradients = []
        for table, mask in (
            (rk.DistributedTable.from_local(rows.clone()), arguments["row_mask"]),
            (problem.rows, problem.row_mask),
        ):
            # One rank needs no gradient; it must still send its rows to the others.
            leaf = queries.clone().requires_grad_(rank != 1)
            top = rk.mips_topk(leaf, table, problem.k, exclude=arguments["exclude"], row_mask=mask)
            assert top.scores.requires_grad == (rank != 1) and not top.indices.requires_grad
            if isinstance(table, rk.DistributedTable):
                table.local.shards[0].zero_()  # as a refresh may, between the two passes
            if rank != 1:
                (top.scores * weights).sum().backward()
                gradients.append(leaf.grad)
        if rank != 1:
            assert torch.equal(*gradients), f"seed {seed}"
    return seed


def gradient_of_a_dtensor(rank, size, seeds, dtypes):
    mesh = init_device_mesh("cpu", (size,))
    for seed in seeds:
        problem = Problem(seed, size, "integers", masked=True, dtypes=dtypes)
        rows, queries, arguments = problem.mine(rank)
        weights = torch.randn(len(problem.queries), problem.k, generator=torch.Generator().manual_seed(seed))
        queries = queries.clone().requires_grad_(seed % 2 == 0)
        table = DTensor.from_local(
            rows.clone(),
            mesh,
            [Shard(0)],
            run_check=False,
            shape=problem.rows.shape,
            stride=problem.rows.stride(),
        ).requires_grad_()
        top = rk.mips_topk(queries, table, problem.k, **arguments)
        (top.scores * weights.split(problem.batches)[rank]).sum().backward()

        # One process with the queries of all ranks in their order.
        all_queries = problem.queries.clone().requires_grad_()
        whole = problem.rows.clone().requires_grad_()
        widest = max(0 if ids is None else ids.shape[1] for ids in problem.exclude)
        exclude = torch.full((len(all_queries), widest), -1)
        for ids, place in zip(problem.exclude, exclude.split(problem.batches), strict=True):
            if ids is not None:
                place[:, : ids.shape[1]] = ids
        one = rk.mips_topk(all_queries, whole, problem.k, exclude=exclude, row_mask=problem.row_mask)
        (one.scores * weights).sum().backward()
        assert table.grad.placements == (Shard(0),)
        assert torch.equal(table.grad.to_local(), whole.grad.split(problem.rank_rows)[rank]), f"seed {seed}"
        if queries.requires_grad:
            assert torch.equal(queries.grad, all_queries.grad.split(problem.batches)[rank])
    return seed


def rows_by_id(rank, size, seeds):
    for seed in seeds:
        problem = Problem(seed, size, "special", dtypes=(torch.float32, torch.bfloat16))
        table = rk.DistributedTable.from_local(problem.mine(rank)[0])
        generator = torch.Generator().manual_seed(seed + rank)
        shape = [(), (0,), (3,), (2, 0, 3), (2, 4)][(seed + rank) % 5]
        indices = torch.randint(-1, problem.num_rows, shape, generator=generator)
        padded = torch.cat([problem.rows, torch.zeros(1, DIM, dtype=torch.bfloat16)])  # -1 is its last row
        assert torch.equal(table.rows(indices).view(torch.int16), padded[indices].view(torch.int16))
    return seed


def in_a_subgroup(rank, size):
    """Ranks 1 and 2 of three, and a call that rank 0 makes with no group of its own."""
    group = dist.new_group([1, 2])
    rows = torch.arange(40.0).view(5, DIM)
    if rank == 0:
        with pytest.raises(ValueError, match="group must hold this process, got a group of other ranks only"):
            rk.DistributedTable.from_local(rows, group)
        return None
    table = rk.DistributedTable.from_local(rows + rank, group)
    assert (table.rank, table.world_size, table.first_row) == (rank - 1, 2, 5 * (rank - 1))
    assert_same_topk(
        rk.mips_topk(rows[:rank], table, 3),
        rk.mips_topk(rows[:rank], torch.cat([rows + 1, rows + 2]), 3),
    )


def open_a_share(rank, size, path):
    table, whole = rk.DistributedTable.open(path), rk.ShardedTable.open(path)
    assert table.rank_rows == (3, 3, 4) and table.version == 1
    queries = torch.randn(rank, DIM)
    assert_same_topk(rk.mips_topk(queries, table, 4), rk.mips_topk(queries, whole, 4))
    return repr(table)


def refresh(rank, size):
    """Each rank re-encodes its own rows; with fixed_lag all swap at the same step."""
    rows = rk.ShardedTable.from_tensors([torch.zeros(3 + rank, DIM)])
    table = rk.DistributedTable.from_local(rows)
    queries, versions = torch.ones(2, DIM), []

    def encode(factor):
        time.sleep(0.05 * rank)  # one is slower
        yield torch.full((3 + rank, DIM), factor["value"] * (rank + 1))

    with rk.TableRefresher(rows, encode, mode="fixed_lag", every=2, lag=1) as refresher:
        for step in range(6):
            refresher.step(step, lambda step=step: {"value": float(step)})
            top = rk.mips_topk(queries, table, 1)
            versions.append((table.version, float(top.scores[0, 0])))
    return versions


def refresh_together(rank, size, mode, folder, trouble):
    """One refresher over the whole table: (version, value) after every search, and the failures.

    trouble: "fails": the last rank fails at the snapshot of step 2, in both attempts. "disk": its commits
    fail from step 2 on, so that versions on disk would drift apart.
    """
    table = rk.DistributedTable.from_local(torch.zeros(3 + rank, DIM))
    queries, seen, last = torch.ones(2, DIM), [], rank == size - 1
    path = None if folder is None else f"{folder}/{rank}"

    def encode(snapshot):
        time.sleep(0.02 * rank)  # one is slower
        if trouble == "fails" and last and snapshot["value"] == 2:
            raise OSError("no such document")
        if trouble == "disk" and last and snapshot["value"] == 2:
            shutil.rmtree(path)
            open(path, "w").close()
        yield torch.full((3 + rank, DIM), float(snapshot["value"] * (rank + 1)))

    lag = 1 if mode == "fixed_lag" else None
    with rk.TableRefresher(table, encode, mode=mode, every=2, lag=lag, path=path) as refresher:
        refresher.build(0, lambda: {"value": 1})
        for step in range(6 if mode == "fixed_lag" else 30):
            refresher.step(step, lambda step=step: {"value": step})
            top = rk.mips_topk(queries, table, 1)
            seen.append((table.version, float(top.scores[0, 0]) / DIM))
            if mode == "async":
                time.sleep(0.01)
        state = refresher.state_dict()
        return seen, refresher.metrics.failures, state["table_step"]


def resume_together(rank, size, folder):
    """A refresher whose state is rank 0's, as in a checkpoint that one rank writes: each rank resumes."""
    every = {"mode": "fixed_lag", "every": 2, "lag": 1}

    def encode(snapshot):
        yield torch.full((3 + rank, DIM), float(snapshot["value"] * (rank + 1)))

    def run(refresher, table, steps):
        seen = []
        for step in steps:
            refresher.step(step, lambda step=step: {"value": step})
            top = rk.mips_topk(torch.ones(2, DIM), table, 1)
            seen.append(float(top.scores[0, 0]) / DIM)
        return seen

    def made():
        table = rk.DistributedTable.from_local(torch.zeros(3 + rank, DIM))
        return table, rk.TableRefresher(table, encode, path=f"{folder}/{rank}", **every)

    table, refresher = made()
    with refresher:
        whole = run(refresher, table, range(6))
        states = [refresher.state_dict()]
        dist.broadcast_object_list(states)
        kept = shutil.copytree(f"{folder}/{rank}", f"{folder}/kept-{rank}")
        whole += run(refresher, table, range(6, 10))
    if rank == 0:  # as it was at the checkpoint: this rank reads its rows back, the others encode again
        shutil.rmtree(f"{folder}/0")
        shutil.move(kept, f"{folder}/0")
    table, refresher = made()
    with refresher:
        refresher.load_state_dict(states[0])
        return whole[6:] == run(refresher, table, range(6, 10)) and whole[-1] == 8.0 * size


def refuse_to_build(rank, size):
    """Of a first index that one rank cannot build: what each rank is told, and the table as it was."""
    table = rk.DistributedTable.from_local(torch.zeros(2, DIM))

    def encode(snapshot):
        if rank == 1:
            raise OSError("no such document")
        yield torch.ones(2, DIM)

    with rk.TableRefresher(table, encode, mode="async", every=2) as refresher:
        try:
            refresher.build(0, dict)
        except (OSError, RuntimeError) as error:
            return str(error), table.local.shards[0].sum().item()


def bytes_of_a_search(rank, size, k, excluded, gradient):
    """Bytes that come from the other ranks, seen at torch.distributed itself."""
    received = []

    def gathering(collective):
        def gather(output, tensor, group=None):
            received.append((output.numel() - tensor.numel()) * tensor.element_size())
            return collective(output, tensor, group=group)

        return gather

    def exchange(output, tensor, output_splits, input_splits, group=None):
        others = sum(output_splits) - output_splits[rank]
        received.append(others * output[:1].numel() * output.element_size())
        return exchanged(output, tensor, output_splits, input_splits, group=group)

    table = rk.DistributedTable.from_local(torch.eye(DIM)[rank::size].clone())
    queries = torch.ones(5, DIM, requires_grad=gradient)
    exclude = torch.full((5, excluded), -1)
    gathered, exchanged = ranks._all_gather, dist.all_to_all_single
    ranks._all_gather, dist.all_to_all_single = gathering(gathered), exchange
    try:
        rk.mips_topk(queries, table, k, exclude=exclude)
    finally:
        ranks._all_gather, dist.all_to_all_single = gathered, exchanged
    return sum(received)


def refused(rank, size, case):
    rows = torch.randn(4, DIM)
    queries, k, arguments = torch.randn(2, DIM), 3, {}
    if case == "from_local":
        return rk.DistributedTable.from_local(rows.double() if rank == 1 else rows)
    if case == "open":
        return rk.DistributedTable.open("/nonexistent")
    if case in ("width", "dtype"):
        return rk.DistributedTable.from_local(
            rows[:, : DIM - rank] if case == "width" else half_on_1(rows, rank)
        )
    if case == "gradient":
        rows = rk.ShardedTable.from_tensors([rows])
    table = rk.DistributedTable.from_local(rows)
    if case == "rows":
        return table.rows(torch.tensor([4 * size if rank == 1 else 0]))
    if case == "mixed" and rank == 1:
        return table.rows(torch.tensor([0]))
    if case == "gradient" and rank == 1:
        rows.shards[0].requires_grad_()
    if case == "k-above-N":
        k = 4 * size + 1
    elif case == "k-differs":
        k = 3 + rank
    elif case == "queries-dtype":
        queries = half_on_1(queries, rank)
    elif case == "mask" and rank == 1:
        arguments["row_mask"] = torch.ones(4 * size, dtype=torch.bool)
    elif case == "exclude" and rank == 1:
        arguments["exclude"] = torch.full((2, 1), 4 * size)
    elif case == "version":
        table.local.version = rank
    elif case == "backend" and rank == 1:
        with rk.use_backend("torch"):
            return rk.mips_topk(queries, table, k)
    return rk.mips_topk(queries, table, k, **arguments)


def half_on_1(tensor, rank):
    return tensor.half() if rank == 1 else tensor


def refused_dtensor(rank, size, case):
    mesh = init_device_mesh("cpu", (size,))
    table = torch.randn(4, DIM)
    if case == "replicated":
        table = DTensor.from_local(table, mesh, [Replicate()])
    elif case == "lying":  # from_local takes N for 4 * size where it is not told
        table = DTensor.from_local(table[: 4 - rank], mesh, [Shard(0)], run_check=False)
    if case == "queries":
        queries = DTensor.from_local(table, mesh, [Shard(0)])
        return rk.mips_topk(queries, rk.DistributedTable.from_local(table), 3)
    return rk.mips_topk(torch.randn(2, DIM), table, 3)


def lose_a_rank(rank, size, how, backward):
    """The last rank dies or sleeps; how long the others waited for it, and what they were told."""
    mesh = init_device_mesh("cpu", (size,)) if backward else None
    table = rk.DistributedTable.from_local(torch.randn(5, DIM))
    if backward:
        table = DTensor.from_local(torch.randn(5, DIM), mesh, [Shard(0)]).requires_grad_()
    queries = torch.randn(2, DIM)
    top = rk.mips_topk(queries, table, 3)
    if rank == size - 1:
        if how == "killed":
            ranks_pool.die()
        time.sleep(LOST_AFTER + 1)
        return None
    start = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        if backward:
            top.scores.sum().backward()
        else:
            rk.mips_topk(queries, table, 3)
    return time.monotonic() - start, str(error.value)


def explain_alone(rank, size):
    table = rk.DistributedTable.from_local(torch.randn(4, DIM))
    return rk.explain(rk.mips_topk, torch.randn(5, DIM), table, 3) if rank == 0 else None
