"""Across ranks: every rank gets the bits of one process over the merged table, or one clear error."""

import random
import subprocess
import sys
import time

import pytest
import ranks_pool
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

import realm_kernels as rk
from realm_kernels.mips_topk.plan import traffic
from realm_kernels.testing import assert_same_topk

SIZES = [2, 3, 4]
DIM = 8


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pool = ranks_pool.Pool(max(SIZES), tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def succeed(results):
    for rank, result in enumerate(results):
        if isinstance(result, Exception):
            raise AssertionError(f"rank {rank}: {getattr(result, 'where', result)}")
    return results


# What follows until the tests runs in the ranks. Each rank makes the problem of all ranks from one seed.


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
    """Uneven, and with empty parts about every other time."""
    cuts = sorted(draw.choice([0, total, draw.randint(0, total)]) for _ in range(parts - 1))
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
                torch.randint(-1, self.num_rows, (batch, draw.choice([0, 1, 4])), generator=generator)
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

    from realm_kernels import ranks

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
        with rk.use_backend("triton"):
            return rk.mips_topk(queries, table, k)
    return rk.mips_topk(queries, table, k, **arguments)


def half_on_1(tensor, rank):
    return tensor.half() if rank == 1 else tensor


def refused_dtensor(rank, size, case):
    mesh = init_device_mesh("cpu", (size,))
    table = torch.randn(4, DIM)
    if case == "replicated":
        from torch.distributed.tensor import Replicate

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
        time.sleep(4)
        return None
    start = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        if backward:
            top.scores.sum().backward()
        else:
            rk.mips_topk(queries, table, 3)
    return time.monotonic() - start, str(error.value)


# The tests.


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("kind", ["random", "integers", "duplicates", "special"])
def test_every_rank_gets_the_bits_of_one_process(pool, size, kind, masked):
    succeed(pool.run(search, size, range(12), kind, masked))


@pytest.mark.parametrize("rows", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("queries", ["float32", "bfloat16", "float16"])
def test_any_pair_of_dtypes(pool, queries, rows):
    succeed(pool.run(search, 3, range(3), "random", True, (getattr(torch, queries), getattr(torch, rows))))


@pytest.mark.parametrize("size", SIZES)
def test_a_dtensor_is_searched_as_one_process_would(pool, size):
    succeed(pool.run(search_by_dtensor, size, range(12)))


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_queries_get_the_gradient_of_one_process(pool, size, rows):
    succeed(pool.run(gradient_of_queries, size, range(10), (torch.float32, rows)))


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_dtensor_gets_the_gradient_of_one_process_in_its_shards(pool, size, rows):
    succeed(pool.run(gradient_of_a_dtensor, size, range(10), (torch.float32, rows)))


@pytest.mark.parametrize("size", SIZES)
def test_rows_come_from_whoever_holds_them(pool, size):
    succeed(pool.run(rows_by_id, size, range(10)))


def test_a_group_of_some_ranks(pool):
    succeed(pool.run(in_a_subgroup, 3))


def test_open_gives_each_rank_its_share(pool, tmp_path):
    rk.ShardedTable.from_tensors([torch.randn(10, DIM)]).save(tmp_path / "table", shard_rows=4)
    shown = succeed(pool.run(open_a_share, 3, str(tmp_path / "table")))
    assert shown[2] == (
        "DistributedTable(num_rows=10, dim=8, dtype=float32, rank=2 of 3 with 4 rows, device=cpu, version=1)"
    )


def test_a_refresh_with_fixed_lag_swaps_on_all_ranks_at_one_step(pool):
    # Snapshots 0, 2, 4 come in at steps 1, 3, 5; the last rank's rows, 3 times the value, are the best.
    best = [0.0, 0.0, 0.0, 2.0, 2.0, 4.0]
    versions = [0, 1, 1, 2, 2, 3]
    expected = [(v, DIM * 3 * x) for v, x in zip(versions, best, strict=True)]
    assert succeed(pool.run(refresh, 3)) == [expected] * 3


@pytest.mark.parametrize("gradient", [False, True], ids=["search", "gradient"])
@pytest.mark.parametrize(("k", "excluded"), [(1, 0), (8, 2)])
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_moved_are_those_of_the_model(pool, size, k, excluded, gradient):
    received = succeed(pool.run(bytes_of_a_search, size, k, excluded, gradient))
    model = traffic(size, 5, DIM, k, 4, excluded, 4 if gradient else None)
    if gradient and k == 1:
        # Every query chooses row 0, of rank 0, so the rows are not spread evenly as the model has them.
        chosen = 5 * DIM * 4
        spread_evenly = (size - 1) * (chosen // size)
        assert received == [model - spread_evenly + (0 if rank == 0 else chosen) for rank in range(size)]
    else:
        assert received == [model] * size


REFUSED = {
    # (the rank that raises its own error, its words); all others are told which rank it was.
    "from_local": (
        1,
        "DistributedTable: local must be of dtype float32, bfloat16, float16, got float64[4, 8]",
    ),
    "rows": (1, "DistributedTable.rows: indices must be in [0, N=8) or -1, got 8 to 8"),
    "mask": (
        1,
        "mips_topk: row_mask must be [n], one for each of this rank's rows, = [4], got bool[8] on cpu",
    ),
    "exclude": (1, "mips_topk: exclude must hold row ids in [0, N=8) or -1, got ids from 8 to 8"),
    "gradient": (1, "mips_topk: table must be a DTensor to receive a gradient"),
    "backend": (1, "mips_topk: use_backend('triton') cannot serve this call"),
    # None: every rank says the same.
    "open": (None, "no table at /nonexistent"),
    "width": (
        None,
        "local must have one D, dtype and version on all ranks, got D=8, float32, version 0 on rank 0",
    ),
    "dtype": (None, "and D=8, float16, version 0 on rank 1"),
    "k-above-N": (None, "mips_topk: k must be in [1, N=8], got 9"),
    "k-differs": (None, "must be the same on all ranks, got k=3, queries float32, table of version 0"),
    "queries-dtype": (None, "queries float16, table of version 0 that wants no gradient on rank 1"),
    "version": (None, "k=3, queries float32, table of version 1 that wants no gradient on rank 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_rank_refuses_no_rank_waits_for(pool, case):
    start = time.monotonic()
    errors = pool.run(refused, 2, case)
    assert time.monotonic() - start < ranks_pool.WAIT / 2
    culprit, words = REFUSED[case]
    for rank, error in enumerate(errors):
        assert isinstance(error, Exception), f"rank {rank} returned {error!r}"
        if culprit in (None, rank):
            assert words in str(error) and isinstance(error, (TypeError, ValueError, OSError)), error.where
        else:
            assert isinstance(error, RuntimeError)
            assert f"rank {culprit} refused its arguments; its own error says why" in str(error)


def test_ranks_that_make_different_calls_are_told(pool):
    errors = pool.run(refused, 2, "mixed")
    assert "rank 1 came to rows where rank 0 came to mips_topk" in str(errors[0])
    assert "rank 0 came to mips_topk where rank 1 came to rows" in str(errors[1])


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("replicated", "table must be a DTensor placed Shard(0) on a mesh of one axis, got (Replicate(),)"),
        ("lying", "table must have N="),
        ("queries", "queries must be a plain Tensor, each rank's own, got a DTensor"),
    ],
)
def test_a_dtensor_of_another_placement_is_refused(pool, case, words):
    for error in pool.run(refused_dtensor, 2, case):
        assert isinstance(error, (TypeError, ValueError)) and words in str(error), error


def test_explain_computes_nothing_and_asks_nobody(pool):
    plans = succeed(pool.run(explain_alone, 2))
    assert plans[1] is None
    assert plans[0].bytes == 2 * 5 * DIM * 4 + 4 * DIM * 4 + 2 * 5 * 3 * 12
    assert f"B=5 on each of 2 ranks, N=8 with 4 here, D={DIM} k=3" in plans[0].plan
    assert f"receives {traffic(2, 5, DIM, 3, 4)} bytes over gloo" in plans[0].plan


def explain_alone(rank, size):
    table = rk.DistributedTable.from_local(torch.randn(4, DIM))
    return rk.explain(rk.mips_topk, torch.randn(5, DIM), table, 3) if rank == 0 else None


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("how", "size"), [("hangs", 3), ("killed", 3)])
def test_a_lost_rank_is_a_clear_error_on_the_others_within_the_timeout(tmp_path, how, size, backward):
    pool = ranks_pool.Pool(size, tmp_path)
    try:
        results = pool.run(lose_a_rank, size, how, backward, timeout=2)
    finally:
        pool.close()
    assert isinstance(results[-1], EOFError) == (how == "killed")
    what = "gradients of the scores" if backward else "the sizes of mips_topk"
    for rank, (waited, message) in enumerate(results[:-1]):
        assert waited < 3.5, f"rank {rank} waited {waited:.1f} s for a timeout of 2 s"
        assert message.startswith(
            f"mips_topk: rank {rank} of {size} lost another rank while it exchanged {what} over gloo: "
        )
        assert "start again from the last checkpoint" in message and "\n" not in message


def test_without_a_process_group_the_error_says_what_is_missing():
    with pytest.raises(ValueError, match=r"^DistributedTable: group must be an initialised process group"):
        rk.DistributedTable.from_local(torch.randn(4, DIM))


def test_a_torch_without_distributed_still_imports_and_searches():
    code = """
import sys, torch
torch.distributed.is_available = lambda: False
for name in ("all_gather_single", "all_gather_into_tensor", "ProcessGroup", "GroupMember"):
    vars(torch.distributed).pop(name, None)
sys.modules["torch.distributed.tensor"] = None  # its import fails
import realm_kernels as rk
assert rk.mips_topk(torch.eye(3), torch.eye(3), 1).indices.flatten().tolist() == [0, 1, 2]
try:
    rk.DistributedTable.from_local(torch.eye(3))
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "built without any" in result.stdout
