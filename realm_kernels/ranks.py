"""The collectives that an op over several ranks is made of, on torch.distributed; a failure is one line."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .validation import describe

# First field of every header. Ranks that enter different calls find out there, instead of mixing their bytes.
CALLS = ("from_local", "mips_topk", "rows", "marginal_loss", "linear_marginal_loss", "refresh")
FIELDS = 8  # of every header, so that headers of different calls have one size
HEADER_BYTES = 8 * (2 + FIELDS)

# torch 2.13 warns of all_gather_into_tensor, and older ones do not have its successor.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class LostRankError(RuntimeError):
    """A rank that this one works with died, hangs, or made another call. The job cannot go on: end all ranks
    and start again from the last checkpoint.
    """


class Ranks:
    """The ranks of a process group as `rank`, one of `size`, sees them. All make each call of this alike.

    group: None is the default group. device: where the tensors are, which the group's backend must serve.
    Raises TypeError or ValueError where there is no such group, or where it cannot move tensors of `device`.
    """

    def __init__(self, op: str, group: Any, device: torch.device) -> None:
        if not dist.is_available():
            raise ValueError(f"{op}: group must be a process group, but this torch was built without any")
        if not dist.is_initialized():
            raise ValueError(
                f"{op}: group must be an initialised process group, got {group!r} before "
                "torch.distributed.init_process_group()"
            )
        if group is dist.GroupMember.NON_GROUP_MEMBER:  # what new_group() gives to all others
            raise ValueError(f"{op}: group must hold this process, got a group of other ranks only")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"{op}: group must be a ProcessGroup or None, got {describe(group)}")
        self.op = op
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        serving = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
        self.backend = serving.get(device.type, "none")
        # gloo gathers CUDA tensors, but does not exchange them.
        if self.backend == "none" or (self.backend == "gloo" and device.type != "cpu"):
            raise ValueError(
                f"{op}: group must have a backend that moves {device.type} tensors "
                f"(gloo for cpu, nccl for cuda), got {dist.get_backend_config(group)}"
            )

    def serving(self, op: str) -> Ranks:
        """The same ranks, in whose errors `op` speaks."""
        ranks = copy.copy(self)
        ranks.op = op
        return ranks

    def agree(self, call: str, fields: Sequence[int], problem: Exception | None = None) -> list[list[int]]:
        """Every rank's `fields`; the one place of a call where sizes reach the host.

        A rank that found a `problem` with its arguments comes here all the same, or the others would wait for
        it until the timeout. It raises the problem; the others a RuntimeError that names the rank.
        """
        header = [CALLS.index(call), int(problem is None), *fields, *[0] * (FIELDS - len(fields))]
        local = torch.tensor([header], dtype=torch.int64).to(self.device)
        headers = self.gather(local, [1] * self.size, f"the sizes of {call}").tolist()
        if problem is not None:
            raise problem
        for rank, (other, fine, *_) in enumerate(headers):
            if other != header[0]:
                came = CALLS[other] if 0 <= other < len(CALLS) else "something else"
                raise RuntimeError(
                    f"{self.op}: all ranks must make the same calls in the same order, but rank {rank} came "
                    f"to {came} where rank {self.rank} came to {call}"
                )
            if not fine:
                raise RuntimeError(f"{self.op}: rank {rank} refused its arguments; its own error says why")
        return [others[2 : 2 + len(fields)] for others in headers]

    def gather(self, tensor: Tensor, counts: Sequence[int], what: str) -> Tensor:
        """The rows of all ranks, in the order of the ranks: [counts[rank], ...] -> [sum(counts), ...]."""
        longest = max(counts)
        if longest * math.prod(tensor.shape[1:]) == 0:
            return tensor.new_empty(sum(counts), *tensor.shape[1:])
        # All-gather wants equal sizes: shorter ones are padded, and the padding is dropped on arrival.
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = tensor.new_empty(self.size * longest, *tensor.shape[1:])
        self._move(what, lambda: _all_gather(gathered, padded, group=self.group))
        if all(count == longest for count in counts):
            return gathered
        pieces = gathered.view(self.size, longest, *tensor.shape[1:])
        return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])

    def sum_(self, tensor: Tensor, what: str) -> None:
        """Add up `tensor` of all ranks in place: the same bits on each, in an order the backend chooses."""
        if tensor.numel() > 0:
            self._move(what, lambda: dist.all_reduce(tensor, group=self.group))

    def exchange(self, tensor: Tensor, sent: Sequence[int], received: Sequence[int], what: str) -> Tensor:
        """sent[r] rows go to rank r, received[r] come from it: [sum(sent), ...] -> [sum(received), ...]."""
        arrived = tensor.new_empty(sum(received), *tensor.shape[1:])
        self._move(
            what,
            lambda: dist.all_to_all_single(
                arrived, tensor.contiguous(), list(received), list(sent), group=self.group
            ),
        )
        return arrived

    def _move(self, what: str, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            cause = str(error).splitlines()[0]
            raise LostRankError(
                f"{self.op}: rank {self.rank} of {self.size} lost another rank while it exchanged {what} "
                f"over {self.backend}: that rank died, hangs, or made another call. The rank that failed "
                "first tells why; end all ranks and start again from the last checkpoint (torchrun "
                "--max-restarts does). If it was only slow, give init_process_group a longer timeout. "
                f"{self.backend} says: {cause}"
            ) from error


def pack(*tensors: Tensor) -> Tensor:
    """Tensors [n, w] of any dtypes as one of bytes [n, ...], so that they travel in one message."""
    # Bytes are viewed in copies: what has one column may be contiguous and still have any stride.
    copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
    return torch.cat([copy.view(torch.uint8) for copy in copies], dim=1)


def unpack(packed: Tensor, *parts: tuple[torch.dtype, int]) -> list[Tensor]:
    """What pack() took, by (dtype, w) of each."""
    tensors = []
    first = 0
    for dtype, width in parts:
        after = first + width * dtype.itemsize
        tensor = packed.new_empty(packed.shape[0], width, dtype=dtype)
        tensor.view(torch.uint8).copy_(packed[:, first:after])
        tensors.append(tensor)
        first = after
    return tensors
