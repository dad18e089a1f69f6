"""What the benchmarks of linear_marginal_loss share: shapes, inputs, implementations."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

import realm_kernels as rk

from . import marginal_loss_peers as peers

DOCUMENTS, TOKENS = 8, 20
SHAPES = {"base": (768, 30522), "tiny": (128, 6000)}  # H and V: BERT's, and those of a small world
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def ours(scores: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    return rk.linear_marginal_loss(scores, hidden, weight, targets, bias=bias)


@functools.cache
def _compiled():
    return torch.compile(peers.eager, fullgraph=True, dynamic=False)


IMPLEMENTATIONS = {
    "realm_kernels": ours,
    "torch eager": peers.eager,
    "torch compile": lambda *tensors: _compiled()(*tensors),
    "torch chunked": lambda *tensors: peers.chunked(*tensors, rows=640),
}
if hasattr(F, "linear_cross_entropy"):
    IMPLEMENTATIONS["torch linear_cross_entropy"] = peers.linear_cross_entropy


def inputs(batch: int, scored: int, width: int, vocabulary: int, dtype: torch.dtype) -> list[Tensor]:
    """scores, hidden, weight, bias, all trained, and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, DOCUMENTS, TOKENS, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    targets = torch.randint(vocabulary, (batch, TOKENS), generator=generator)
    targets[:, scored:] = -100
    scores = torch.randn(batch, DOCUMENTS, generator=generator)
    trained = [scores, hidden.to(dtype), weight.to(dtype), torch.zeros(vocabulary, dtype=dtype)]
    return [*(tensor.requires_grad_() for tensor in trained), targets]
