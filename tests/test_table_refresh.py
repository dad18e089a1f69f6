"""TableRefresher: when the table changes, to what, and that no failure changes it."""

import copy
import logging
import subprocess
import sys
import threading
import time

import pytest
import torch
from table_refresh_cases import D, Gated, N, encode, expected_value, failing, new_table, run, value_of

import realm_kernels as rk
from realm_kernels.table import TableRefresher


@pytest.mark.parametrize(("every", "lag"), [(1, 1), (4, 1), (4, 3), (4, 4), (7, 2)], ids=lambda n: str(n))
def test_fixed_lag_swaps_exactly_lag_steps_after_the_snapshot(every, lag):
    with TableRefresher(new_table(), encode, mode="fixed_lag", every=every, lag=lag) as refresher:
        values = run(refresher, range(20))
    assert values == [expected_value(step, every, lag) for step in range(20)]


def test_fixed_lag_counts_from_the_first_step():
    with TableRefresher(new_table(), encode, mode="fixed_lag", every=4, lag=2) as refresher:
        assert run(refresher, range(101, 109)) == [-1] * 6 + [105.0] * 2


def test_fixed_lag_waits_for_a_slow_refresh_and_counts_it():
    gated = Gated()
    with TableRefresher(new_table(), gated, mode="fixed_lag", every=4, lag=2) as refresher:
        run(refresher, range(6))
        gated.open_when_joined(refresher)
        assert run(refresher, [6]) == [4.0]
        assert refresher.metrics.late == 1


def test_fixed_lag_does_not_swap_early():
    done = threading.Event()

    def quick(snapshot):
        yield from encode(snapshot)
        done.set()

    with TableRefresher(new_table(), quick, mode="fixed_lag", every=4, lag=4) as refresher:
        run(refresher, range(5))
        assert done.wait(60)
        assert run(refresher, range(5, 9)) == [-1, -1, -1, 4.0]


def test_async_never_waits_and_swaps_at_the_next_boundary():
    gated = Gated()
    with TableRefresher(new_table(), gated, mode="async", every=4) as refresher:
        values = run(refresher, range(5))
        assert gated.started.wait(60)  # its first chunk is encoded
        assert values + run(refresher, range(5, 30)) == [-1.0] * 30
        assert gated.snapshots == [4] and refresher.metrics.late == 1
        gated.gate.set()
        refresher._worker.join()
        assert value_of(refresher.table) == -1.0  # only at a boundary
        assert refresher.step(30, lambda: {"value": 30})
        assert value_of(refresher.table) == 4.0 and refresher.metrics.age == 26


def test_a_snapshot_is_asked_for_only_when_due_and_kept_as_it_was():
    weight, asked = torch.zeros(()), []

    def snapshot():
        asked.append(weight.item())
        return {"value": weight}  # live

    with TableRefresher(new_table(), encode, mode="fixed_lag", every=3, lag=2) as refresher:
        values = []
        for step in range(12):
            refresher.step(step, snapshot)
            weight += 1
            values.append(value_of(refresher.table))
    assert asked == [3.0, 6.0, 9.0]
    assert values == [-1] * 5 + [3.0] * 3 + [6.0] * 3 + [9.0]


def test_a_swap_goes_into_the_same_storage():
    table = new_table()
    pointers, views = [shard.data_ptr() for shard in table.shards], [shard.view(-1) for shard in table.shards]
    with TableRefresher(table, encode, mode="fixed_lag", every=2, lag=1) as refresher:
        run(refresher, range(4))
    assert [shard.data_ptr() for shard in table.shards] == pointers
    assert all(view.eq(2.0).all() for view in views) and table.version == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_come_in_the_order_of_their_ids_in_the_dtype_of_the_table(dtype):
    rows = torch.randn(N, D)
    table = rk.ShardedTable.from_tensors([torch.zeros(n, D, dtype=dtype) for n in (1, 0, 7, 2)])
    with TableRefresher(table, lambda _: rows.split(4), mode="async", every=1) as refresher:
        refresher.build(0, dict)
    assert torch.equal(torch.cat(list(table.shards)), rows.to(dtype))


def test_encoding_in_the_thread_has_the_bits_of_the_main_thread():
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(96, 200), torch.nn.GELU(), torch.nn.Linear(200, 64)).eval()
    corpus = torch.randn(300, 96)

    def encode_corpus(snapshot):
        twin = copy.deepcopy(model)
        twin.load_state_dict(snapshot)
        yield from (torch.nn.functional.layer_norm(twin(part), (64,)) for part in corpus.split(70))

    table = rk.ShardedTable.from_tensors([torch.zeros(300, 64)])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with TableRefresher(table, encode_corpus, mode="fixed_lag", every=1, lag=1) as refresher:
            for step in range(3):
                refresher.step(step, model.state_dict)
        with torch.no_grad():
            expected = torch.cat(list(encode_corpus(model.state_dict())))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(table.shards[0], expected)


def test_encode_runs_without_gradients_in_another_thread():
    seen = []

    def look(snapshot):
        seen.append((torch.is_grad_enabled(), threading.current_thread() is threading.main_thread()))
        yield from encode(snapshot)

    with TableRefresher(new_table(), look, mode="async", every=1) as refresher:
        refresher.build(0, lambda: {"value": 1})
    assert seen == [(False, False)]


def test_a_refresh_leaves_the_random_numbers_of_the_trainer_alone():
    model = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Dropout(0.5))
    twin = copy.deepcopy(model).eval()

    def encode_corpus(snapshot):
        twin.load_state_dict(snapshot)
        yield twin(torch.ones(N, D))

    def draws(refresher):
        torch.manual_seed(0)
        numbers = []
        for step in range(8):
            if refresher is not None:
                refresher.step(step, model.state_dict)
            numbers.append(torch.rand(2))
        return torch.stack(numbers)

    with TableRefresher(new_table(), encode_corpus, mode="fixed_lag", every=2, lag=1) as refresher:
        assert torch.equal(draws(refresher), draws(None))
        assert refresher.metrics.refreshes == 3


def test_a_failed_attempt_is_repeated_with_the_same_snapshot(caplog):
    encode_or_fail = failing(1)
    with TableRefresher(new_table(), encode_or_fail, mode="fixed_lag", every=4, lag=2) as refresher:
        values = run(refresher, range(12))
    assert values == [expected_value(step, 4, 2) for step in range(12)]  # as if nothing had happened
    assert encode_or_fail.calls == [4, 4, 8]
    assert refresher.metrics.failures == 1 and refresher.metrics.refreshes == 2
    assert (
        "refresh of step 4 failed (attempt 1 of 2), the table stays as it is: RuntimeError: boom"
        in caplog.text
    )


@pytest.mark.parametrize("mode", ["async", "fixed_lag"])
def test_a_refresh_that_keeps_failing_leaves_the_table_and_the_next_one_is_tried(mode, caplog):
    encode_or_fail = failing(3)
    lag = 2 if mode == "fixed_lag" else None
    with TableRefresher(new_table(), encode_or_fail, mode=mode, every=4, lag=lag, attempts=3) as refresher:
        values = []
        for step in range(12):
            refresher.step(step, lambda step=step: {"value": step})
            refresher._worker.join()  # so that "async" does not depend on the clock either
            values.append(value_of(refresher.table))
        metrics = refresher.metrics
    swap = 10 if mode == "fixed_lag" else 9
    assert values == [-1.0] * swap + [8.0] * (12 - swap)
    assert encode_or_fail.calls == [4, 4, 4, 8]
    assert (metrics.failures, metrics.refreshes, metrics.age, metrics.version) == (3, 1, 3, 1)
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert errors == ["refresh of step 4 is given up, the table of step 0 stays in use: RuntimeError: boom"]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([torch.zeros(9, D)], r"encode must yield N=10 rows in all, got 9"),
        ([torch.zeros(9, D), torch.zeros(2, D)], r"encode must yield N=10 rows in all, got more"),
        ([], r"encode must yield N=10 rows in all, got 0"),
        ([torch.zeros(10, 4)], r"a chunk of encode must be \[n, D\] = \[any, 3\], got float32\[10, 4\]"),
        ([torch.zeros(10)], r"a chunk of encode must be \[n, D\], 2 axes"),
        ([torch.zeros(10, D).int()], r"a chunk of encode must be of dtype float32, bfloat16, float16"),
        ([[0.0]], r"a chunk of encode must be a Tensor \[n, D\], got list"),
        (None, "NoneType"),
    ],
    ids=["too-few", "too-many", "none", "wrong-width", "one-axis", "int32", "list", "not-iterable"],
)
def test_what_encode_must_yield(chunks, message):
    table = new_table()
    with TableRefresher(table, lambda _: chunks, mode="async", every=1, attempts=1) as refresher:
        with pytest.raises((ValueError, TypeError), match=message):
            refresher.build(0, dict)
        assert value_of(table) == -1.0 and table.version == 0 and refresher.metrics.failures == 1
        refresher.step(1, dict)
        refresher._worker.join()
        assert not refresher.step(2, dict)  # in the background the same failure stops nobody


def test_build_makes_the_first_table_and_drops_what_runs():
    gated = Gated()
    table = new_table()
    with TableRefresher(
        table, lambda s: gated(s) if s["value"] == 2 else encode(s), mode="async", every=2
    ) as refresher:
        refresher.build(0, lambda: {"value": 0})
        assert value_of(table) == 0.0
        run(refresher, range(3))
        assert gated.started.wait(60)
        gated.open_when_joined(refresher)
        refresher.build(3, lambda: {"value": 33})
        assert value_of(table) == 33.0 and refresher.metrics.refreshes == 2
        assert refresher.metrics.failures == 0


def test_metrics_tell_how_it_goes():
    with TableRefresher(new_table(), encode, mode="fixed_lag", every=4, lag=1) as refresher:
        assert refresher.metrics == rk.table.RefreshMetrics(0, 0, 0, 0, 0.0, 0)
        ages = []
        for step in range(11):
            refresher.step(step, lambda: {"value": 1})
            ages.append(refresher.metrics.age)
        metrics = refresher.metrics
    assert ages == [0, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    assert (metrics.refreshes, metrics.version, metrics.failures) == (2, 2, 0) and metrics.rows_per_second > 0


def test_close_stops_at_the_next_chunk_and_joins():
    def endless(snapshot):
        while True:
            time.sleep(0.001)
            yield torch.zeros(0, D)

    refresher = TableRefresher(new_table(), endless, mode="async", every=1)
    run(refresher, range(3))
    refresher.close()
    refresher.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "table-refresh"]
    assert refresher.metrics.failures == 0 and value_of(refresher.table) == -1.0
    for call in (lambda: refresher.step(3, dict), lambda: refresher.build(3, dict)):
        with pytest.raises(RuntimeError, match="this refresher is closed"):
            call()


def test_an_exception_in_the_trainer_joins_the_thread():
    refresher = TableRefresher(new_table(), encode, mode="async", every=1)
    with pytest.raises(KeyboardInterrupt), refresher:
        run(refresher, range(2))
        raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name == "table-refresh"]


def test_a_program_that_forgets_to_close_still_ends():
    program = """
import time, torch, realm_kernels as rk
def endless(snapshot):
    while True:
        time.sleep(0.001)
        yield torch.zeros(0, 2)
table = rk.ShardedTable.from_tensors([torch.zeros(4, 2)])
refresher = rk.TableRefresher(table, endless, mode="async", every=1)
for step in range(3):
    refresher.step(step, dict)
print("trained")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"table": torch.zeros(3, 2)},
            TypeError,
            r"table must be a ShardedTable or a DistributedTable, got float32\[3, 2\]",
        ),
        (
            {"table": rk.ShardedTable.from_tensors([torch.zeros(3, 4)[:, ::2]])},
            ValueError,
            "table must have contiguous shards to be swapped into, got shard 0 strided",
        ),
        ({"encode": [1]}, TypeError, r"encode must be a function of a snapshot, got list"),
        ({"mode": "sync"}, ValueError, "mode must be one of 'async', 'fixed_lag', got 'sync'"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 2.0}, TypeError, "every must be an int, got float 2.0"),
        ({"attempts": 0}, ValueError, "attempts must be at least 1, got 0"),
        ({"lag": None}, ValueError, r"lag must be in \[1, every=4\] in mode 'fixed_lag', got None"),
        ({"lag": 0}, ValueError, r"lag must be in \[1, every=4\] in mode 'fixed_lag', got 0"),
        ({"lag": 5}, ValueError, r"lag must be in \[1, every=4\] in mode 'fixed_lag', got 5"),
        ({"mode": "async"}, ValueError, "lag must be None in mode 'async', .* got 2"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) and "table" not in value else "",
)
def test_bad_arguments_are_refused(arguments, error, message):
    good = {"table": new_table(), "encode": encode, "mode": "fixed_lag", "every": 4, "lag": 2}
    with pytest.raises(error, match="^TableRefresher: " + message):
        TableRefresher(**good | arguments)


@pytest.mark.parametrize(
    ("mode", "step", "error", "message"),
    [
        ("async", 3, ValueError, "step must grow, it was 3, got 3"),
        ("fixed_lag", 5, ValueError, "step must grow by one in mode 'fixed_lag', .* it was 3, got 5"),
        ("async", 4.0, TypeError, "step must be an int, got float 4.0"),
    ],
    ids=["again", "gap", "float"],
)
def test_steps_must_follow_each_other(mode, step, error, message):
    lag = 2 if mode == "fixed_lag" else None
    with TableRefresher(new_table(), encode, mode=mode, every=4, lag=lag) as refresher:
        run(refresher, range(4))
        with pytest.raises(error, match="^TableRefresher: " + message):
            refresher.step(step, dict)


@pytest.mark.gpu
def test_on_a_gpu_a_captured_search_sees_the_swapped_rows():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    table = new_table().to("cuda")
    picked = torch.tensor([0, 9], device="cuda")
    table.rows(picked)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = table.rows(picked)

    def encode_on_gpu(snapshot):
        yield from (chunk.to("cuda", non_blocking=True) for chunk in encode(snapshot))

    with TableRefresher(table, encode_on_gpu, mode="fixed_lag", every=2, lag=1) as refresher:
        for step in range(8):
            refresher.step(step, lambda step=step: {"value": torch.tensor(step, device="cuda")})
            graph.replay()
            assert captured.unique().tolist() == [expected_value(step, 2, 1)]
