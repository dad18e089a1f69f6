"""span_marginal_loss, forward and backward, beside plain torch. Bytes, flops: span_marginal_loss/plan.py."""

import pytest
import torch

import realm_kernels as rk
from realm_kernels.span_marginal_loss.plan import cost

from . import marginal_loss_peers as peers

# The reader's spans of its top five blocks, and the retriever's loss over its beam.
SHAPES = {"B=8 K=5 C=2880": (8, 5, 2880), "B=8 K=5000 C=1": (8, 5000, 1)}


@pytest.mark.parametrize("implementation", ["realm_kernels", "torch eager"])
@pytest.mark.parametrize("normalization", ["document", "global"])
@pytest.mark.parametrize("shape", SHAPES)
def test_span_marginal_loss(benchmark, measure, quick, shape, normalization, implementation):
    if quick and (shape, normalization) != ("B=8 K=5 C=2880", "document"):
        pytest.skip("--quick runs one shape")
    batch, documents, spans = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(batch, documents, generator=generator).requires_grad_()
    span_scores = torch.randn(batch, documents, spans, generator=generator).requires_grad_()
    correct = torch.rand(batch, documents, spans, generator=generator) < 0.01
    correct[:, 0, 0] = True
    benchmark.group = f"span_marginal_loss {normalization} {shape}"

    def step():
        scores.grad = span_scores.grad = None
        if implementation == "realm_kernels":
            loss = rk.span_marginal_loss(scores, span_scores, correct, normalization=normalization)
        else:
            loss = peers.span_marginal_loss(scores, span_scores, correct, normalization)
        loss.backward()
        return loss.detach()

    moved, flops = cost(batch, documents, spans, 4, 4)
    # The backward reads the same and writes a gradient of each input.
    moved += moved + batch * documents * (spans + 1) * 4
    loss = measure(implementation, step, bytes_moved=moved, flops=2 * flops)
    if implementation == "realm_kernels":
        expected = peers.span_marginal_loss(scores.double(), span_scores.double(), correct, normalization)
        assert (loss - expected.detach()).abs() <= 2.0**-20 * expected.detach().abs()
