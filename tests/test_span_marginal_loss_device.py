"""span_marginal_loss as a torch op, and captured and rerun on a GPU; what is marked gpu runs on one only."""

from __future__ import annotations

import pytest
import torch

import realm_kernels as rk

NORMALIZATIONS = ("document", "global")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def problem(batch, documents, spans, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(batch, documents, spans + 1, generator=generator)
    masks = torch.rand(2, batch, documents, spans, generator=generator)
    scores, span_scores = drawn[:, :, 0].contiguous(), drawn[:, :, 1:].contiguous().to(dtype)
    tensors = scores, span_scores, masks[0] < 0.2, masks[1] < 0.9
    return tuple(x.to(device) for x in tensors)


def gradients(scores, span_scores, correct, valid, normalization, reduction="mean"):
    leaves = [x.detach().requires_grad_() for x in (scores, span_scores)]
    options = dict(valid=valid, normalization=normalization, reduction=reduction)
    loss = rk.span_marginal_loss(*leaves, correct, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_op_is_well_registered(normalization, reduction):
    scores, span_scores, correct, valid = problem(2, 3, 4)
    leaves = [x.requires_grad_() for x in (scores, span_scores)]
    arguments = (*leaves, correct, valid, None, None, normalization, reduction)
    torch.library.opcheck(torch.ops.realm_kernels.span_marginal_loss.default, arguments)


class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", [(8, 5, 2880), (2, 5000, 1), (3, 7, 33)], ids=str)
    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    def test_triton_equals_the_reference(self, normalization, shape, dtype):
        arguments = *problem(*shape, "cuda", dtype), normalization
        with rk.use_backend("reference"):
            expected = gradients(*arguments)
        with rk.use_backend("triton"):
            got = gradients(*arguments)
        for x, y in zip(got, expected, strict=True):
            # Both are float64 inside and round once: an ulp of the result apart where the roundings straddle.
            torch.testing.assert_close(x, y, rtol=torch.finfo(x.dtype).eps, atol=1e-12)

    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    def test_a_rerun_gives_equal_bits(self, normalization):
        arguments = *problem(4, 6, 500, "cuda"), normalization
        for x, y in zip(gradients(*arguments), gradients(*arguments), strict=True):
            assert torch.equal(x, y)

    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    def test_a_captured_step_computes_with_what_its_inputs_hold_at_replay(self, normalization):
        scores, span_scores, correct, valid = problem(4, 6, 50, "cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            gradients(scores, span_scores, correct, valid, normalization)  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients(scores, span_scores, correct, valid, normalization)
        scores.copy_(torch.randn_like(scores))
        span_scores.copy_(torch.randn_like(span_scores))
        graph.replay()
        for x, y in zip(captured, gradients(scores, span_scores, correct, valid, normalization), strict=True):
            assert torch.equal(x, y)
