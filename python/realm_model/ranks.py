"""Training on the ranks of a torchrun job: each takes its part of every batch, all have one gradient.

Every rank draws the same whole batch from the same generator and works on its slice, so that a run on W ranks
is the run on one, up to the rounding of sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def join() -> Ranks:
        """Join the job where torchrun started this process; the group is gloo's."""
        if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
            dist.init_process_group("gloo")
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
        dist.all_reduce(total)
        return total.item() / self.size

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The mean over the ranks, in one exchange. A parameter without gradient here counts as zero."""
        if self.size == 1:
            return
        parameters = list(parameters)
        flat = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
        )
        dist.all_reduce(flat)
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = (grad / self.size).view_as(parameter)


ALONE = Ranks()


class _Gather(torch.autograd.Function):
    """What every rank made of a rank's tensor comes back to it, summed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.part = ranks.part(ranks.size * len(tensor))
        parts = [torch.empty_like(tensor) for _ in range(ranks.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[ctx.part], None
