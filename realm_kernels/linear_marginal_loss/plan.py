"""The bytes and flops of linear_marginal_loss: what explain() tells and what the benchmarks divide by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..backends import Explanation
from ..mips_topk.checks import DTENSOR
from . import cpu, distributed, op, triton
from .checks import OP, check
from .chunks import chunks_in_cache, chunks_of
from .problem import Problem

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def cost(rows: int, hidden: int, vocabulary: int, element_bytes: int, products: int) -> tuple[int, int]:
    """Least (bytes, flops) of so many products: operands read and results written once, logits never moved.

    1 product: the loss alone. 2 or 3: with d_hidden, d_weight, one for each.
    """
    operands = (rows + vocabulary) * hidden * element_bytes
    return operands * (2 if products > 1 else 1), 2 * products * rows * hidden * vocabulary


def explain(
    scores: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    doc_mask: Tensor | None = None,
    log_weight: Tensor | None = None,
    ignore_index: int = -100,
    mode: str = "sequence",
    reduction: str = "mean",
    return_posterior: bool = False,
    min_posterior: float = 0.0,
    group: ProcessGroup | None = None,
    vocabulary_group: ProcessGroup | None = None,
) -> Explanation:
    problem = Problem(
        scores, hidden, weight, targets, bias, doc_mask, log_weight, ignore_index, mode, min_posterior
    )
    words, across = None, ""
    if group is not None or vocabulary_group is not None or isinstance(weight, DTENSOR):
        problem, ranks, by_words = distributed.part_of(problem, group, vocabulary_group)
        distributed.check_here(problem, reduction, by_words)
        words = problem.weight.shape[0] + by_words
        across = f", of {ranks.size} ranks' {'words' if by_words else 'documents'}"
        backend = distributed.backend_for(problem)
    else:
        check(problem, reduction)
        backend = op.backend_for(problem)
    products = 1 + hidden.requires_grad + weight.requires_grad
    recomputed = reduction == "none" and weight.requires_grad
    if backend.name == "cpu":
        chunks = chunks_in_cache(problem)
    else:
        chunks = chunks_of(problem, backend.name in triton.PASSES, words)
    if backend.name == "reference":
        plan = f"all {chunks.rows} rows of logits at once, in float64"
    elif chunks.examples_at_once > 0:
        plan = f"chunks of {chunks.examples_at_once} examples, {chunks.step()} rows, one pass"
    else:
        plan = f"chunks of {chunks.step()} rows, {chunks.rows_of_example} in an example, two passes"
        recomputed = products > 1
    if backend.name != "reference":
        workspace = chunks.workspace_bytes
        if backend.name == "cpu" and cpu.halves_logits(weight):
            workspace //= 2
        plan += f", {workspace / 2**20:.0f} MiB of workspace"
    vocabulary, width = problem.weight.shape
    bytes_moved, flops = cost(chunks.rows, width, vocabulary, hidden.element_size(), products + recomputed)
    return Explanation(
        op=OP,
        backend=backend.name,
        plan=f"{plan}, {products + recomputed} products{across}",
        bytes=bytes_moved,
        flops=flops,
        limit="flops / matrix rate of the dtype; on a CPU padding tokens and missing documents cost none",
    )
