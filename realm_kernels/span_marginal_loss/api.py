"""rk.span_marginal_loss: the marginal likelihood of the correct answer spans over retrieved documents."""

from __future__ import annotations

from torch import Tensor

from ..backends import explained_by
from . import plan
from .checks import check
from .op import call
from .problem import Problem

__all__ = ["span_marginal_loss"]


@explained_by(plan.explain)
def span_marginal_loss(
    scores: Tensor,
    span_scores: Tensor,
    correct: Tensor,
    *,
    valid: Tensor | None = None,
    doc_mask: Tensor | None = None,
    log_weight: Tensor | None = None,
    normalization: str = "document",
    reduction: str = "mean",
) -> Tensor:
    """-log of the probability that a reader picks a correct answer span, marginalised over K documents.

    With prior p(z|x) = softmax over unmasked documents of scores + log_weight, span scores t_zc, and each
    log-sum-exp (LSE) over the spans named:

        "document"  L = LSE_z (log p(z|x) + LSE_correct t_zc - LSE_valid t_zc)
                    a softmax over the spans of each document: REALM (Guu et al. 2020), section 3.2
        "global"    L = LSE_correct (s_z + log_weight_z + t_zc) - LSE_valid (s_z + log_weight_z + t_zc)
                    one softmax over the spans of all documents: the reader ORQA and REALM released

    and the loss is -L. With C = 1, span_scores zero and correct[b, k, 0] = "the answer stands in document k",
    both are the retriever loss REALM released.

    scores: [B, K] relevance f(x, z), K >= 1; -inf masks a document.
    span_scores: [B, K, C], C >= 1.
    correct: bool [B, K, C]; counts only where valid.
    valid: bool [B, K, C]; spans with False do not exist. None: all do.
    doc_mask: bool [B, K]; False means no document.
    log_weight: [B, K] added to scores; it receives the same gradient. scores, span_scores and log_weight may
        be of any float dtype each.
    reduction: "none" gives [B]; "sum"; "mean" divides by the counted examples, and is 0 where none counts.

    An example without a correct span in any unmasked document is 0, has no gradient and is not counted. A
    document without valid spans keeps its prior in "document", with likelihood zero, and has no part in
    "global". What masked documents and invalid spans hold is never looked at, NaN included. Where every
    correct span scores -inf the loss is +inf and the gradient 0. The loss is float32, or float64 where an
    input is; everything in between is float64. Twice differentiable.

    Raises TypeError or ValueError naming the argument for a wrong type, shape, dtype or device.

    >>> import torch, realm_kernels as rk
    >>> correct = torch.rand(4, 5, 30) < 0.1
    >>> scores, span_scores = torch.randn(4, 5), torch.randn(4, 5, 30)
    >>> loss = rk.span_marginal_loss(scores, span_scores, correct, normalization="global")
    """
    check(scores, span_scores, correct, valid, doc_mask, log_weight, normalization, reduction)
    problem = Problem(scores, span_scores, correct, valid, doc_mask, log_weight, normalization)
    return call(problem, reduction)
