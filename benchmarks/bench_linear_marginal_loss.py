"""linear_marginal_loss, forward and backward, beside plain, chunked and linear_cross_entropy torch.

Bytes and flops: realm_kernels/linear_marginal_loss/plan.py. On the CPU bfloat16 is multiplied in float32,
so the limit is the float32 matrix rate.
"""

import pytest
import torch
from torch.nn import functional as F

import realm_kernels as rk
from realm_kernels.linear_marginal_loss.plan import cost

from . import marginal_loss_peers as peers

DOCUMENTS, TOKENS, WIDTH, VOCABULARY = 8, 20, 768, 30522
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A batch is padded to its longest answer: of 20 places these are scored.
SCORED = {"full": 20, "padded": 6}
PEERS = {
    "torch eager": peers.eager,
    "torch chunked": lambda *inputs: peers.chunked(*inputs, rows=2048),
}
if hasattr(F, "linear_cross_entropy"):
    PEERS["torch linear_cross_entropy"] = peers.linear_cross_entropy


def inputs(batch: int, scored: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, DOCUMENTS, TOKENS, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5
    targets = torch.randint(VOCABULARY, (batch, TOKENS), generator=generator)
    targets[:, scored:] = -100
    scores = torch.randn(batch, DOCUMENTS, generator=generator)
    bias = torch.zeros(VOCABULARY)
    trained = [scores, hidden.to(dtype), weight.to(dtype), bias.to(dtype)]
    return [*(tensor.requires_grad_() for tensor in trained), targets]


def ours(scores, hidden, weight, bias, targets):
    return rk.linear_marginal_loss(scores, hidden, weight, targets, bias=bias)


@pytest.mark.parametrize("implementation", ["realm_kernels", *PEERS])
@pytest.mark.parametrize("padding", SCORED)
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_marginal_loss(benchmark, measure, quick, dtype, batch, padding, implementation):
    if quick and (dtype, batch, padding) != ("float32", 1, "padded"):
        pytest.skip("--quick runs one shape")
    if dtype == "bfloat16" and (batch, padding) != (1, "padded"):
        pytest.skip("where torch has no fast bfloat16 product its peers take minutes")
    tensors = inputs(batch, SCORED[padding], DTYPES[dtype])
    loss_of = ours if implementation == "realm_kernels" else PEERS[implementation]
    benchmark.group = f"linear_marginal_loss {dtype} B={batch} K={DOCUMENTS} M={SCORED[padding]} of {TOKENS}"

    def step():
        for tensor in tensors[:4]:
            tensor.grad = None
        loss = loss_of(*tensors)
        loss.backward()
        return loss.detach()

    rows = batch * DOCUMENTS * SCORED[padding]
    moved, flops = cost(rows, WIDTH, VOCABULARY, tensors[1].element_size(), products=3)
    loss = measure(implementation, step, bytes_moved=moved, flops=flops, dtype=torch.float32)
    if implementation == "realm_kernels" and dtype == "float32":
        # No speed of a wrong answer: the loss against plain torch's, float32 roundings of M log likelihoods.
        expected = peers.eager(*tensors).detach()
        assert (loss - expected).abs() <= 2.0**-20 * expected.abs()
