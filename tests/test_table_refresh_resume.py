"""TableRefresher on disk and across checkpoints: what is committed, and that a resumed run loses nothing."""

import copy
import errno
import io
import os
import random
import signal
import traceback

import pytest
import torch
from table_refresh_cases import D, Gated, N, encode, new_table, run, value_of

import realm_kernels as rk
from realm_kernels.table import TableRefresher

# On disk.


def test_every_refresh_is_committed_before_it_is_used(tmp_path):
    table = new_table()
    with TableRefresher(table, encode, mode="fixed_lag", every=2, lag=1, path=tmp_path / "t") as refresher:
        for step in range(8):
            if refresher.step(step, lambda step=step: {"value": step}):
                stored = rk.ShardedTable.open(tmp_path / "t", verify=True)
                assert value_of(stored) == value_of(table) and stored.version == table.version
    assert table.version == 3


def test_a_killed_run_without_a_checkpoint_begins_at_the_last_committed_table(tmp_path):
    with TableRefresher(new_table(), encode, mode="fixed_lag", every=2, lag=1, path=tmp_path) as refresher:
        run(refresher, range(6))
    table = rk.ShardedTable.open(tmp_path, mmap=False)
    assert value_of(table) == 4.0 and table.version == 2
    with TableRefresher(table, encode, mode="fixed_lag", every=2, lag=1, path=tmp_path) as refresher:
        assert run(refresher, range(6, 10)) == [4.0, 4.0, 4.0, 8.0]
    assert table.version == 3


def test_a_mapped_table_is_refreshed_in_memory_only(tmp_path):
    new_table().save(tmp_path)
    table = rk.ShardedTable.open(tmp_path)
    with TableRefresher(table, encode, mode="async", every=1) as refresher:
        refresher.build(0, lambda: {"value": 5})
    assert value_of(table) == 5.0 and value_of(rk.ShardedTable.open(tmp_path, verify=True)) == -1.0


def test_a_full_disk_costs_durability_only(tmp_path, monkeypatch, caplog):
    path = tmp_path / "t"

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    table = new_table()
    with TableRefresher(table, encode, mode="fixed_lag", every=2, lag=1, path=path) as refresher:
        assert run(refresher, range(4)) == [-1.0, -1.0, -1.0, 2.0]
        monkeypatch.setattr(os, "write", full)
        assert run(refresher, range(4, 6)) == [2.0, 4.0]
        monkeypatch.undo()
        assert value_of(rk.ShardedTable.open(path, verify=True)) == 2.0
        assert refresher.metrics.failures == 1 and table.version == 2
        assert "refresh of step 4 is not on disk: OSError: [Errno 28] cannot write this file" in caplog.text
        assert run(refresher, range(6, 8)) == [4.0, 6.0]
    stored = rk.ShardedTable.open(path, verify=True)
    assert value_of(stored) == 6.0 and stored.version == table.version == 3


# Checkpoint and resume.


class Trainer:
    """A small REALM-shaped loop: the loss depends on the table, the table on weights of steps ago."""

    def __init__(self, mode="fixed_lag", every=5, lag=3, path=None):
        torch.manual_seed(0)
        self.corpus, self.questions = torch.randn(N, 6), torch.randn(200, 6)
        self.embedder = torch.nn.Linear(6, D)
        self.optimizer = torch.optim.SGD(self.embedder.parameters(), lr=0.1)
        twin = copy.deepcopy(self.embedder)

        def encode_corpus(snapshot):
            twin.load_state_dict(snapshot)
            yield from (twin(part) for part in self.corpus.split(4))

        self.table = new_table()
        self.refresher = TableRefresher(self.table, encode_corpus, mode=mode, every=every, lag=lag, path=path)

    def begin(self):
        self.refresher.build(0, self.embedder.state_dict)
        return self

    def train(self, steps):
        losses = []
        for step in steps:
            self.refresher.step(step, self.embedder.state_dict)
            top = rk.mips_topk(self.embedder(self.questions[step : step + 2]), self.table, 4)
            loss = -top.scores.log_softmax(dim=1)[:, 0].mean() + top.scores.square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def checkpoint(self):
        file = io.BytesIO()
        parts = (self.embedder, self.optimizer, self.refresher)
        torch.save([part.state_dict() for part in parts], file)
        return file.getvalue()

    def resume(self, checkpoint):
        states = torch.load(io.BytesIO(checkpoint), weights_only=True)
        for part, state in zip((self.embedder, self.optimizer, self.refresher), states, strict=True):
            part.load_state_dict(state)
        return self


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_a_run_resumed_at_any_step_has_the_losses_of_an_undisturbed_one(tmp_path, on_disk):
    steps = 24  # the last is a swap
    undisturbed = Trainer().begin()
    expected = undisturbed.train(range(steps))
    undisturbed.refresher.close()
    assert len(set(expected)) == steps and undisturbed.refresher.metrics.refreshes == 1 + 4

    for stop in range(1, steps, 2):
        path = tmp_path / str(stop) if on_disk else None
        first = Trainer(path=path).begin()
        losses = first.train(range(stop))
        checkpoint, first_age = first.checkpoint(), first.refresher.metrics.age
        first.train(range(stop, min(stop + 4, steps)))  # what the crash throws away, commits excepted
        first.refresher.close()
        second = Trainer(path=path).resume(checkpoint)
        losses += second.train(range(stop, steps))
        second.refresher.close()
        assert losses == expected, f"resumed at {stop}"
        resumed, whole = second.refresher.metrics, undisturbed.refresher.metrics
        assert (resumed.age, resumed.refreshes) == (whole.age, whole.refreshes)

        third = Trainer().resume(checkpoint)  # the age is right at once, not only after the next swap
        assert third.refresher.metrics.age == first_age
        third.refresher.close()


def test_a_resumed_run_reads_the_same_rows_back_instead_of_encoding_them(tmp_path):
    first = Trainer(path=tmp_path).begin()
    first.train(range(10))  # swapped at 8
    checkpoint = first.checkpoint()
    first.refresher.close()
    second = Trainer(path=tmp_path)

    def never(snapshot):
        raise AssertionError("encoded again")

    second.refresher._worker.encode = never
    second.resume(checkpoint)
    assert torch.equal(torch.cat(list(second.table.shards)), torch.cat(list(first.table.shards)))
    assert second.table.version == first.table.version
    second.refresher.close()


def test_a_damaged_table_on_disk_is_encoded_again_on_resume(tmp_path, caplog):
    first = Trainer(path=tmp_path).begin()
    first.train(range(10))
    checkpoint = first.checkpoint()
    first.refresher.close()
    (shard,) = tmp_path.glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    second = Trainer(path=tmp_path).resume(checkpoint)
    second.refresher.close()
    assert torch.equal(torch.cat(list(second.table.shards)), torch.cat(list(first.table.shards)))
    assert "the table is encoded again, it cannot be read back" in caplog.text and shard.name in caplog.text


def test_an_untouched_table_is_left_as_it_is_on_resume():
    first = Trainer()
    losses = first.train(range(12))
    again = Trainer()
    assert again.train(range(4)) == losses[:4]
    checkpoint = again.checkpoint()
    again.refresher.close()
    resumed = Trainer().resume(checkpoint)
    assert resumed.train(range(4, 12)) == losses[4:]
    first.refresher.close(), resumed.refresher.close()


def test_async_resumes_its_pending_refresh():
    gated = Gated()
    with TableRefresher(new_table(), gated, mode="async", every=4) as refresher:
        run(refresher, range(6))
        state = refresher.state_dict()
        gated.gate.set()
    assert (state["pending_step"], state["pending"]) == (4, {"value": 4})
    with TableRefresher(new_table(), encode, mode="async", every=4) as refresher:
        refresher.load_state_dict(state)
        refresher._worker.join()
        assert run(refresher, range(6, 8)) == [4.0, 4.0]
        assert refresher.metrics.age == 3


def test_a_state_of_something_else_is_refused():
    message = r"state must be a TableRefresher's state_dict\(\), got the keys \['w'\]"
    refresher = TableRefresher(new_table(), encode, mode="async", every=4)
    with pytest.raises(ValueError, match=message):
        refresher.load_state_dict({"w": 1})


def test_a_trainer_killed_while_it_refreshes_resumes_to_the_losses_of_an_undisturbed_run(tmp_path):
    steps = 40
    undisturbed = Trainer().begin()
    expected = undisturbed.train(range(steps))
    undisturbed.refresher.close()

    def work(more, delay):
        """Train on from the last checkpoint, one after every step; die `delay` seconds into a later step."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends the process there and then
        torch.set_num_threads(1)
        path, trainer, losses = tmp_path / "checkpoint", Trainer(path=tmp_path / "t"), []
        if path.exists():
            losses, state = torch.load(path, weights_only=True)
            trainer.resume(state)
        else:
            trainer.begin()
        last = len(losses) + more
        for step in range(len(losses), steps):
            if step == last:
                signal.setitimer(signal.ITIMER_REAL, delay)
            losses += trainer.train([step])
            torch.save([losses, trainer.checkpoint()], tmp_path / "new")
            os.replace(tmp_path / "new", path)
        trainer.refresher.close()

    kills, draw = 0, random.Random(0)
    while True:
        more, delay = draw.randint(0, 2) if kills < 25 else steps, draw.uniform(1e-4, 3e-3)
        pid = os.fork()
        if pid == 0:
            try:
                work(more, delay)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSIGNALED(status):
            break
        kills += 1
    assert os.WEXITSTATUS(status) == 0 and kills > 4
    assert torch.load(tmp_path / "checkpoint", weights_only=True)[0] == expected
