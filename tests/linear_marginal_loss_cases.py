"""What the tests of linear_marginal_loss share: random problems, plain torch as peer and oracle, a meter."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import realm_kernels as rk
from realm_kernels.testing import assert_within

MODES = ("sequence", "token")
DIFFERENTIABLE = ("scores", "hidden", "weight", "bias", "log_weight")


@dataclass(frozen=True)
class Case:
    scores: Tensor
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    doc_mask: Tensor | None
    log_weight: Tensor | None

    def options(self) -> dict[str, Tensor | None]:
        return {"bias": self.bias, "doc_mask": self.doc_mask, "log_weight": self.log_weight}

    def loss(self, mode: str = "sequence", reduction: str = "mean", **options) -> Tensor:
        return rk.linear_marginal_loss(
            self.scores,
            self.hidden,
            self.weight,
            self.targets,
            mode=mode,
            reduction=reduction,
            **self.options(),
            **options,
        )

    def to(self, dtype: torch.dtype) -> Case:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Case(
            **{k: t.to(dtype) if t is not None and t.is_floating_point() else t for k, t in tensors.items()}
        )

    def requiring(self, *names: str) -> Case:
        return replace(
            self, **{name: getattr(self, name).detach().clone().requires_grad_() for name in names}
        )


def make_case(
    batch=4, documents=3, tokens=5, width=16, vocabulary=37, dtype=torch.float32, spread=1.0, masks=True
) -> Case:
    targets = torch.randint(vocabulary, (batch, tokens))
    doc_mask = None
    if masks:
        targets[torch.rand(batch, tokens) < 0.2] = -100
        doc_mask = torch.rand(batch, documents) < 0.8
    return Case(
        torch.randn(batch, documents),
        (spread * torch.randn(batch, documents, tokens, width)).to(dtype),
        (torch.randn(vocabulary, width) / width**0.5).to(dtype),
        targets,
        torch.randn(vocabulary).to(dtype),
        doc_mask,
        torch.randn(batch, documents),
    )


def eager(case: Case, mode: str = "sequence", reduction: str = "mean", ignore_index: int = -100) -> Tensor:
    """The loss as a trainer writes it in plain torch: all logits in memory, softmax in float32 at least."""
    logits = F.linear(case.hidden, case.weight, case.bias)  # [B, K, M, V]
    wide = torch.promote_types(logits.dtype, torch.float32)
    scored = case.targets != ignore_index  # [B, M]
    targets = case.targets.masked_fill(~scored, 0)[:, None, :, None].expand(*logits.shape[:3], 1)
    log_likelihood = logits.to(wide).log_softmax(-1).gather(3, targets)[..., 0]
    log_likelihood = torch.where(scored[:, None], log_likelihood, 0.0)
    relevance = case.scores.to(wide)
    if case.log_weight is not None:
        relevance = relevance + case.log_weight.to(wide)
    if case.doc_mask is not None:
        relevance = relevance.masked_fill(~case.doc_mask, -torch.inf)
    has_document = (relevance > -torch.inf).any(1, keepdim=True)
    # An example without a document has a softmax of NaN: give it one, and no loss.
    log_prior = torch.where(has_document, relevance, 0.0).log_softmax(1)
    if mode == "sequence":
        loss = -(log_prior + log_likelihood.sum(2)).logsumexp(1)  # [B]
        counted = scored.any(1) & has_document[:, 0]
        loss = torch.where(counted, loss, 0.0)
    else:
        counted = scored & has_document
        loss = torch.where(counted, -(log_prior[:, :, None] + log_likelihood).logsumexp(1), 0.0).sum(1)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum().clamp(min=1)


def gradients(loss_of, case: Case, names=DIFFERENTIABLE, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """{"loss": ..., and the gradient of each of names} of loss_of(case)."""
    case = case.requiring(*names)
    loss = loss_of(case)
    grads = torch.autograd.grad(loss, [getattr(case, name) for name in names], upstream)
    return {"loss": loss.detach(), **dict(zip(names, grads, strict=True))}


class Meter(TorchDispatchMode):
    """Counts what runs inside: the peak of live bytes allocated here, and the flops of matrix products."""

    PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self.flops = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = {_storage(x)._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        self._live = {key: item for key, item in self._live.items() if not item[0].expired()}
        for output in tree_leaves(result):
            if isinstance(output, Tensor) and _storage(output)._cdata not in inputs:
                storage = _storage(output)
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._live.values()))
        if function.overloadpacket in self.PRODUCTS:
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return result


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def assert_no_worse_than_torch(case: Case, mode: str, reduction: str = "mean", upstream: float = 1.0) -> None:
    """Largest error against float64 <= plain torch's in the same dtype + the roundings that have to be.

    Those are an ulp of the result's dtype for the unit gradient and one for its product with the upstream
    one, and what float32 logits do to a posterior: a token's log likelihood moves by up to 2 u |logit|, the M
    of a document add up, and a posterior moves by at most half of that.
    """

    def compute(loss_of, chosen):
        found = gradients(lambda c: loss_of(c, mode, reduction) * upstream, chosen)
        return {name: value.double() for name, value in found.items()}

    oracle = compute(eager, case.to(torch.float64))
    torch_error = compute(eager, case)
    ours = compute(Case.loss, case)
    logits = torch.nn.functional.linear(case.hidden.double(), case.weight.double())
    moved = case.targets.shape[1] * 2.0**-24 * logits[logits.isfinite()].abs().max()
    for name, expected in oracle.items():
        if name == "loss":
            rounding = 2.0**-23 * expected.abs()
        elif name in ("scores", "log_weight"):  # residuals of a sum over documents of at most 2
            rounding = moved * upstream
        else:
            rounding = (2 * torch.finfo(getattr(case, name).dtype).eps + moved) * expected.abs().max()
        assert_within(ours[name], expected, (torch_error[name] - expected).abs().max() + rounding, name)
