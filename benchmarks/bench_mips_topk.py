"""mips_topk beside chunked torch, faiss, usearch and ScaNN. Bytes and flops: realm_kernels/mips_topk/plan.py.

Peers answer with the float32 rows where ours scan int8 codes of them: the job is the same.
"""

import functools

import pytest
import torch

import realm_kernels as rk
from realm_kernels.mips_topk.plan import cost

from . import peers, roofline
from .mips_topk_tables import CAN_QUANTIZE, DTYPES, INT8, ORDERS, alike_queries, queries, table

# Without bfloat16 instructions torch's bfloat16 product runs at a hundredth of its float32 one.
EMULATED = 1 / 8
SCANN_RECALL = 0.98
SCANN_TUNED = f"ScaNN at {SCANN_RECALL:.0%}"
INDEXES = {
    "faiss": ("faiss", peers.faiss_search),
    "usearch": ("usearch", peers.usearch_search),
    "ScaNN exact": ("scann", peers.scann_brute_force),
}
IMPLEMENTATIONS = ["realm_kernels", "torch", "torch_upcast", *INDEXES, SCANN_TUNED]
# Bytes of a row's element that a scan reads at least.
SCAN_BYTES = {"float32": 4, "bfloat16": 2, INT8: 1}


@functools.lru_cache(maxsize=len(INDEXES))
def index(name: str, num_rows: int, dim: int) -> peers.Search:
    return INDEXES[name][1](table(num_rows, dim, "float32"))


@functools.lru_cache(maxsize=1)
def scann_tuner(num_rows: int, dim: int) -> peers.ScannTuner:
    return peers.ScannTuner(table(num_rows, dim, "float32"))


@functools.lru_cache(maxsize=4)
def scann_tuned(num_rows: int, dim: int, k: int) -> peers.Tuned | None:
    """Tuned on queries that are not measured, for recall@10, or recall@k where more are asked for."""
    asked = torch.randn(256, dim, generator=torch.Generator().manual_seed(2))
    wanted = rk.mips_topk(asked, table(num_rows, dim, "float32"), max(10, k)).indices
    return scann_tuner(num_rows, dim).tune(asked, wanted, SCANN_RECALL)


def is_emulated(dtype: torch.dtype) -> bool:
    return roofline.measure_matrix_rate(dtype) < EMULATED * roofline.measure_matrix_rate(torch.float32)


def skip_unfit(implementation: str, dtype: str) -> None:
    """Leave out what this peer, this build or this processor does not do."""
    if dtype == INT8 and not CAN_QUANTIZE:
        pytest.skip("this version has no ShardedTable.quantize")
    if dtype == INT8 and implementation != "realm_kernels":
        pytest.skip("the peers' times for these rows are those of the float32 shape")
    if dtype != "float32" and (implementation in INDEXES or implementation == SCANN_TUNED):
        pytest.skip(f"{implementation} is measured over float32 rows")
    if implementation == "torch_upcast" and dtype == "float32":
        pytest.skip("a float32 table needs no conversion")
    if implementation == "torch" and is_emulated(DTYPES[dtype]):
        pytest.skip(f"{dtype} products are emulated on this processor: torch_upcast is what people use here")
    package = "scann" if implementation == SCANN_TUNED else INDEXES.get(implementation, ("torch",))[0]
    if not peers.INSTALLED.get(package, True):
        pytest.skip(f"{package} is not installed")


def group_of(num_rows: int, dim: int, dtype: str, batch: int, k: int) -> str:
    return f"mips_topk {dtype} N={num_rows} D={dim} B={batch} k={k}"


def limit_and_matrix_seconds(num_rows: int, dim: int, dtype: str, batch: int, k: int) -> tuple[float, float]:
    moved, flops = cost(batch, num_rows, dim, k, SCAN_BYTES[dtype], 4)
    product = torch.bfloat16 if dtype == "bfloat16" and not is_emulated(torch.bfloat16) else torch.float32
    return roofline.scan_limit_seconds(moved, flops, dtype), flops / roofline.measure_matrix_rate(product)


def assert_right(
    result: rk.TopK, asked: torch.Tensor, num_rows: int, dim: int, dtype: str, k: int, order: str
):
    """No speed of a wrong answer: one query against every canonical score, codes against rows for all."""
    rows = table(num_rows, dim, "float32" if dtype == INT8 else dtype, order)
    if dtype == INT8:
        expected = rk.mips_topk(asked, rows, k)
        assert torch.equal(result.indices, expected.indices) and torch.equal(result.scores, expected.scores)
    with rk.use_backend("reference"):
        expected = rk.mips_topk(asked[:1], rows, k)
    assert torch.equal(result.indices[:1], expected.indices)
    assert torch.equal(result.scores[:1], expected.scores)


def run(
    benchmark, measure, implementation: str, num_rows: int, dim: int, dtype: str, batch: int, k: int
) -> None:
    skip_unfit(implementation, dtype)
    asked = queries(batch, dim)
    group = functools.partial(group_of, num_rows, dim, batch=batch, k=k)
    benchmark.group = group(dtype)
    limit_seconds, matrix_seconds = limit_and_matrix_seconds(num_rows, dim, dtype, batch, k)
    shape = {"op": "mips_topk", "N": num_rows, "D": dim, "B": batch, "k": k, "dtype": dtype}
    benchmark.extra_info.update(shape=shape, matrix_seconds=matrix_seconds)
    if implementation == "realm_kernels":
        rows = table(num_rows, dim, dtype)
        benchmark.extra_info["compare"] = {
            f"ours {other}": group(other) for other in SCAN_BYTES if other != dtype
        }
        if dtype == INT8:
            benchmark.extra_info["peers_of"] = group("float32")

        def search():
            return rk.mips_topk(asked, rows, k)
    elif implementation in ("torch", "torch_upcast"):
        rows = table(num_rows, dim, dtype)
        operand = asked.to(rows.dtype) if implementation == "torch" else asked

        def search():
            return peers.chunked_torch_topk(operand, rows, k)
    elif implementation == SCANN_TUNED:
        tuned = scann_tuned(num_rows, dim, k)
        if tuned is None:
            pytest.skip(f"no settings of ScaNN reach a recall of {SCANN_RECALL}")
        benchmark.extra_info.update(recall=tuned.recall, settings=tuned.settings)

        def search():
            return tuned.search(asked, k)
    else:
        find = index(implementation, num_rows, dim)

        def search():
            return find(asked, k)

    result = measure(implementation, search, limit_seconds=limit_seconds)
    if implementation == "realm_kernels":
        assert_right(result, asked, num_rows, dim, dtype, k, "random")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("k", [8, 100])
@pytest.mark.parametrize("batch", [1, 8, 32, 128, 512])
@pytest.mark.parametrize("dtype", SCAN_BYTES)
def test_mips_topk(benchmark, measure, quick, dtype, batch, k, implementation):
    if quick and (batch, k) != (32, 8):
        pytest.skip("--quick runs one shape")
    run(benchmark, measure, implementation, 20_000 if quick else 1_000_000, 128, dtype, batch, k)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [1, 32, 512])
@pytest.mark.parametrize("dtype", SCAN_BYTES)
def test_mips_topk_wide(benchmark, measure, quick, dtype, batch, implementation):
    if quick:
        pytest.skip("--quick runs one shape")
    run(benchmark, measure, implementation, 200_000, 768, dtype, batch, 8)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float32", INT8])
def test_mips_topk_orders(benchmark, measure, quick, dtype, order):
    if dtype == INT8:
        skip_unfit("realm_kernels", dtype)
    num_rows, dim, batch, k = (20_000 if quick else 1_000_000), 128, 32, 8
    rows, asked = table(num_rows, dim, dtype, order), alike_queries(batch, dim)
    benchmark.group = f"{group_of(num_rows, dim, dtype, batch, k)} {order}"
    benchmark.extra_info["order"] = {"order": order, "of": group_of(num_rows, dim, dtype, batch, k)}
    limit_seconds, _ = limit_and_matrix_seconds(num_rows, dim, dtype, batch, k)
    result = measure("realm_kernels", lambda: rk.mips_topk(asked, rows, k), limit_seconds=limit_seconds)
    assert_right(result, asked, num_rows, dim, dtype, k, order)
