"""The marginal losses as torch modules: options at construction, tensors at the call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from .linear_marginal_loss import linear_marginal_loss
from .marginal_loss import Posterior, marginal_loss
from .marginal_loss import checks as marginal_loss_checks
from .span_marginal_loss import checks as span_marginal_loss_checks
from .span_marginal_loss import span_marginal_loss
from .validation import check_choice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LinearMarginalLoss", "MarginalLoss", "SpanMarginalLoss"]


class MarginalLoss(nn.Module):
    """rk.marginal_loss with its mode ("sequence" or "token"), its reduction ("none", "sum", "mean") and the
    group whose ranks hold the documents fixed.

    >>> import torch, realm_kernels as rk
    >>> loss = rk.nn.MarginalLoss(mode="token")(torch.randn(4, 8), torch.randn(4, 8, 20).log_softmax(2))
    """

    def __init__(
        self, *, mode: str = "sequence", reduction: str = "mean", group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        check_choice("MarginalLoss", "mode", mode, marginal_loss_checks.MODES)
        check_choice("MarginalLoss", "reduction", reduction, marginal_loss_checks.REDUCTIONS)
        self.mode = mode
        self.reduction = reduction
        self.group = group

    def forward(
        self,
        scores: Tensor,
        log_likelihood: Tensor,
        *,
        token_mask: Tensor | None = None,
        doc_mask: Tensor | None = None,
        log_weight: Tensor | None = None,
    ) -> Tensor:
        return marginal_loss(
            scores,
            log_likelihood,
            token_mask=token_mask,
            doc_mask=doc_mask,
            log_weight=log_weight,
            mode=self.mode,
            reduction=self.reduction,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, reduction={self.reduction!r}"


class LinearMarginalLoss(nn.Module):
    """rk.linear_marginal_loss with its options fixed: all arguments of it that are no tensors.

    It owns no weight: the decoder's, tied to the embeddings or not, is passed to each call.

    >>> import torch, realm_kernels as rk
    >>> hidden, weight = torch.randn(2, 4, 3, 16), torch.randn(100, 16)
    >>> loss_of = rk.nn.LinearMarginalLoss(mode="token")
    >>> loss = loss_of(torch.randn(2, 4), hidden, weight, torch.randint(100, (2, 3)))
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        mode: str = "sequence",
        reduction: str = "mean",
        return_posterior: bool = False,
        min_posterior: float = 0.0,
        group: ProcessGroup | None = None,
        vocabulary_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_choice("LinearMarginalLoss", "mode", mode, marginal_loss_checks.MODES)
        check_choice("LinearMarginalLoss", "reduction", reduction, marginal_loss_checks.REDUCTIONS)
        self.ignore_index = ignore_index
        self.mode = mode
        self.reduction = reduction
        self.return_posterior = return_posterior
        self.min_posterior = min_posterior
        self.group = group
        self.vocabulary_group = vocabulary_group

    def forward(
        self,
        scores: Tensor,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        bias: Tensor | None = None,
        doc_mask: Tensor | None = None,
        log_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Posterior]:
        return linear_marginal_loss(
            scores,
            hidden,
            weight,
            targets,
            bias=bias,
            doc_mask=doc_mask,
            log_weight=log_weight,
            ignore_index=self.ignore_index,
            mode=self.mode,
            reduction=self.reduction,
            return_posterior=self.return_posterior,
            min_posterior=self.min_posterior,
            group=self.group,
            vocabulary_group=self.vocabulary_group,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, mode={self.mode!r}, reduction={self.reduction!r}, "
            f"return_posterior={self.return_posterior}, min_posterior={self.min_posterior}"
        )


class SpanMarginalLoss(nn.Module):
    """rk.span_marginal_loss with its normalization ("document", "global") and reduction fixed.

    >>> import torch, realm_kernels as rk
    >>> loss_of = rk.nn.SpanMarginalLoss(normalization="global")
    >>> loss = loss_of(torch.randn(4, 5), torch.randn(4, 5, 30), torch.rand(4, 5, 30) < 0.1)
    """

    def __init__(self, *, normalization: str = "document", reduction: str = "mean") -> None:
        super().__init__()
        normalizations = span_marginal_loss_checks.NORMALIZATIONS
        check_choice("SpanMarginalLoss", "normalization", normalization, normalizations)
        check_choice("SpanMarginalLoss", "reduction", reduction, marginal_loss_checks.REDUCTIONS)
        self.normalization = normalization
        self.reduction = reduction

    def forward(
        self,
        scores: Tensor,
        span_scores: Tensor,
        correct: Tensor,
        *,
        valid: Tensor | None = None,
        doc_mask: Tensor | None = None,
        log_weight: Tensor | None = None,
    ) -> Tensor:
        return span_marginal_loss(
            scores,
            span_scores,
            correct,
            valid=valid,
            doc_mask=doc_mask,
            log_weight=log_weight,
            normalization=self.normalization,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"normalization={self.normalization!r}, reduction={self.reduction!r}"
