"""linear_marginal_loss, forward and backward, beside plain, compiled, chunked and linear_cross_entropy torch.

Bytes and flops: realm_kernels/linear_marginal_loss/plan.py; the limit is the library's square product of the
dtype. Memory: linear_marginal_loss_memory.py.
"""

import pytest

from realm_kernels.linear_marginal_loss.plan import cost

from . import marginal_loss_peers as peers
from .linear_marginal_loss_cases import DTYPES, IMPLEMENTATIONS, SHAPES, inputs

# At H = 768 a call of these takes seconds, up to some ten times ours: one that warms up and one that counts.
SLOW = {"torch linear_cross_entropy"}

# A batch is padded to its longest answer: of 20 places these are scored.
SCORED = {"full": 20, "padded": 6}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("padding", SCORED)
@pytest.mark.parametrize("batch", [4, 16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_marginal_loss(benchmark, measure, quick, dtype, shape, batch, padding, implementation):
    if quick and (dtype, shape, batch, padding) != ("float32", "tiny", 4, "padded"):
        pytest.skip("--quick runs one shape")
    if padding == "padded" and (shape, batch) != ("tiny", 4):
        pytest.skip("padding is one row of the report")
    if quick and implementation == "torch compile":
        pytest.skip("compiling is not quick")
    width, vocabulary = SHAPES[shape]
    tensors = inputs(batch, SCORED[padding], width, vocabulary, DTYPES[dtype])
    loss_of = IMPLEMENTATIONS[implementation]
    benchmark.group = (
        f"linear_marginal_loss {dtype} B={batch} K=8 M={SCORED[padding]} of 20 H={width} V={vocabulary}"
    )

    def step():
        for tensor in tensors[:4]:
            tensor.grad = None
        loss = loss_of(*tensors)
        loss.backward()
        return loss.detach()

    moved, flops = cost(batch * 8 * SCORED[padding], width, vocabulary, tensors[1].element_size(), products=3)
    loss = measure(
        implementation,
        step,
        bytes_moved=moved,
        flops=flops,
        dtype=DTYPES[dtype],
        least=1 if implementation in SLOW and shape == "base" else 5,
    )
    if implementation == "realm_kernels":
        # No speed of a wrong answer: the loss against torch's in float64, within float32 roundings.
        wide = [tensor.detach().double() for tensor in tensors[:4]]
        if shape == "tiny" or batch == 4:
            expected = peers.eager(*wide, tensors[4])
            assert (loss - expected).abs() <= 2.0**-20 * expected.abs()
