"""rk.linear_marginal_loss: the marginal loss from hidden states, without their logits in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends import explained_by
from ..marginal_loss.api import Posterior, posterior
from ..mips_topk.checks import DTENSOR
from . import distributed, op, plan
from .checks import OP, check
from .problem import Problem

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_marginal_loss"]


@explained_by(plan.explain)
def linear_marginal_loss(
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
) -> Tensor | tuple[Tensor, Posterior]:
    """rk.marginal_loss of log p(y_m|z_k,x) = log softmax(hidden_km weight^T + bias) at y_m = targets_m.

    This is REALM's knowledge-augmented encoder (Guu et al. 2020, section 3.2) from the last hidden state to
    the loss: -log p(y|x), marginalised over K documents in mode "sequence" (equation 1) or "token" (the
    released code). The logits [B, K, M, V] are never held: chunks of whole examples pass through a workspace
    of 256 MiB, and their gradients are made on the way, three matrix products in all.

    scores: [B, K] relevance f(x, z), K >= 1, any float dtype; -inf masks a document.
    hidden: [B, K, M, H], the reader's hidden states at the target tokens, H >= 1.
    weight, bias: [V, H], V >= 1, and [V] or None, of hidden's dtype. A weight tied to the embeddings works.
    targets: int64 [B, M], in [0, V) or ignore_index: tokens that are not scored.
    doc_mask: bool [B, K]; False means no document.
    log_weight: [B, K] added to scores, any float dtype; it receives the same gradient.
    ignore_index: any int, also one inside the vocabulary.
    reduction: "none" gives [B]; "sum"; "mean" divides by the counted examples (mode "sequence") or counted
        tokens (mode "token") and is 0 where nothing counts. "none" with a weight or bias that requires a
        gradient recomputes the logits in the backward: a fourth product.
    group: a torch.distributed process group over whose ranks the K documents of each example are spread, as
        in rk.marginal_loss: scores, hidden, doc_mask and log_weight are [B, K_r, ...] of this rank's own,
        K_r >= 0, everything else is the same on all ranks. The gradients of weight and bias are those of this
        rank's documents, to be summed over ranks.
    vocabulary_group: a group over whose ranks the vocabulary is spread, as tensor parallelism has it: weight
        and bias are the words [V_r, H] and [V_r] of this rank, V_r >= 0, consecutive in the order of the
        ranks; everything else is the same on all. targets are words of the whole vocabulary. A weight (and
        bias) that is a DTensor placed Shard(0) on a mesh of one axis says so by itself, and receives DTensor
        gradients. d_hidden comes summed over words, the same on all ranks.
        Calls with either are collective, and so is the backward of reduction "none" with a weight or bias to
        train. requires_grad must be alike on all ranks. All get the loss of the whole, the same bits.
    return_posterior: return (loss, rk.Posterior) with what rk.posterior gives, detached.
    min_posterior: in [0, 1]. Documents (in mode "token" of a token) whose posterior p(z|x,y) is below it add
        nothing to the gradients of hidden, weight and bias; loss and gradient to scores are untouched. With
        the upstream gradient g_b of an example and ||.|| the Euclidean norm, what is left out is at most
        sqrt(2) min_posterior sum |g_b| ||hidden_bkm|| of d_weight, summed over the rows left out, and
        2 min_posterior |g_b| max_v ||weight_v|| of d_hidden_bkm. Below 1/K the best document stays. It saves
        time on the CPU where most rows are left out: README.md says when. 0, the default, leaves nothing out.

    An example without a document or a scored token is 0, has no gradient and is not counted. What masked
    documents and ignored tokens hold is never looked at, NaN included. Where every document has likelihood
    zero the loss is +inf and the gradient 0. The loss, the logits and the sums of d_weight and d_bias are
    float32 (float64 where hidden is); torch's switches for reduced precision products are obeyed. Under
    autocast hidden, weight and bias are cast as torch.nn.functional.linear casts them, and nothing else is.
    Once differentiable. Equal inputs give equal bits; on the CPU those of hidden's gradient depend on
    torch.get_num_threads() too.

    Raises TypeError or ValueError naming the argument for a wrong type, shape, dtype or device, and on the
    CPU for a target out of range; elsewhere such a target makes its example NaN.

    >>> import torch, realm_kernels as rk
    >>> hidden, weight = torch.randn(2, 4, 3, 16), torch.randn(100, 16, requires_grad=True)
    >>> rk.linear_marginal_loss(torch.randn(2, 4), hidden, weight, torch.randint(100, (2, 3))).backward()
    """
    if group is not None and return_posterior:
        raise ValueError(f"{OP}: return_posterior must be False with a group, got True")
    hidden, weight, bias = _cast_as_linear(hidden), _cast_as_linear(weight), _cast_as_linear(bias)
    problem = Problem(
        scores, hidden, weight, targets, bias, doc_mask, log_weight, ignore_index, mode, min_posterior
    )
    if group is not None or vocabulary_group is not None or isinstance(weight, DTENSOR):
        loss, log_likelihood = distributed.loss(problem, reduction, group, vocabulary_group)
    else:
        check(problem, reduction)
        loss, log_likelihood = op.loss(problem, reduction)
    if not return_posterior:
        return loss
    scored = targets != ignore_index
    wide = posterior(
        scores, log_likelihood, token_mask=scored, doc_mask=doc_mask, log_weight=log_weight, mode=mode
    )
    dtype = loss.dtype
    shown = Posterior(wide.log_marginal.to(dtype), wide.prior.to(dtype), wide.posterior.to(dtype), None)
    return loss, shown


def _cast_as_linear(tensor: Any) -> Any:
    """As torch.nn.functional.linear casts under autocast."""
    if not isinstance(tensor, Tensor) or tensor.dtype == torch.float64:
        return tensor
    if not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
