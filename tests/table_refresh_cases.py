"""A table in which a row tells which refresh it came from, and encoders that wait, fail or just work."""

import threading

import torch

import realm_kernels as rk

N, D = 10, 3


def new_table(sizes=(4, 0, 6)):
    return rk.ShardedTable.from_tensors([torch.full((n, D), -1.0) for n in sizes])


def value_of(table):
    """The one value that every row has: a mix of two refreshes would have two."""
    (value,) = torch.cat(list(table.shards)).unique().tolist()
    return value


def encode(snapshot):
    """Rows that all hold the snapshot's value, in uneven chunks that straddle the shards."""
    for n in (3, 0, 5, 2):
        yield torch.full((n, D), float(snapshot["value"]))


class Gated:
    """An encode that stops after its first chunk until the gate opens; tells what it was called with."""

    def __init__(self):
        self.gate = threading.Event()
        self.started = threading.Event()
        self.snapshots = []

    def open_when_joined(self, refresher):
        """Open the gate at the instant the trainer begins to wait."""
        join = refresher._worker.join
        refresher._worker.join = lambda: (self.gate.set(), join())

    def __call__(self, snapshot):
        self.snapshots.append(snapshot["value"])
        chunks = encode(snapshot)
        yield next(chunks)
        self.started.set()
        assert self.gate.wait(60)
        yield from chunks


def failing(times):
    """An encode that fails in its middle the first `times` times."""
    calls = []

    def encode_or_fail(snapshot):
        calls.append(snapshot["value"])
        chunks = encode(snapshot)
        yield next(chunks)
        if len(calls) <= times:
            raise RuntimeError("boom")
        yield from chunks

    encode_or_fail.calls = calls
    return encode_or_fail


def run(refresher, steps):
    """Step through `steps`; the table's value after each boundary. Snapshots hold their step."""
    values = []
    for step in steps:
        refresher.step(step, lambda step=step: {"value": step})
        values.append(value_of(refresher.table))
    return values


def expected_value(step, every, lag):
    """What fixed_lag promises: the last multiple of `every` that is `lag` steps old; -1 before."""
    taken = (step - lag) // every * every
    return float(taken) if taken > 0 else -1.0
