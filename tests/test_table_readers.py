"""Readers in other processes while writers commit: each keeps its version, until nobody reads it."""

import os
import pickle
import random
import signal
import time

import pytest
import torch

import realm_kernels as rk
from realm_kernels.table import manifest


def write(path, value, rows=6):
    with rk.TableWriter(path, dim=2, dtype=torch.float32, shard_rows=2) as writer:
        writer.append(torch.full((rows, 2), float(value)))


def edit(path, value):
    """Change one shard of three."""
    with rk.TableEditor(path, shard_rows=2) as editor:
        editor.replace([3], torch.full((1, 2), float(value)))


def shards(path):
    return {name for name in os.listdir(path) if name.startswith("shard")}


def named(path):
    return {shard.file for shard in manifest.read(path).shards}


class Reader:
    """A process that opens the table at once, and closes it when told."""

    def __init__(self, path):
        from_child, to_parent = os.pipe()
        from_parent, self.to_child = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.to_child)
            torch.set_num_threads(1)
            table = rk.ShardedTable.open(path)
            os.write(to_parent, b"o")
            os.read(from_parent, 1)
            rows = torch.cat(list(table.shards))
            os._exit(int(rows.unique().numel() - 1))  # its version was of one value
        assert os.read(from_child, 1) == b"o"
        for end in (from_child, to_parent, from_parent):
            os.close(end)

    def close(self):
        os.write(self.to_child, b"c")
        os.close(self.to_child)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.close(self.to_child)
        os.waitpid(self.pid, 0)


def test_an_old_version_goes_when_its_last_reader_does(tmp_path):
    write(tmp_path, 1)
    first = shards(tmp_path)
    readers = [Reader(tmp_path), Reader(tmp_path)]
    edit(tmp_path, 2)
    assert shards(tmp_path) == first | named(tmp_path) and len(shards(tmp_path)) == 4
    assert readers[0].close() == 0
    edit(tmp_path, 3)  # the version between, which nobody reads, goes
    assert shards(tmp_path) == first | named(tmp_path) and len(shards(tmp_path)) == 4
    readers[1].kill()  # the kernel gives the lock back
    edit(tmp_path, 4)
    assert shards(tmp_path) == named(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if manifest.RETIRED_NAME.fullmatch(name)]


def test_a_part_of_a_table_holds_its_version_and_a_copy_of_it_does_not(tmp_path):
    write(tmp_path, 1)
    first = shards(tmp_path)
    table = rk.ShardedTable.open(tmp_path)
    part = table.part(0, 3).to("cpu")
    pickle.loads(pickle.dumps(table))  # a copy holds nothing, and gives nothing back
    del table
    write(tmp_path, 2)
    assert shards(tmp_path) >= first
    del part
    write(tmp_path, 3)
    assert shards(tmp_path) == named(tmp_path)


def test_a_reader_between_opening_and_locking_takes_the_newer_version(tmp_path, monkeypatch):
    write(tmp_path, 1)
    lock = manifest.Hold.lock

    def late(hold):
        monkeypatch.undo()
        write(tmp_path, 2)
        lock(hold)

    monkeypatch.setattr(manifest.Hold, "lock", late)
    table = rk.ShardedTable.open(tmp_path)
    assert table.version == 2 and torch.cat(list(table.shards)).eq(2.0).all()


def test_a_held_manifest_that_was_damaged_stops_no_writer(tmp_path):
    write(tmp_path, 1)
    table = rk.ShardedTable.open(tmp_path)
    write(tmp_path, 2)
    (retired,) = (path for path in tmp_path.iterdir() if manifest.RETIRED_NAME.fullmatch(path.name))
    retired.write_bytes(b"{")
    write(tmp_path, 3)
    assert shards(tmp_path) == named(tmp_path) and torch.cat(list(table.shards)).eq(1.0).all()
    del table
    write(tmp_path, 4)
    assert not retired.exists()


def test_a_filesystem_without_hard_links_still_commits(tmp_path, monkeypatch):
    write(tmp_path, 1)
    table = rk.ShardedTable.open(tmp_path)

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path, 2)
    assert torch.cat(list(table.shards)).eq(1.0).all() and shards(tmp_path) == named(tmp_path)


@pytest.mark.parametrize("change", [write, edit], ids=["replaced", "edited"])
def test_readers_in_four_processes_see_whole_versions_while_a_writer_commits(tmp_path, change):
    write(tmp_path, 0)

    def read(number):
        draw, seen = random.Random(number), 0
        while seen < 30:
            table = rk.ShardedTable.open(tmp_path, verify=True, mmap=draw.random() < 0.7)
            assert table.version >= seen
            seen = table.version
            # By name, as a worker that maps them a second time would: they must still be there.
            if table.hold is not None:
                held = manifest.read_from(table.hold.descriptor, tmp_path)
                assert all((tmp_path / shard.file).exists() for shard in held.shards)
            time.sleep(draw.uniform(0, 0.003))
        os._exit(0)

    pids = []
    for number in range(4):
        pids.append(os.fork())
        if pids[-1] == 0:
            torch.set_num_threads(1)
            try:
                read(number)
            except BaseException as error:
                print(error)
                os._exit(1)
    for value in range(1, 30):
        change(tmp_path, value)
        time.sleep(0.005)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert statuses == [0] * 4
    change(tmp_path, 31)
    assert shards(tmp_path) == named(tmp_path)
