"""mips_topk on a GPU at full size: the CPU's ids and bits, its memory, streams and graphs."""

import pytest
import torch

import realm_kernels as rk
from benchmarks.gpu.timing import extra_bytes
from realm_kernels.mips_topk import triton
from realm_kernels.mips_topk.triton_plan import WORKSPACE_BYTES
from realm_kernels.testing import assert_same_topk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BATCHES = (1, 16, 64, 128, 256, 512, 1024, 4096)
B, N = 512, 200_000  # 10^8 scored pairs


def integers(*shape):
    """Every product and sum is exact, and every tie is real."""
    return torch.randint(-2, 3, shape).float()


DATA = {"integers": integers, "random": torch.randn}


def on_gpu(queries, rows, k):
    return rk.mips_topk(queries.cuda(), rows.cuda(), k)


@pytest.mark.parametrize("k", [8, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("data", DATA)
def test_ten_to_the_eight_pairs_are_those_of_the_cpu_bit_for_bit(data, dtype, k):
    queries, rows = (DATA[data](count, 128).to(DTYPES[dtype]) for count in (B, N))
    assert_same_topk(on_gpu(queries, rows, k), rk.mips_topk(queries, rows, k))


@pytest.mark.parametrize("data", DATA)
def test_certified_codes_give_the_bits_of_the_rows(data):
    queries, rows = DATA[data](B, 128), DATA[data](N, 128)
    try:
        table = rk.ShardedTable.from_tensors([rows.cuda()]).quantize("int8")
    except (ValueError, NotImplementedError, TypeError) as error:
        pytest.skip(f"no codes on a GPU: {error}")
    assert_same_topk(rk.mips_topk(queries.cuda(), table, 8), rk.mips_topk(queries, rows, 8))


@pytest.mark.parametrize("dim", [100, 768])
def test_other_widths(dim):
    queries, rows = torch.randn(64, dim).bfloat16(), torch.randn(50_001, dim).bfloat16()
    assert_same_topk(on_gpu(queries, rows, 100), rk.mips_topk(queries, rows, 100))


@pytest.mark.parametrize("k", [8, 100])
def test_embeddings_of_a_trained_model(k, request):
    folder = request.config.getoption("--embeddings")
    if not folder:
        pytest.skip("no --embeddings: a folder that realm-model index wrote")
    table = rk.ShardedTable.open(folder)
    count = min(4096, max(64, N * B // table.num_rows))
    queries = table.rows(torch.randint(table.num_rows, (count,)))
    assert_same_topk(rk.mips_topk(queries.cuda(), table.to("cuda"), k), rk.mips_topk(queries, table, k))


def test_the_batch_and_k_do_not_matter():
    queries, rows = torch.randn(512, 128).bfloat16().cuda(), torch.randn(100_000, 128).bfloat16().cuda()
    scores, indices = rk.mips_topk(queries, rows, 100)
    for first in (0, 511):
        alone = rk.mips_topk(queries[first : first + 1], rows, 10)
        assert_same_topk(alone, (scores[first : first + 1, :10], indices[first : first + 1, :10]))
    assert_same_topk(rk.mips_topk(queries, list_of(rows, 33), 100), (scores, indices))


def list_of(rows, shards):
    return rk.ShardedTable.from_tensors(list(rows.tensor_split(shards)))


@pytest.mark.parametrize("batch", BATCHES)
def test_the_extra_memory_keeps_to_the_budget(batch):
    rows = torch.empty(13_353_718, 128, dtype=torch.bfloat16, device="cuda").normal_()
    queries = torch.randn(batch, 128, device="cuda").bfloat16()
    for k in (8, 100):
        assert extra_bytes(lambda k=k: rk.mips_topk(queries, rows, k)) <= WORKSPACE_BYTES


def test_the_host_waits_for_nothing():
    queries, rows = torch.randn(64, 128, device="cuda"), torch.randn(50_000, 128, device="cuda")
    rk.mips_topk(queries, rows, 8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rk.mips_topk(queries, rows, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_search_answers_new_queries_over_new_rows():
    queries, rows = torch.randn(64, 128, device="cuda"), torch.randn(50_000, 128, device="cuda")
    rk.mips_topk(queries, rows, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rk.mips_topk(queries, rows, 8)
    for _ in range(2):
        queries.normal_(), rows.normal_()
        graph.replay()
        assert_same_topk(captured, rk.mips_topk(queries.cpu(), rows.cpu(), 8))


def test_searches_of_several_streams_do_not_disturb_each_other():
    rows = torch.randn(300_000, 128, device="cuda")
    asked = [torch.randn(64, 128, device="cuda") for _ in range(4)]
    expected = [rk.mips_topk(queries, rows, 8) for queries in asked]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in asked], []
    for _ in range(3):
        for stream, queries in zip(streams, asked, strict=True):
            with torch.cuda.stream(stream):
                found.append(rk.mips_topk(queries, rows, 8))
    torch.cuda.synchronize()
    for got, right in zip(found, expected * 3, strict=True):
        assert_same_topk(got, right)


def test_repairs_are_counted():
    device = torch.device("cuda", torch.cuda.current_device())
    rows = torch.randn(1, 128, device="cuda").expand(50_000, 128)
    queries = torch.randn(7, 128, device="cuda")
    before = triton.repairs(device)
    assert_same_topk(rk.mips_topk(queries, rows, 8), rk.mips_topk(queries.cpu(), rows.cpu(), 8))
    assert triton.repairs(device) == before + 7


def test_compiled_whole_it_gives_the_same_forward_and_backward():
    rows = torch.randn(20_000, 64, device="cuda")
    queries = torch.randn(9, 64, device="cuda", requires_grad=True)

    def loss(queries):
        return rk.mips_topk(queries, rows, 8).scores.logsumexp(1).sum()

    (expected,) = torch.autograd.grad(loss(queries), queries)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(queries), queries)
    # The two sums over k may be ordered differently: 8 terms of weights that add up to 1.
    bound = 2.0**-20 * rows.abs().max()
    assert (got - expected).abs().max() <= bound
