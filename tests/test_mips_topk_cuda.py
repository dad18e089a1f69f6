"""The CUDA C++ backend of mips_topk on a Hopper GPU beside the CPU backend, bit for bit; what it refuses.

The tests marked gpu have not run yet: no GPU has been at hand.
"""

import pytest
import torch
from mips_topk_cuda_cases import ORDERS, TILE, integers, ordered_table, special_rows
from torch._subclasses.fake_tensor import FakeTensorMode

import realm_kernels as rk
from realm_kernels import native
from realm_kernels.mips_topk import cuda as backend
from realm_kernels.mips_topk import gpu
from realm_kernels.testing import assert_same_topk

INF, NAN = float("inf"), float("nan")


def unusable():
    reason = native.cuda_unusable()
    if not reason and torch.cuda.get_device_capability() != backend.HOPPER:
        reason = "no Hopper GPU"
    return reason


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(bool(unusable()), reason=unusable() or "it runs")(test))


@pytest.mark.parametrize(
    "queries,rows,k,reason",
    [
        (torch.randn(2, 8), torch.randn(9, 8), 1, "rows of float32"),
        (torch.randn(2, 8), torch.randn(9, 8).half(), 1, "float16 need queries of float16"),
        (torch.randn(2, 9), torch.randn(9, 9).bfloat16(), 1, "multiples of 16 bytes, got a stride of 18"),
        (torch.randn(2, 8), torch.randn(8, 9).bfloat16().t(), 1, "must be contiguous"),
        (torch.randn(2, 8), torch.randn(1, 8).bfloat16().expand(9, 8), 1, "must not overlap"),
        (torch.randn(2, 8), torch.randn(9, 8).bfloat16(), 2049, "k must be at most 2048"),
        (torch.randn(2, 8200), torch.randn(9, 8200).bfloat16(), 1, "D must be at most 8192"),
        (torch.randn(2, 8), torch.randn(9, 8).bfloat16(), 1, None),
        (torch.randn(2, 8).half(), torch.randn(9, 8).half(), 1, None),
        (torch.randn(2, 8), torch.randn(9, 16).bfloat16()[:, :8], 1, None),
    ],
)
def test_what_it_refuses(queries, rows, k, reason):
    said = backend.refuses_layout(queries, [rows], k)
    assert said is None if reason is None else reason in said


def test_it_is_no_default():
    assert not backend.BACKEND.default
    assert backend.refuses(torch.randn(2, 8), [torch.randn(9, 8)], 1, None, None) is not None  # CPU tensors


def test_repairs_of_a_device_without_an_index_are_those_of_the_current_one(monkeypatch):
    monkeypatch.setattr(gpu, "_repairs", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with FakeTensorMode():
        counter = gpu.repair_counter(torch.device("cuda:1"))
        assert gpu.repair_counter(torch.device("cuda")) is counter
        assert gpu.repair_counter(torch.device("cuda:0")) is not counter


def check(queries, table, k, exclude=None, row_mask=None):
    """The CUDA backend on the GPU equals the C++ backend on the CPU; returns what it found."""
    shards = table if isinstance(table, list) else [table]
    with rk.use_backend("cpu"):
        expected = rk.mips_topk(
            queries, rk.ShardedTable.from_tensors(shards), k, exclude=exclude, row_mask=row_mask
        )
    arguments = {
        name: None if x is None else x.cuda() for name, x in (("exclude", exclude), ("row_mask", row_mask))
    }
    on_device = rk.ShardedTable.from_tensors([shard.cuda() for shard in shards])
    with rk.use_backend("cuda"):
        found = rk.mips_topk(queries.cuda(), on_device, k, **arguments)
    assert_same_topk(found, expected)
    return found


SHAPES = [
    # Each shape of the scan, around its edges; the first few are small enough for compute-sanitizer.
    (1, 300, 128, 8),
    (64, 300, 128, 8),
    (65, 300, 128, 8),
    (300, 300, 768, 8),  # two blocks of queries, and a cluster with three tiles
    (130, 700, 64, 5),
    (66, 200, 840, 3),
    (3, 5000, 768, 100),
    (64, 20_000, 768, 8),
    (128, 20_000, 768, 8),
    (512, 50_000, 128, 8),
    (513, 20_000, 128, 8),
    (1000, 20_000, 256, 20),
    (2, 100_000, 1024, 2048),
]


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("B,N,D,k", SHAPES)
def test_equals_the_cpu(dtype, B, N, D, k):
    check(torch.randn(B, D).to(dtype), torch.randn(N, D).to(dtype), k)


@on_gpu
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("N", [327, 20_000])
def test_adversarial_orders(order, N):
    queries, rows = ordered_table(order, N)
    check(queries, rows, 7)


@on_gpu
@pytest.mark.parametrize("N,k", [(1, 1), (7, 6), (31, 31), (32, 3), (33, 33), (127, 5), (128, 9), (129, 65)])
def test_sizes_around_groups_and_tiles(N, k):
    check(torch.randn(2, 16), torch.randn(N, 16).bfloat16(), k)


@on_gpu
def test_nan_infinities_and_tombstones():
    queries, rows = special_rows()
    for k in (6, 200):
        check(queries, rows, k)


@on_gpu
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e15, 1e19, 3e38], ids=lambda s: f"scale{s:g}")
def test_tiny_and_huge_values(scale):
    queries, rows = torch.randn(70, 16), (torch.randn(150, 16).clamp(-1, 1) * scale).bfloat16()
    queries[1] *= scale
    check(queries, rows, 5)


@on_gpu
def test_ties_shards_exclusions_and_masks():
    queries, rows = integers(70, 8), integers(3000, 8).bfloat16()
    exclude, row_mask = torch.randint(-1, 3000, (70, 9)), torch.rand(3000) < 0.5
    row_mask[400:700] = False
    for pieces in (1, 3):
        check(queries, list(rows.tensor_split(pieces)), 100, exclude, row_mask)


@on_gpu
def test_batch_k_and_a_rerun_do_not_matter():
    queries, rows = torch.randn(300, 128, device="cuda"), torch.randn(30_000, 128, device="cuda").bfloat16()
    with rk.use_backend("cuda"):
        whole = rk.mips_topk(queries, rows, 100)
        assert_same_topk(rk.mips_topk(queries, rows, 100), whole)
        for few in (slice(17, 18), slice(100, 180)):
            assert_same_topk(rk.mips_topk(queries[few], rows, 100), (whole.scores[few], whole.indices[few]))
        first = rk.mips_topk(queries, rows, 10)
        assert_same_topk(first, (whole.scores[:, :10], whole.indices[:, :10]))


@on_gpu
def test_repairs_are_counted_and_right():
    before = gpu.repairs("cuda:0")
    check(torch.randn(3, 128), torch.randn(1, 128).bfloat16().expand(20_000, 128).contiguous(), 4)
    assert gpu.repairs("cuda:0") == before + 3


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("B,D", [(3, 128), (200, 128), (130, 768)])
def test_int8_codes(dtype, B, D):
    queries, rows = torch.randn(B, D), (torch.randn(20_000, D) + 3).to(dtype)
    with rk.use_backend("cpu"):
        expected = rk.mips_topk(queries, rows, 8)
    with rk.use_backend("cuda"):
        table = rk.ShardedTable.from_tensors([rows.cuda()]).quantize("int8")
        assert_same_topk(rk.mips_topk(queries.cuda(), table, 8), expected)


@pytest.mark.skipif(native.cuda is None, reason="the CUDA module was not built")
def test_kernels_are_not_loaded_during_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="search once before the capture"):
        backend.load(torch.device("cuda", 7))


@on_gpu
def test_in_a_cuda_graph_and_on_a_stream_of_its_own():
    queries, rows = torch.randn(80, 128, device="cuda"), torch.randn(30_000, 128, device="cuda").bfloat16()
    with rk.use_backend("cuda"):
        rk.mips_topk(queries[:2], rows, 3)  # loads the kernels, for every shape
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = rk.mips_topk(queries, rows, 8)
        for _ in range(3):
            queries.copy_(torch.randn_like(queries))
            graph.replay()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                expected = rk.mips_topk(queries, rows, 8)
            torch.cuda.current_stream().wait_stream(stream)
            assert_same_topk(captured, expected)


@on_gpu
@pytest.mark.parametrize("B", [64, 512])
def test_a_hundred_million_scored_pairs(B):
    """10^8 pairs and more of a query and a row, ties among them, beside the CPU."""
    queries = torch.randn(B, 128)
    rows = torch.randn(-(-(10**8) // B), 128).bfloat16()
    rows[1::1000] = rows[::1000][: len(rows[1::1000])]
    check(queries, rows, 100)


@on_gpu
@pytest.mark.parametrize("D", [128, 136, 768])
@pytest.mark.parametrize("B", [5, 200])
@pytest.mark.parametrize("scale", [1.0, 2.0**-62, 2.0**40])
def test_the_bound_of_a_sum_holds_on_the_hardware(B, D, scale):
    """s - s~ of the scan itself is within what tensor cores may lose: truncation, flushed subnormals.

    Words round maxima upward by up to 2^-11, which would hide a larger loss in most of them, but not in those
    that lie just above a number of twenty bits; there are thousands.
    """
    queries = (torch.rand(B, D, device="cuda") * scale).bfloat16()  # positive: all cuts go one way
    num_rows = 500_000 // B
    rows = (torch.rand(num_rows, D, device="cuda") * scale).bfloat16()
    piece = backend.Piece(rows, 0, None)
    plan = backend.plan_for(B, piece, D, 1, 0, queries.dtype, backend.load(queries.device))
    workspace = torch.empty(plan["bytes"], dtype=torch.uint8, device="cuda")
    result = torch.empty(B, 1, device="cuda"), torch.empty(B, 1, dtype=torch.int64, device="cuda")
    backend.launch(queries, piece, None, *result, workspace, B, whole=False)
    start, pitch = plan["words"], plan["pitch"]
    words = workspace[start : start + 4 * B * pitch].view(torch.int32).view(B, pitch)
    scores = torch.nn.functional.pad(queries.double() @ rows.double().T, (0, -num_rows % TILE))
    best = scores.view(B, -1, TILE).amax(2)
    maxima = (words[:, : best.shape[1]] & -4096).view(torch.float32).double()
    norms = queries.double().norm(dim=1, keepdim=True) * rows.double().norm(dim=1).amax()
    error = 2.0**-22 * (D + D / 8 + 4) * norms + 2.0**-126 * 2 * D * (norms.sqrt() + 1)
    assert (maxima >= best - error).all()
    assert (maxima <= (best + error) * (1 + 2.0**-11)).all()
