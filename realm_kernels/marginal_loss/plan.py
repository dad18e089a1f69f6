"""The bytes and flops of marginal_loss: what explain() tells and what the benchmarks divide by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..backends import Explanation
from ..ranks import HEADER_BYTES
from . import distributed, op, reference
from .checks import OP, REDUCTIONS, check, check_choice
from .problem import Problem

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# An exponential and what surrounds it, counted as the double-precision operations of its polynomial.
FLOPS_PER_EXP = 30


def cost(
    batch: int, documents: int, tokens: int, mode: str, log_likelihood_bytes: int, score_bytes: int
) -> tuple[int, int]:
    """Least (bytes, flops) of the forward: every input read once, a loss and a count written per example.

    The backward reads the same and writes d_log_likelihood and d_scores.
    """
    bytes_moved = batch * (documents * (tokens * log_likelihood_bytes + score_bytes) + 4 + 8)
    columns = tokens if mode == "token" else 1
    return bytes_moved, batch * documents * (tokens + FLOPS_PER_EXP * (1 + columns))


def traffic(world: int, batch: int, tokens: int, mode: str) -> int:
    """Bytes that each of W ranks receives from the others: headers, prior, best documents and their sums."""
    columns = tokens if mode == "token" else 1
    return (world - 1) * (HEADER_BYTES + 8 * batch * (2 + 5 * columns))


def explain(
    scores: Tensor,
    log_likelihood: Tensor,
    *,
    token_mask: Tensor | None = None,
    doc_mask: Tensor | None = None,
    log_weight: Tensor | None = None,
    mode: str = "sequence",
    reduction: str = "mean",
    group: ProcessGroup | None = None,
) -> Explanation:
    inputs = (scores, log_likelihood, token_mask, doc_mask, log_weight, mode)
    if group is None:
        check(OP, *inputs)
        check_choice(OP, "reduction", reduction, REDUCTIONS)
        backend = op.backend_for(Problem(*inputs).with_tokens())
    else:
        ranks = distributed.ranks_of(scores, group)
        distributed.check_here(*inputs, reduction)
        backend = reference.BACKEND
    log_likelihood = reference.with_tokens(log_likelihood)
    batch, documents, tokens = log_likelihood.shape
    plan = f"B={batch} K={documents} M={tokens} {mode} mode, float64 inside"
    limit = "one kernel launch; for large B the larger of bytes / bandwidth and flops / float64 rate"
    if group is not None:
        received = traffic(ranks.size, batch, tokens, mode)
        plan += f", of {ranks.size} ranks' documents; receives {received} bytes over {ranks.backend}"
        limit = "the latency of three all-gathers, the first of which waits for the host"
    bytes_moved, flops = cost(
        batch, documents, tokens, mode, log_likelihood.element_size(), scores.element_size()
    )
    return Explanation(
        op=OP,
        backend=backend.name,
        plan=plan,
        bytes=bytes_moved,
        flops=flops,
        limit=limit,
    )
