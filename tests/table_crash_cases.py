"""Tables of one value, so that a mix of two versions has two; writers that die or fail at a chosen call."""

import os
import signal
from contextlib import contextmanager

import torch

import realm_kernels as rk
from realm_kernels.table import manifest

ROWS = 3

# Every call that changes a directory or makes it durable.
CALLS = ("open", "write", "pwrite", "fsync", "link", "replace", "unlink", "mkdir", "rmdir")


def write(path, value, rows=ROWS, **arguments):
    """A table whose every entry is `value`, in several shards and several appends."""
    with rk.TableWriter(path, dim=3, dtype=torch.float32, shard_rows=2, **arguments) as writer:
        for _ in range(rows):
            writer.append(torch.full((1, 3), float(value)))
    return writer.version


def value_of(path):
    """The one value in the table at `path`: checks that it is whole and that its checksums are right."""
    table = rk.ShardedTable.open(path, verify=True)
    rows = torch.cat(list(table.shards))
    if table.row_mask is not None:
        rows = rows[table.row_mask]
    values = rows.unique().tolist()
    assert rows.shape == (ROWS, 3) and len(values) == 1, f"a mix: {rows}"
    return values[0]


def names(path):
    return sorted(name for name in os.listdir(path) if name != ".lock")


def is_clean(path):
    """Whether the directory holds one table and nothing else."""
    return len(names(path)) == 1 + -(-ROWS // 2)


@contextmanager
def before_call(number, action):
    """Do `action(name)` before the number-th of CALLS in this block, from 0; yields the list of calls."""
    calls = []
    originals = {name: getattr(os, name) for name in CALLS}

    def wrap(name):
        def call(*args, **kwargs):
            calls.append((name, args))
            if len(calls) == number + 1:
                action(name)
            return originals[name](*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def in_child(work):
    """Run `work()` in a forked child; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def die(_name):
    os.kill(os.getpid(), signal.SIGKILL)


def live_ids(path):
    """Of the rows that are there; the table itself is let go, so that nothing of its version is held."""
    table = rk.ShardedTable.open(path)
    ids = table.ids(torch.arange(table.num_rows))
    return ids if table.row_mask is None else ids[table.row_mask]


def change(path, value):
    """Give the live rows another value in place."""
    ids = live_ids(path)
    with rk.TableEditor(path, shard_rows=2) as editor:
        editor.replace(ids, torch.full((ROWS, 3), float(value)))


def turn_and_compact(path, value):
    """Append rows of another value and take the old ones out; what is live has one value again."""
    ids = live_ids(path)
    with rk.TableEditor(path, shard_rows=2) as editor:
        editor.append(torch.full((ROWS, 3), float(value)))
        editor.tombstone(ids)
        editor.compact()


def is_exact(path):
    """Whether the directory holds the files of the committed version, and no other."""
    current = manifest.read(path)
    return set(names(path)) == {"manifest.json", *(shard.file for shard in current.shards)}
