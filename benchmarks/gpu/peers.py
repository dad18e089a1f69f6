"""What others do for the same job on a GPU. A peer that is not installed is left out, and the report says so.

To add one: a line in SEARCHES or LOSSES.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import marginal_loss_peers, peers

SCORE_BYTES = 1 << 29  # of a chunk of chunked torch: few launches for few queries, little memory for many


@dataclass(frozen=True)
class Peer:
    """make(rows) for a search, which returns search(queries, k); the loss itself for a loss."""

    package: str
    make: Callable[..., object]
    owns_its_memory: bool = False
    needs: str = ""  # an attribute that its builds without a GPU lack

    def is_installed(self) -> bool:
        if importlib.util.find_spec(self.package) is None:
            return False
        return not self.needs or hasattr(importlib.import_module(self.package), self.needs)


def chunked_torch(rows: Tensor) -> Callable[[Tensor, int], object]:
    """bfloat16 product and topk, a chunk at a time."""

    def search(queries: Tensor, k: int) -> object:
        chunk = max(peers.ROWS_PER_CHUNK, SCORE_BYTES // (2 * queries.shape[0]))
        return peers.chunked_torch_topk(queries, rows, k, chunk)

    return search


def flash_knn(rows: Tensor) -> Callable[[Tensor, int], object]:
    """FlashLib's fused search by L2 distance: it has no inner product, and does the same work."""
    from flashlib import flash_knn

    return lambda queries, k: flash_knn(queries, rows, k)


def faiss_gpu(rows: Tensor) -> Callable[[Tensor, int], object]:
    """faiss's bfKnn over float16 rows."""
    import faiss
    import faiss.contrib.torch_utils  # noqa: F401  (teaches it tensors)

    resources, half = faiss.StandardGpuResources(), rows.half()
    metric = faiss.METRIC_INNER_PRODUCT
    return lambda queries, k: faiss.knn_gpu(resources, queries.half(), half, k, metric=metric)


def cuvs(rows: Tensor) -> Callable[[Tensor, int], object]:
    """cuVS brute force over float16 rows."""
    from cuvs.neighbors import brute_force

    index = brute_force.build(rows.half(), metric="inner_product")
    return lambda queries, k: brute_force.search(index, queries.half(), k)


SEARCHES = {
    "torch": Peer("torch", chunked_torch),
    "FlashLib (L2)": Peer("flashlib", flash_knn),
    "faiss GPU (f16)": Peer("faiss", faiss_gpu, owns_its_memory=True, needs="StandardGpuResources"),
    "cuVS (f16)": Peer("cuvs", cuvs, owns_its_memory=True),
}


def _by_row(
    row_losses: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    scores: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
) -> Tensor:
    """The marginal loss over a peer's cross-entropy of each row."""
    flat, row_targets = marginal_loss_peers.by_row(hidden, targets)
    losses = row_losses(flat, weight, bias, row_targets)
    return marginal_loss_peers.marginal_loss(scores, -losses.float().view(hidden.shape[:3]), "sequence")


def _liger(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    arguments = hidden, weight, targets, bias, None, -100, 0.0, 0.0, "none"
    losses = LigerFusedLinearCrossEntropyFunction.apply(*arguments)
    return losses[0] if isinstance(losses, tuple) else losses


def _apple(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """It takes no bias; that of the benchmark is 0."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, reduction="none")


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile of it for each shape, when it is first called: importing the compiler takes long."""
    compile_once = functools.cache(lambda: torch.compile(function, dynamic=False))
    return lambda *inputs: compile_once()(*inputs)


LOSSES = {
    "torch eager": Peer("torch", marginal_loss_peers.eager),
    "torch.compile": Peer("torch", compiled(marginal_loss_peers.eager)),
    "Liger": Peer("liger_kernel", functools.partial(_by_row, _liger)),
    "Apple CCE": Peer("cut_cross_entropy", functools.partial(_by_row, _apple)),
}
if hasattr(F, "linear_cross_entropy"):
    LOSSES["F.linear_cross_entropy"] = Peer("torch", marginal_loss_peers.linear_cross_entropy)


def missing(table: dict[str, Peer]) -> list[str]:
    return [name for name, peer in table.items() if not peer.is_installed()]


def installed(table: dict[str, Peer]) -> dict[str, Peer]:
    return {name: peer for name, peer in table.items() if peer.is_installed()}
