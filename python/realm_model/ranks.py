"""Training on the ranks of a torchrun job: each takes its part of every batch, all have one gradient.

Every rank draws the same whole batch from the same generator and works on its slice, so that a run on W ranks
is the run on one, up to the rounding of sums. Ranks that embed documents in the place of training are in
builders.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import realm_kernels as rk

TIMEOUT = 1800.0  # seconds that a rank waits for another before it counts as lost; gloo's own default

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model; group None is the default one."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @staticmethod
    def join(device: torch.device | None = None, timeout: float = TIMEOUT) -> Ranks:
        """Join the job where torchrun started this process: by gloo, and by NCCL between GPUs."""
        if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
            on_gpu = device is not None and device.type == "cuda"
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        return Ranks.current()

    @staticmethod
    def current() -> Ranks:
        """Of the default process group; alone where there is none."""
        if dist.is_available() and dist.is_initialized():
            return Ranks(dist.get_rank(), dist.get_world_size())
        return Ranks()

    def part(self, count: int) -> slice:
        """The slice of `count` that is this rank's; of equal lengths where the ranks divide it."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, tensor: Tensor) -> Tensor:
        """[B, ...] of equal shapes on all ranks -> [W B, ...], with gradient back to where it came from."""
        if self.size == 1:
            return tensor
        return _Gather.apply(tensor, self)

    def mean(self, value: float) -> float:
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        self.sum_(total)
        return total.item() / self.size

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The mean over the ranks, in one exchange. A parameter without gradient here counts as zero."""
        if self.size == 1:
            return
        parameters = list(parameters)
        flat = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
        )
        self.sum_(flat)
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = (grad / self.size).view_as(parameter)

    def sum_(self, tensor: Tensor) -> None:
        """Add up `tensor` of all ranks in place."""
        heard(lambda: dist.all_reduce(tensor, group=self.group))

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, once it has on all ranks.

        Where it raises ValueError or OSError on one of them, that one raises it, and those on which it did
        not a ValueError that repeats it: no rank waits for one that has ended.
        """
        if self.size == 1:
            return work()
        problem: Exception | None = None
        try:
            result = work()
        except (ValueError, OSError) as error:
            problem = error
        told: list[str | None] = [None] * self.size
        said = None if problem is None else f"{type(problem).__name__}: {problem}"
        heard(lambda: dist.all_gather_object(told, said, group=self.group))
        if problem is not None:
            raise problem
        for rank, other in enumerate(told):
            if other is not None:
                raise ValueError(f"rank {rank} of the job cannot take part: {other}")
        return result


ALONE = Ranks()


def heard(exchange: Callable[[], Result]) -> Result:
    """What an exchange with other ranks returns. Raises LostRankError where one of them died or hangs."""
    try:
        return exchange()
    except RuntimeError as error:
        cause = str(error).splitlines()[0]
        raise rk.LostRankError(
            f"rank {dist.get_rank()} of {dist.get_world_size()} lost another rank, which died or hangs; "
            f"the same command goes on from the last checkpoint. torch.distributed says: {cause}"
        ) from error


class _Gather(torch.autograd.Function):
    """What every rank made of a rank's tensor comes back to it, summed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.part = ranks, ranks.part(ranks.size * len(tensor))
        parts = [torch.empty_like(tensor) for _ in range(ranks.size)]
        heard(lambda: dist.all_gather(parts, tensor.contiguous(), group=ranks.group))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        ctx.ranks.sum_(grad)
        return grad[ctx.part], None
