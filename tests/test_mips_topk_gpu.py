"""mips_topk on a GPU at full size: the CPU's ids and bits over 10^8 pairs, and its memory."""

import pytest
import torch

import realm_kernels as rk
from benchmarks.gpu.timing import extra_bytes
from realm_kernels.mips_topk import gpu
from realm_kernels.mips_topk.gpu import WORKSPACE_BYTES
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
    table = rk.ShardedTable.from_tensors([rows.cuda()]).quantize("int8")
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


def test_repairs_are_counted():
    device = torch.device("cuda", torch.cuda.current_device())
    rows = torch.randn(1, 128, device="cuda").expand(50_000, 128)
    queries = torch.randn(7, 128, device="cuda")
    before = gpu.repairs(device)
    assert_same_topk(rk.mips_topk(queries, rows, 8), rk.mips_topk(queries.cpu(), rows.cpu(), 8))
    assert gpu.repairs(device) == before + 7
