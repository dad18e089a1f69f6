"""Processes that serve as the ranks of one gloo group after another; torch is imported once for all."""

import datetime
import multiprocessing
import os
import signal
import traceback
from pathlib import Path

WAIT = 60  # seconds that a test gives its ranks
TIMEOUT = 15  # seconds that they give each other; both are far above what any takes


class Pool:
    """`run(function, size, *arguments)` calls function(rank, size, *arguments) on each rank of a group.

    Returns what each rank returned, or its exception. timeout is the process group's, in seconds; wait: for
    an answer.
    """

    def __init__(self, size, folder, wait=WAIT):
        self.wait = wait
        self.folder, self.stores, self.group = Path(folder), 0, None
        # Forked from a process that has imported torch and has no threads: three imports are saved.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.tensor", "realm_kernels"])
        self.ranks = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.ranks.append((process, ours))

    def run(self, function, size, *arguments, timeout=TIMEOUT):
        if self.group != (size, timeout):
            self.group = (size, timeout)
            self.stores += 1
        store = str(self.folder / f"store-{self.stores}")
        for rank, (_, pipe) in enumerate(self.ranks[:size]):
            pipe.send((function, rank, size, store, timeout, arguments))
        results = [self.answer(pipe) for _, pipe in self.ranks[:size]]
        if any(isinstance(result, Exception) for result in results):
            self.group = None  # ranks that stopped in the middle of a call may disagree about the next
        return results

    def answer(self, pipe):
        assert pipe.poll(self.wait), f"no answer from a rank within {self.wait} s"
        try:
            return pipe.recv()
        except EOFError:
            return EOFError("the rank died")

    def close(self):
        for process, pipe in self.ranks:
            process.kill()
            process.join()
            pipe.close()


def serve(pipe):
    """What a process of the pool does until its pipe closes."""
    import torch
    import torch.distributed as dist

    from realm_kernels.testing import poisoned_memory

    torch.set_num_threads(1)
    joined = None
    while True:
        try:
            function, rank, size, store, timeout, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if joined != store:
                if joined is not None:
                    dist.destroy_process_group()
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{store}",
                    rank=rank,
                    world_size=size,
                    timeout=datetime.timedelta(seconds=timeout),
                )
                joined = store
            torch.manual_seed(0)
            with poisoned_memory():
                result = function(rank, size, *arguments)
        except Exception as error:
            error.where = traceback.format_exc()  # a traceback itself does not travel
            result = error
        try:
            pipe.send(result)
        except BrokenPipeError:
            return


def die():
    """As a machine that loses its power: no destructor, no goodbye."""
    os.kill(os.getpid(), signal.SIGKILL)
