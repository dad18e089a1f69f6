"""rk.marginal_loss and rk.posterior: the marginal likelihood of an answer over retrieved documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..backends import explained_by
from . import distributed, op, plan, reference
from .checks import OP, REDUCTIONS, check, check_choice, check_null_index
from .problem import Problem, result_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Posterior", "marginal_loss", "posterior"]


class Posterior(NamedTuple):
    """What retrieval contributed, detached, in the dtype of the loss.

    log_marginal: [B] log p(y|x); 0 for an example with no document or no scored token.
    prior: [B, K] p(z|x), 0 for masked documents.
    posterior: [B, K] p(z|x,y), or per token [B, K, M] in mode "token"; 0 for masked documents, for tokens
        that are not scored, and where every likelihood is zero.
    utility: [B, K] retrieval utility RU(z|x) = log p(y|z,x) - log p(y|null,x) (REALM, section 4.5), 0 for
        masked documents and NaN where the null document is masked; None without null_index.
    """

    log_marginal: Tensor
    prior: Tensor
    posterior: Tensor
    utility: Tensor | None


@explained_by(plan.explain)
def marginal_loss(
    scores: Tensor,
    log_likelihood: Tensor,
    *,
    token_mask: Tensor | None = None,
    doc_mask: Tensor | None = None,
    log_weight: Tensor | None = None,
    mode: str = "sequence",
    reduction: str = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    """-log p(y|x) marginalised over K retrieved documents, with REALM's gradient to the retriever.

    With p(z|x) = softmax over unmasked documents of scores + log_weight:

        "sequence"  L = log sum_z p(z|x) prod_m p(y_m|z,x)      REALM (Guu et al. 2020), equation 1
        "token"     L = sum_m log sum_z p(z|x) p(y_m|z,x)       REALM's released code, RAG-Token

    The gradient to scores is -r(z) = -[p(y|z,x) / p(y|x) - 1] p(z|x) (section 3.3), in a form that stays
    accurate where documents are nearly equal or the best one has a tiny prior. Everything between inputs and
    results is float64; the loss is float32, or float64 where an input is.

    scores: [B, K] relevance f(x, z), K >= 1; -inf masks a document.
    log_likelihood: [B, K, M] log p(y_m|z,x), or [B, K]: one token (or a sum over tokens), where both modes
        agree.
    token_mask: bool [B, M]; tokens with False are not scored. Only with [B, K, M].
    doc_mask: bool [B, K]; False means no document.
    log_weight: [B, K] added to scores, a correction of how documents were sampled; it receives the same
        gradient.
    scores, log_likelihood and log_weight may be of any float dtype each.
    reduction: "none" gives [B]; "sum"; "mean" divides by the counted examples (mode "sequence") or counted
        tokens (mode "token") and is 0 where nothing counts.
    group: a torch.distributed process group over whose ranks the K documents of each example are spread. The
        call is then collective: every rank brings the same B examples, M, token_mask, mode and reduction, and
        scores, log_likelihood, doc_mask and log_weight of its own documents, [B, K_r] with K_r >= 0. All
        get the loss of all documents, the same bits, and the gradients of their own, from their own upstream
        gradient, in a backward that exchanges nothing. Gradients of parameters that several ranks share are
        to be summed over ranks, not averaged. Plain torch, once differentiable. None: this rank has them all.

    An example without a document or a scored token is 0, has no gradient and is not counted. What masked
    documents and tokens hold is never looked at, NaN included. Where every document has likelihood zero the
    loss is +inf and the gradient 0. Twice differentiable.

    Raises TypeError or ValueError naming the argument for a wrong type, shape, dtype or device. With a group
    also ValueError where ranks disagree, and RuntimeError where another rank refused its arguments, came to
    another call, or was lost.

    >>> import torch, realm_kernels as rk
    >>> loss = rk.marginal_loss(torch.randn(4, 8), torch.randn(4, 8, 20).log_softmax(2))
    """
    if group is not None:
        return distributed.loss(
            scores, log_likelihood, token_mask, doc_mask, log_weight, mode, reduction, group
        )
    check(OP, scores, log_likelihood, token_mask, doc_mask, log_weight, mode)
    check_choice(OP, "reduction", reduction, REDUCTIONS)
    return op.call(Problem(scores, log_likelihood, token_mask, doc_mask, log_weight, mode), reduction)


@torch.no_grad()
def posterior(
    scores: Tensor,
    log_likelihood: Tensor,
    *,
    token_mask: Tensor | None = None,
    doc_mask: Tensor | None = None,
    log_weight: Tensor | None = None,
    mode: str = "sequence",
    null_index: int | None = None,
) -> Posterior:
    """What the retrieved documents were worth: p(y|x), p(z|x), p(z|x,y) and the retrieval utility, detached.

    The arguments are those of marginal_loss; null_index, in [0, K), is the column of the null document and
    asks for the utility log p(y|z,x) - log p(y|null,x) (REALM, Figure 4), in both modes of all scored tokens
    together. Returns a Posterior. It is meant for metrics and runs in plain torch, in float64, on any device.

    Raises TypeError or ValueError naming the argument for a wrong type, shape, dtype or device.

    >>> import torch, realm_kernels as rk
    >>> rk.posterior(torch.randn(4, 8), -torch.rand(4, 8), null_index=0).utility.shape
    torch.Size([4, 8])
    """
    check("posterior", scores, log_likelihood, token_mask, doc_mask, log_weight, mode)
    check_null_index("posterior", scores.shape[1], null_index)
    tokens = reference.with_tokens(log_likelihood)
    log_p = reference.log_prior(scores, doc_mask, log_weight)
    result = reference.marginal(log_p, reference.columns(tokens, token_mask, mode))
    scored = reference.scored_columns(log_p, tokens, token_mask, mode)
    dtype = result_dtype(scores, log_likelihood, log_weight)

    shown = torch.where(scored[:, None, :], result.posterior, 0.0)
    if mode == "sequence" or log_likelihood.dim() == 2:
        shown = shown[:, :, 0]
    utility = None
    if null_index is not None:
        utility = _utility(log_p, reference.columns(tokens, token_mask, "sequence")[:, :, 0], null_index).to(
            dtype
        )
    return Posterior(
        log_marginal=torch.where(scored, result.log_marginal, 0.0).sum(1).to(dtype),
        prior=log_p.exp().to(dtype),
        posterior=shown.to(dtype),
        utility=utility,
    )


def _utility(log_p: Tensor, evidence: Tensor, null_index: int) -> Tensor:
    masked = log_p == -torch.inf  # [B, K]
    gain = torch.where(masked, 0.0, evidence - evidence[:, null_index, None])
    return torch.where(masked[:, null_index, None], torch.nan, gain)
