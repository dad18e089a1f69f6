"""encode in a process or on ranks: the same refresh as in a thread, and trouble there stays there."""

import multiprocessing
import time

import pytest
import ranks_pool
import table_encoder_cases as cases
import torch
from table_encoder_cases import D, N

import realm_kernels as rk
from realm_kernels.table import ProcessEncoder, RanksEncoder, TableRefresher


def new_table():
    return rk.ShardedTable.from_tensors([torch.full((n, D), -1.0) for n in (4, 0, 6)])


def value_of(table):
    (value,) = torch.cat(list(table.shards)).unique().tolist()
    return value


@pytest.fixture(scope="module")
def process():
    """One for all tests."""
    # Started from a server that has imported torch: ten times quicker.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "realm_kernels"])
    encoder = ProcessEncoder(cases.encode, threads=2, timeout=60)
    yield encoder
    encoder.close()
    assert not [child for child in multiprocessing.active_children() if child.name == "table-refresh"]


class Kept(rk.table.encoders.Encoder):
    """The same, but it outlives its refresher."""

    def __init__(self, encoder):
        self.encoder = encoder

    def __call__(self, snapshot):
        return self.encoder(snapshot)

    def interrupt(self):
        self.encoder.interrupt()


def test_a_process_refreshes_as_a_thread_does(process, tmp_path):
    values = []
    for encode, threads in ((cases.encode, torch.get_num_threads()), (Kept(process), 2)):
        table = new_table()
        with TableRefresher(table, encode, mode="fixed_lag", every=3, lag=2, path=tmp_path) as refresher:
            values.append([])
            for step in range(10):
                snapshot = {"value": torch.tensor(step), "threads": threads}
                refresher.step(step, lambda snapshot=snapshot: snapshot)
                values[-1].append(value_of(table))
        assert refresher.metrics.failures == 0 and refresher.metrics.refreshes == 2
    assert values[0] == values[1] and values[0][-1] == 6.0


@pytest.mark.parametrize("trouble", ["raises", "NaN", "killed", "hangs"])
def test_trouble_in_the_process_is_counted_and_the_next_attempt_succeeds(process, tmp_path, caplog, trouble):
    snapshot = {"value": 7, "trouble": trouble, "once": str(tmp_path / "once")}
    table = new_table()
    process.timeout = 5 if trouble == "hangs" else 60
    try:
        # Started, so that the time limit is not spent on its start.
        assert len(torch.cat(list(process({"value": 1})))) == N
        with TableRefresher(table, Kept(process), mode="fixed_lag", every=2, lag=1, attempts=1) as refresher:
            for step in range(4):
                refresher.step(step, lambda: snapshot)
            assert value_of(table) == -1.0 and refresher.metrics.failures == 1
            process.timeout = 60
            refresher.step(4, lambda: snapshot)
            assert refresher.step(5, dict) and value_of(table) == 7.0
    finally:
        process.timeout = 60
    words = {
        "raises": "encode failed in its process: RuntimeError: boom",
        "NaN": "encode must yield finite numbers, got NaN or infinity in rows [4, 10)",
        "killed": "the process of encode died, exit code -9",
        "hangs": "sent no chunk in 5 seconds: it hangs",
    }
    assert words[trouble] in caplog.text


def test_closing_ends_a_process_that_hangs(tmp_path):
    table, encoder = new_table(), ProcessEncoder(cases.encode)
    refresher = TableRefresher(table, encoder, mode="async", every=1)
    once = tmp_path / "once"
    for step in range(2):
        refresher.step(step, lambda: {"value": 1, "trouble": "hangs", "once": str(once)})
    while not once.exists():
        time.sleep(0.01)
    refresher.close()
    assert refresher.metrics.failures == 0 and value_of(table) == -1.0


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pool = ranks_pool.Pool(4, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def expected(step, size, first):
    """What rank 0 must see at a step: the last swapped snapshot, by the ranks that hold rows 0 and 4."""
    taken = (step - 1) // 2 * 2
    if taken <= 0:
        return -1.0
    return taken + 100.0 * (1 if size == 2 or first else 3)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("trouble", [None, "raises"])
def test_ranks_of_their_own_encode_a_part_each(pool, tmp_path, size, trouble):
    (seen, failures), *_ = pool.run(cases.refresh_on_ranks, size, trouble, str(tmp_path))
    assert seen == [[expected(step, size, first) for first in (True, False)] for step in range(8)]
    assert failures == (1 if trouble else 0)  # and the second attempt succeeds


@pytest.mark.parametrize(("trouble", "size"), [("killed", 3), ("hangs", 2)])
def test_a_rank_that_dies_or_hangs_leaves_the_old_table_serving(tmp_path, trouble, size):
    pool = ranks_pool.Pool(size, tmp_path)  # its own: a rank is lost for good
    (seen, failures), *others = pool.run(cases.refresh_on_ranks, size, trouble, str(tmp_path))
    pool.close()
    assert (
        seen == [[-1.0, -1.0]] * 8 and failures == 3
    )  # one attempt at each of three snapshots: a lost rank does not come back
    assert isinstance(others[-1], EOFError)


def test_bad_arguments_are_refused():
    with pytest.raises(
        TypeError, match="^ProcessEncoder: encode must be a function of a snapshot, got int 3"
    ):
        ProcessEncoder(3)
    with pytest.raises(ValueError, match="^ProcessEncoder: threads must be at least 1, got 0"):
        ProcessEncoder(cases.encode, threads=0)
    with pytest.raises(
        ValueError, match="^ProcessEncoder: timeout must be more than 0 seconds, or None, got 0"
    ):
        ProcessEncoder(cases.encode, timeout=0)
    with pytest.raises(TypeError, match="^RanksEncoder: group must be a ProcessGroup"):
        RanksEncoder(None)
