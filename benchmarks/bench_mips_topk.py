"""mips_topk beside chunked torch and faiss. Bytes and flops: realm_kernels/mips_topk/plan.py."""

import functools

import pytest
import torch

import realm_kernels as rk
from realm_kernels.mips_topk.plan import cost

from . import peers, roofline

DIM = 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Without bfloat16 instructions torch's bfloat16 product runs at a hundredth of its float32 one.
EMULATED = 1 / 8


@functools.cache
def table(num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)


@functools.cache
def faiss_search(num_rows: int):
    return peers.faiss_search(table(num_rows, torch.float32))


def is_emulated(dtype: torch.dtype) -> bool:
    return roofline.measure_matrix_rate(dtype) < EMULATED * roofline.measure_matrix_rate(torch.float32)


@pytest.mark.parametrize("implementation", ["realm_kernels", "torch", "torch_upcast", "faiss"])
@pytest.mark.parametrize("k", [8, 100])
@pytest.mark.parametrize("batch", [1, 8, 32, 128, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mips_topk(benchmark, measure, quick, dtype, batch, k, implementation):
    if quick and (batch, k) != (32, 8):
        pytest.skip("--quick runs one shape")
    if implementation == "faiss" and dtype != "float32":
        pytest.skip("faiss IndexFlatIP holds float32 only")
    if implementation == "torch_upcast" and dtype == "float32":
        pytest.skip("a float32 table needs no conversion")
    if implementation == "torch" and is_emulated(DTYPES[dtype]):
        pytest.skip(f"{dtype} products are emulated on this processor: torch_upcast is what people use here")
    num_rows = 20_000 if quick else 1_000_000
    rows = table(num_rows, DTYPES[dtype])
    queries = torch.randn(batch, DIM, generator=torch.Generator().manual_seed(1))
    benchmark.group = f"mips_topk {dtype} N={num_rows} D={DIM} B={batch} k={k}"
    if implementation == "realm_kernels":

        def search():
            return rk.mips_topk(queries, rows, k)
    elif implementation in ("torch", "torch_upcast"):
        operand = queries.to(rows.dtype) if implementation == "torch" else queries

        def search():
            return peers.chunked_torch_topk(operand, rows, k)
    else:
        index = faiss_search(num_rows)
        if index is None:
            pytest.skip("faiss is not installed")

        def search():
            return index(queries, k)

    moved, flops = cost(batch, num_rows, DIM, k, rows.element_size(), queries.element_size())
    result = measure(implementation, search, bytes_moved=moved, flops=flops, dtype=torch.float32)
    if implementation == "realm_kernels":
        # No speed of a wrong answer: one query against every canonical score.
        with rk.use_backend("reference"):
            expected = rk.mips_topk(queries[:1], rows, k)
        assert torch.equal(result.indices[:1], expected.indices)
        assert torch.equal(result.scores[:1], expected.scores)
