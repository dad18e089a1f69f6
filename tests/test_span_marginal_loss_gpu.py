"""span_marginal_loss on a GPU, where it is torch around marginal_loss, against float64 on the CPU."""

import pytest
import torch

import realm_kernels as rk
from realm_kernels.testing import assert_within

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def results(device, dtype, inputs, masks, normalization):
    """loss, d_scores and d_span_scores, float64 on the CPU."""
    leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
    moved = {name: mask.to(device) for name, mask in masks.items()}
    loss = rk.span_marginal_loss(*leaves, normalization=normalization, **moved)
    gradients = torch.autograd.grad(loss, leaves)
    return [x.detach().cpu().double() for x in (loss, *gradients)]


@pytest.mark.parametrize("normalization", ["document", "global"])
@pytest.mark.parametrize("B,K,C", [(1, 1, 1), (3, 5, 288), (4, 5000, 1), (8, 5, 2880)])
def test_equals_the_cpu_in_float64(normalization, B, K, C):
    inputs = torch.randn(B, K), 5 * torch.randn(B, K, C)
    masks = dict(correct=torch.rand(B, K, C) < 0.05, valid=torch.rand(B, K, C) < 0.9)
    masks["correct"][0, 0, 0] = masks["valid"][0, 0, 0] = True
    masks["doc_mask"] = torch.rand(B, K) < 0.9
    masks["doc_mask"][:, 0] = True
    wide = [x.float() for x in inputs]
    got = results("cuda", torch.float32, wide, masks, normalization)
    expected = results("cpu", torch.float64, wide, masks, normalization)
    # Sums of K * C exponentials in float32, each a few ulp: relative to the whole, not to a small entry.
    for mine, right, name in zip(got, expected, ("loss", "d_scores", "d_span_scores"), strict=True):
        scale = right.abs().max().clamp(min=1.0)
        assert_within(mine, right, float(2.0**-18 * scale), name)
