"""The laws of test_linear_marginal_loss.py, kept by both Triton backends in Triton's interpreter, with static
shapes as on a GPU. Chunks of other sizes, and laws of its own for a GPU, are in
test_linear_marginal_loss_device.py; the kernels by themselves are tested here, where there is a GPU on it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_linear_marginal_loss as laws
import torch
from torch.nn import functional as F

from realm_kernels.linear_marginal_loss import chunked, op, triton
from realm_kernels.linear_marginal_loss.passes import TORCH
from realm_kernels.linear_marginal_loss.products import products_for
from realm_kernels.testing import assert_within

pytest.importorskip("triton")

ELSEWHERE = {
    # float64, which the backend leaves to torch's operations
    "test_permuted_documents_permute_the_gradients",
    "test_the_posterior_is_that_of_the_likelihoods",
    "test_the_workspace_changes_nothing_but_roundings",
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAWS = {name: law for name, law in vars(laws).items() if name.startswith("test_") and name not in ELSEWHERE}
if DEVICE == "cuda":  # they are about tensors of the CPU, which compiled kernels do not take
    LAWS = {}
globals().update(LAWS)
REFUSALS = {"test_bad_input_is_named", "test_out_of_range_targets_are_refused_and_named"}


@pytest.fixture(autouse=True, params=triton.BACKENDS, ids=lambda backend: backend.name)
def backend(request, monkeypatch):
    """The one backend there is, and it has served the law it is judged by, whatever the dtype."""
    served = []

    def forward(problem, needs, reduction):
        served.append(problem)
        return request.param.forward(problem, needs, reduction)

    only = replace(request.param, refuses=lambda _: None, forward=forward, default=True)
    monkeypatch.setattr(op, "BACKENDS", (only,))
    monkeypatch.setattr(chunked, "may_count_rows", lambda device: False)
    if "vocabulary" in request.fixturenames:
        # The interpreter walks program by program; a GPU has no room for such tiles.
        for tile in ("STATISTICS_V", "GRADIENT_V", "PRODUCT_V_NARROW"):
            monkeypatch.setattr(triton, tile, 4096)
    yield request.param
    assert bool(served) == (request.function.__name__ in LAWS.keys() - REFUSALS)


@pytest.mark.parametrize("words", [1, 63, 65, 300], ids="V{}".format)
@pytest.mark.parametrize("rows", [1, 8, 129, 304], ids="R{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [37, 64])
def test_passes_are_right_at_every_edge_of_a_tile(dtype, rows, words, width, backend):
    """Half precision gradients lie over the first half of the logits' bytes."""
    if DEVICE == "cuda" and dtype == torch.float32 and backend is triton.EPILOGUE:
        pytest.skip("refused")
    weight = (4 / width**0.5 * torch.randn(words, width, device=DEVICE)).to(dtype)
    hidden, bias = torch.randn(rows, width, device=DEVICE).to(dtype), torch.randn(words, device=DEVICE)
    targets = torch.randint(words, (rows,), device=DEVICE)
    factor = torch.rand(rows, device=DEVICE).double() * (torch.rand(rows, device=DEVICE) < 0.8)
    exact = (weight.double() @ hidden.double().T + bias.double()[:, None]).log_softmax(0)
    d_exact = factor * (exact.exp() - F.one_hot(targets, words).T)

    passes, d_bias = triton.PASSES[backend.name], torch.ones(words, device=DEVICE)
    products = products_for(weight, torch.float32)
    workspace = hidden.new_empty(words, rows, dtype=torch.float32)
    found = passes.score_(products, hidden.to(products.operand_dtype), workspace, bias, targets)
    d_logits = passes.gradient_(workspace, bias, targets, found, factor, dtype, d_bias)
    assert d_logits.dtype == dtype and d_logits.data_ptr() == workspace.data_ptr()
    # Logits of size 20 with a rounding each, exponentials and products of a few more; and each logit is a
    # sum, which log p and the gradients have once for the target and once for the rest.
    sums = (weight.double().abs() @ hidden.double().abs().T).max().item()
    eps = (64 + 2 * width * sums) * 2.0**-24
    assert_within(found.log_p, exact.gather(0, targets[None])[0], eps, "log p")
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert_within(d_logits, d_exact, (eps + torch.finfo(dtype).eps) * d_exact.abs() + smallest, "d_logits")
    assert_within(d_bias - 1, d_exact.sum(1), eps * (1 + d_exact.abs().sum(1)), "d_bias")


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("is_target", [False, True], ids=["another", "target"])
def test_a_logit_that_is_no_number_tells_as_it_does_in_torch(spoilt, is_target, backend):
    """The last word, past which a tile reads on. Rows are 1, so a logit is the sum of its weights."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    weight = torch.randn(70, 8, device=DEVICE).to(dtype)
    weight[-1] = spoilt
    targets = torch.full((5,), 69 if is_target else 3, device=DEVICE)
    products, hidden = products_for(weight, torch.float32), torch.ones(5, 8, device=DEVICE, dtype=dtype)
    hidden = hidden.to(products.operand_dtype)
    got, want = (
        passes.score_(products, hidden, hidden.new_empty(70, 5, dtype=torch.float32), None, targets)
        for passes in (triton.PASSES[backend.name], TORCH)
    )
    torch.testing.assert_close(got.log_p, want.log_p, rtol=1e-4, atol=0, equal_nan=True)
    assert got.log_p.isfinite().all() == (spoilt == -torch.inf and not is_target)
