"""What the processes and ranks of tests/test_table_encoders.py run; importable from a spawned process."""

import os
import signal
import time

import torch
import torch.distributed as dist

import realm_kernels as rk

N, D = 10, 3


def encode(snapshot):
    """Rows that all hold the snapshot's value; a word in it makes trouble, once for each file it names."""
    trouble = snapshot.get("trouble")
    if trouble and not os.path.exists(snapshot["once"]):
        open(snapshot["once"], "w").close()
        yield torch.zeros(4, D)
        if trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif trouble == "hangs":
            time.sleep(600)
        elif trouble == "raises":
            raise RuntimeError("boom")
        elif trouble == "NaN":
            yield torch.full((6, D), torch.nan)
            return
    assert not torch.is_grad_enabled()
    assert snapshot.get("threads", torch.get_num_threads()) == torch.get_num_threads()
    value = float(snapshot["value"])
    for n in (3, 0, 5, 2):
        yield torch.full((n, D), value).bfloat16() if n == 5 else torch.full((n, D), value)


def refresh_on_ranks(rank, size, trouble, folder):
    """Rank 0 trains; the others encode a part each. What rank 0 saw: a value a step, and the failures."""
    group = dist.new_group(list(range(size)), backend="gloo")
    part = {2: [N], 3: [4, 6], 4: [4, 0, 6]}[size]

    def encode_part(snapshot):
        assert isinstance(snapshot["weight"], torch.Tensor) and not torch.is_grad_enabled()
        once = os.path.join(folder, f"once-{size}")
        if trouble and rank == size - 1 and snapshot["value"] == 2 and not os.path.exists(once):
            open(once, "w").close()
            yield torch.zeros(1, D)
            if trouble == "hangs":
                time.sleep(5)
            if trouble in ("killed", "hangs"):
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("boom")
        for n in (part[rank - 1] - part[rank - 1] // 2, part[rank - 1] // 2):
            yield torch.full((n, D), float(snapshot["value"]) + 100 * rank)

    if rank > 0:
        rk.table.serve_encoder(encode_part, group)
        return None
    table = rk.ShardedTable.from_tensors([torch.full((n, D), -1.0) for n in (4, 0, 6)])
    seen = []
    encoder = rk.table.RanksEncoder(group, timeout=1.5 if trouble == "hangs" else None)
    with rk.TableRefresher(table, encoder, mode="fixed_lag", every=2, lag=1) as refresher:
        for step in range(8):
            refresher.step(step, lambda step=step: {"value": step, "weight": torch.ones(3)})
            seen.append([shard[0, 0].item() for shard in table.shards if len(shard)])
        failures = refresher.metrics.failures
    return seen, failures
