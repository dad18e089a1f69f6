"""The laws of test_linear_marginal_loss.py, kept by the Triton backend in Triton's interpreter, with static
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


@pytest.fixture(autouse=True)
def in_the_interpreter(request, monkeypatch):
    """The one backend there is, and it has served the law it is judged by."""
    served = []

    def forward(problem, needs, reduction):
        served.append(problem)
        return triton.BACKEND.forward(problem, needs, reduction)

    monkeypatch.setattr(op, "BACKENDS", (replace(triton.BACKEND, refuses=lambda _: None, forward=forward),))
    monkeypatch.setattr(chunked, "may_count_rows", lambda device: False)
    if "vocabulary" in request.fixturenames:
        # The interpreter walks program by program; a GPU has no room for such tiles.
        monkeypatch.setattr(triton, "STATISTICS_V", 4096)
        monkeypatch.setattr(triton, "GRADIENT_V", 4096)
    yield
    assert bool(served) == (request.function.__name__ in LAWS.keys() - REFUSALS)


@pytest.mark.parametrize("vocabulary", [1, 63, 65, 200], ids="V{}".format)
@pytest.mark.parametrize("rows", [1, 8, 129, 300], ids="R{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_passes_are_right_at_every_edge_of_a_tile(dtype, rows, vocabulary):
    """Half precision gradients lie over the first half of the logits' bytes."""
    logits, bias = 4 * torch.randn(vocabulary, rows, device=DEVICE), torch.randn(vocabulary, device=DEVICE)
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    factor = torch.rand(rows, device=DEVICE).double() * (torch.rand(rows, device=DEVICE) < 0.8)
    exact = (logits + bias[:, None]).double().log_softmax(0)
    d_exact = factor * (exact.exp() - F.one_hot(targets, vocabulary).T)

    passes, d_bias = triton.TritonPasses(), torch.ones(vocabulary, device=DEVICE)
    workspace = logits.clone()
    found = passes.statistics_(workspace, bias, targets)
    d_logits = passes.gradient_(workspace, bias, targets, found, factor, dtype, d_bias)
    assert d_logits.dtype == dtype and d_logits.data_ptr() == workspace.data_ptr()
    # Logits of size 20 with a rounding each, exponentials and products of a few more.
    eps = 64 * 2.0**-24
    assert_within(found.log_p, exact.gather(0, targets[None])[0], eps, "log p")
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert_within(d_logits, d_exact, (eps + torch.finfo(dtype).eps) * d_exact.abs() + smallest, "d_logits")
    assert_within(d_bias - 1, d_exact.sum(1), eps * (1 + d_exact.abs().sum(1)), "d_bias")
