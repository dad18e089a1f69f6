"""The CUDA C++ backend of marginal_loss against the reference. Nothing here has run without a GPU."""

import pytest
import torch

import realm_kernels as rk
from realm_kernels import native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(native.cuda_unusable()), reason=native.cuda_unusable() or "it runs"),
]


@pytest.mark.parametrize("mode", ["sequence", "token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("B,K,M", [(1, 1, 1), (3, 8, 10), (2, 1000, 3), (5, 129, 1)])
def test_equals_the_reference(mode, dtype, B, K, M):
    scores = torch.randn(B, K, device="cuda", dtype=torch.float64).float().requires_grad_()
    log_likelihood = (-60 - torch.rand(B, K, M, device="cuda")).to(dtype).requires_grad_()
    masks = {
        "token_mask": torch.rand(B, M, device="cuda") < 0.7,
        "doc_mask": torch.rand(B, K, device="cuda") < 0.8,
    }
    results = {}
    for backend in ("reference", "cuda"):
        with rk.use_backend(backend):
            loss = rk.marginal_loss(scores, log_likelihood, mode=mode, **masks)
            results[backend] = loss, *torch.autograd.grad(loss, (scores, log_likelihood))
    for expected, got in zip(results["reference"], results["cuda"], strict=True):
        # Both are float64 inside and round once: an ulp of the result apart where the roundings straddle.
        torch.testing.assert_close(got, expected, rtol=torch.finfo(got.dtype).eps, atol=1e-12)


def test_a_rerun_gives_equal_bits():
    scores, log_likelihood = torch.randn(9, 50, device="cuda"), -torch.rand(9, 50, 7, device="cuda")
    with rk.use_backend("cuda"):
        first, second = (rk.marginal_loss(scores, log_likelihood, reduction="none") for _ in range(2))
    assert torch.equal(first, second)
