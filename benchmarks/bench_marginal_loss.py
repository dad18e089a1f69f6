"""marginal_loss, forward and backward, beside plain torch. Bytes and flops: marginal_loss/plan.py."""

import pytest
import torch

import realm_kernels as rk
from realm_kernels.marginal_loss.plan import cost

from . import marginal_loss_peers as peers

SHAPES = {"B=16 K=8 M=20": (16, 8, 20), "B=512 K=8 M=20": (512, 8, 20), "B=64 K=100 M=32": (64, 100, 32)}


@pytest.mark.parametrize("implementation", ["realm_kernels", "torch eager"])
@pytest.mark.parametrize("mode", ["sequence", "token"])
@pytest.mark.parametrize("shape", SHAPES)
def test_marginal_loss(benchmark, measure, quick, shape, mode, implementation):
    if quick and (shape, mode) != ("B=16 K=8 M=20", "sequence"):
        pytest.skip("--quick runs one shape")
    batch, documents, tokens = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(batch, documents, generator=generator).requires_grad_()
    log_likelihood = (-10 * torch.rand(batch, documents, tokens, generator=generator)).requires_grad_()
    benchmark.group = f"marginal_loss {mode} {shape}"

    def step():
        scores.grad = log_likelihood.grad = None
        if implementation == "realm_kernels":
            loss = rk.marginal_loss(scores, log_likelihood, mode=mode)
        else:
            loss = peers.marginal_loss(scores, log_likelihood, mode)
        loss.backward()
        return loss.detach()

    moved, flops = cost(batch, documents, tokens, mode, 4, 4)
    # The backward reads the same and writes a gradient of each input.
    moved += moved + batch * documents * (tokens + 1) * 4
    loss = measure(implementation, step, bytes_moved=moved, flops=2 * flops)
    if implementation == "realm_kernels":
        expected = peers.marginal_loss(scores.double(), log_likelihood.double(), mode).detach()
        assert (loss - expected).abs() <= 2.0**-20 * expected.abs()
