"""Across ranks: every rank gets the bits of one process over the merged table, or one clear error."""

import subprocess
import sys
import time

import pytest
import ranks_pool
import table_distributed_cases as cases
import torch
from table_distributed_cases import DIM, LOST_AFTER

import realm_kernels as rk
from realm_kernels.mips_topk.plan import traffic

SIZES = [2, 3, 4]


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


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("kind", ["random", "integers", "duplicates", "special"])
def test_every_rank_gets_the_bits_of_one_process(pool, size, kind, masked):
    succeed(pool.run(cases.search, size, range(12), kind, masked))


@pytest.mark.parametrize("rows", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("queries", ["float32", "bfloat16", "float16"])
def test_any_pair_of_dtypes(pool, queries, rows):
    succeed(
        pool.run(cases.search, 3, range(3), "random", True, (getattr(torch, queries), getattr(torch, rows)))
    )


@pytest.mark.parametrize("size", SIZES)
def test_a_dtensor_is_searched_as_one_process_would(pool, size):
    succeed(pool.run(cases.search_by_dtensor, size, range(12)))


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_queries_get_the_gradient_of_one_process(pool, size, rows):
    succeed(pool.run(cases.gradient_of_queries, size, range(10), (torch.float32, rows)))


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_dtensor_gets_the_gradient_of_one_process_in_its_shards(pool, size, rows):
    succeed(pool.run(cases.gradient_of_a_dtensor, size, range(10), (torch.float32, rows)))


@pytest.mark.parametrize("size", SIZES)
def test_rows_come_from_whoever_holds_them(pool, size):
    succeed(pool.run(cases.rows_by_id, size, range(10)))


def test_a_group_of_some_ranks(pool):
    succeed(pool.run(cases.in_a_subgroup, 3))


def test_open_gives_each_rank_its_share(pool, tmp_path):
    rk.ShardedTable.from_tensors([torch.randn(10, DIM)]).save(tmp_path / "table", shard_rows=4)
    shown = succeed(pool.run(cases.open_a_share, 3, str(tmp_path / "table")))
    assert shown[2] == (
        "DistributedTable(num_rows=10, dim=8, dtype=float32, rank=2 of 3 with 4 rows, device=cpu, version=1)"
    )


def test_a_refresh_with_fixed_lag_swaps_on_all_ranks_at_one_step(pool):
    # Snapshots of steps 2 and 4 come in at 3 and 5; the last rank's rows, 3 times the value, are best.
    best = [0.0, 0.0, 0.0, 2.0, 2.0, 4.0]
    versions = [0, 0, 0, 1, 1, 2]
    expected = [(v, DIM * 3 * x) for v, x in zip(versions, best, strict=True)]
    assert succeed(pool.run(cases.refresh, 3)) == [expected] * 3


def test_one_refresher_over_the_ranks_swaps_with_fixed_lag(pool, tmp_path):
    # The last rank's rows are best: 3 times the value. build() is version 1, the swaps at 3 and 5 come after.
    seen, failures = [3.0, 3.0, 3.0, 6.0, 6.0, 12.0], [1, 1, 1, 2, 2, 3]
    for folder in (None, str(tmp_path)):
        results = succeed(pool.run(cases.refresh_together, 3, "fixed_lag", folder, None))
        assert results == [(list(zip(failures, seen, strict=True)), 0, 4)] * 3


def test_one_refresher_over_the_ranks_swaps_in_async_when_the_slowest_is_ready(pool):
    results = succeed(pool.run(cases.refresh_together, 3, "async", None, None))
    assert results[0] == results[1] == results[2]  # no search saw two versions, or it had raised
    seen, failures, last = results[0]
    assert failures == 0 and last > 2 and len(set(seen)) > 2


@pytest.mark.parametrize("mode", ["fixed_lag", "async"])
def test_what_one_rank_cannot_encode_no_rank_swaps_in(pool, mode):
    results = succeed(pool.run(cases.refresh_together, 3, mode, None, "fails"))
    seen, _, last = results[0]
    assert [(own, step) for own, _, step in results] == [(seen, last)] * 3
    assert [failures for _, failures, _ in results] == [0, 0, 2]  # both attempts of the one that failed
    assert all(value != 6.0 for _, value in seen) and last >= 4  # and the next snapshot is swapped in


def test_a_commit_that_fails_on_one_rank_leaves_one_version_on_all(pool, tmp_path):
    results = succeed(pool.run(cases.refresh_together, 3, "fixed_lag", str(tmp_path), "disk"))
    assert results[0][0] == results[2][0] and [value for _, value in results[0][0]][-1] == 12.0
    assert [failures for _, failures, _ in results] == [0, 0, 2]


def test_ranks_resume_from_the_state_of_one(pool, tmp_path):
    assert succeed(pool.run(cases.resume_together, 3, str(tmp_path))) == [True] * 3


def test_a_first_index_that_one_rank_cannot_build_is_an_error_on_all(pool):
    (told, rows), (own, _), *_ = succeed(pool.run(cases.refuse_to_build, 3))
    assert told == "TableRefresher: rank 1 could not encode its rows; its own error says why" and rows == 0
    assert own == "no such document"


@pytest.mark.parametrize("gradient", [False, True], ids=["search", "gradient"])
@pytest.mark.parametrize(("k", "excluded"), [(1, 0), (8, 2)])
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_moved_are_those_of_the_model(pool, size, k, excluded, gradient):
    received = succeed(pool.run(cases.bytes_of_a_search, size, k, excluded, gradient))
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
    "backend": (1, "mips_topk: use_backend('torch') names a backend this op lacks"),
    # None: every rank says the same.
    "open": (None, "this is not a table: it has no manifest.json"),
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
    errors = pool.run(cases.refused, 2, case)
    assert time.monotonic() - start < ranks_pool.TIMEOUT
    culprit, words = REFUSED[case]
    for rank, error in enumerate(errors):
        assert isinstance(error, Exception), f"rank {rank} returned {error!r}"
        if culprit in (None, rank):
            assert words in str(error) and isinstance(error, (TypeError, ValueError, OSError)), error.where
        else:
            assert isinstance(error, RuntimeError)
            assert f"rank {culprit} refused its arguments; its own error says why" in str(error)


def test_ranks_that_make_different_calls_are_told(pool):
    errors = pool.run(cases.refused, 2, "mixed")
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
    for error in pool.run(cases.refused_dtensor, 2, case):
        assert isinstance(error, (TypeError, ValueError)) and words in str(error), error


def test_explain_computes_nothing_and_asks_nobody(pool):
    plans = succeed(pool.run(cases.explain_alone, 2))
    assert plans[1] is None
    assert plans[0].bytes == 2 * 5 * DIM * 4 + 4 * DIM * 4 + 2 * 5 * 3 * 12
    assert f"B=5 on each of 2 ranks, N=8 with 4 here, D={DIM} k=3" in plans[0].plan
    assert f"receives {traffic(2, 5, DIM, 3, 4)} bytes over gloo" in plans[0].plan


@pytest.mark.parametrize(("how", "backward"), [("hangs", False), ("killed", False), ("killed", True)])
def test_a_lost_rank_is_a_clear_error_on_the_others_within_the_timeout(tmp_path, how, backward):
    size = 3
    pool = ranks_pool.Pool(size, tmp_path)
    try:
        results = pool.run(cases.lose_a_rank, size, how, backward, timeout=LOST_AFTER)
    finally:
        pool.close()
    assert isinstance(results[-1], EOFError) == (how == "killed")
    what = "gradients of the scores" if backward else "the sizes of mips_topk"
    for rank, (waited, message) in enumerate(results[:-1]):
        assert waited < 2 * LOST_AFTER, f"rank {rank} waited {waited:.1f} s"
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
