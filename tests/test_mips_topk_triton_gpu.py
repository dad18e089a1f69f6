"""What only a GPU can show of the Triton backend of mips_topk. Nothing here has run without one."""

import gc

import pytest
import torch

import realm_kernels as rk
from realm_kernels.mips_topk import gpu
from realm_kernels.testing import assert_same_topk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
ROWS, DIM = 40_000, 64
WHERE = ["device", "codes", "pinned codes", "mapped codes", "pinned", "pageable"]
CAPTURABLE = ["device", "codes", "pinned codes", "pinned"]


def table_on(where, shards, path=None):
    """A ShardedTable of these CPU shards, as the name says."""
    table = rk.ShardedTable.from_tensors(shards)
    if where.startswith("pinned"):
        table = table.pin_memory()
    if where == "mapped codes":
        table.save(path / "table")
        table = rk.ShardedTable.open(path / "table")
    if where in ("device", "codes"):
        table = table.to("cuda")
    return table.quantize("int8", device="cuda") if "codes" in where else table


def random_shards(dtype=torch.bfloat16, rows=ROWS, integers=False):
    draw = torch.randint(-3, 4, (rows, DIM)).float() if integers else torch.randn(rows, DIM)
    return [draw[: rows // 3].to(dtype), draw[rows // 3 :].to(dtype)]


def on_the_cpu(queries, shards, k, **barred):
    barred = {name: value.cpu() for name, value in barred.items()}
    return rk.mips_topk(queries.cpu(), rk.ShardedTable.from_tensors(shards), k, **barred)


@pytest.mark.parametrize("integers", [False, True], ids=["random", "integers"])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("B", [1, 16, 64, 200])
def test_ids_and_bits_are_those_of_the_cpu(where, B, integers, tmp_path):
    shards = random_shards(integers=integers)
    table, queries = table_on(where, shards, tmp_path), torch.randn(B, DIM, device="cuda")
    if integers:
        queries = queries.mul(2).round()
    exclude = torch.randint(-1, ROWS, (B, 3), device="cuda")
    row_mask = torch.rand(ROWS, device="cuda") < 0.9
    for k in (8, 100):
        assert_same_topk(rk.mips_topk(queries, table, k), on_the_cpu(queries, shards, k))
        barred = dict(exclude=exclude, row_mask=row_mask)
        assert_same_topk(rk.mips_topk(queries, table, k, **barred), on_the_cpu(queries, shards, k, **barred))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("k", [1500, 5000])
def test_many_rows(where, k, tmp_path):
    shards, queries = random_shards(), torch.randn(3, DIM, device="cuda")
    table = table_on(where, shards, tmp_path)
    assert_same_topk(rk.mips_topk(queries, table, k), on_the_cpu(queries, shards, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 9, 100, 128, 768])
def test_dtypes_and_widths(dtype, dim):
    table, queries = torch.randn(3000, dim).to(dtype), torch.randn(70, dim)
    for sent in (queries, queries.to(dtype)):
        expected = rk.mips_topk(sent, table, 10)
        assert_same_topk(rk.mips_topk(sent.cuda(), table.cuda(), 10), expected)
        coded = rk.ShardedTable.from_tensors([table.cuda()]).quantize()
        assert_same_topk(rk.mips_topk(sent.cuda(), coded, 10), expected)


def test_repairs_are_exact_and_rare():
    shards, queries = random_shards(), torch.randn(100, DIM, device="cuda")
    table = table_on("codes", shards)
    before = gpu.repairs("cuda")
    rk.mips_topk(queries, table, 8)
    assert gpu.repairs("cuda") - before <= 5
    equal = [torch.randn(1, DIM).expand(5000, DIM).contiguous()]
    for where in ("device", "codes", "pinned codes"):
        assert_same_topk(rk.mips_topk(queries, table_on(where, equal), 8), on_the_cpu(queries, equal, 8))


def test_the_tensor_core_keeps_to_the_bound():
    """Rows that all score nearly the same make every error of the scan visible."""
    for scale in (1.0, 1e-3, 1e3):
        rows = torch.rand(20_000, 128) * 2.0**-9 * scale + scale
        for dtype in (torch.float32, torch.bfloat16):
            table, queries = rows.to(dtype), torch.rand(64, 128) + 0.5
            expected = rk.mips_topk(queries, table, 20)
            assert_same_topk(rk.mips_topk(queries.cuda(), table.cuda(), 20), expected)


@pytest.mark.parametrize("where", CAPTURABLE)
def test_a_captured_search_replays_with_new_queries(where):
    shards, queries = random_shards(), torch.randn(9, DIM, device="cuda")
    table = table_on(where, shards)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        rk.mips_topk(queries, table, 8)  # compiles, and encodes
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = rk.mips_topk(queries, table, 8)
    for _ in range(3):
        queries.copy_(torch.randn(9, DIM))
        graph.replay()
        assert_same_topk(found, on_the_cpu(queries, shards, 8))


@pytest.mark.parametrize("where", ["mapped codes", "pageable"])
def test_rows_that_the_host_reads_cannot_be_captured(where, tmp_path):
    table, queries = table_on(where, random_shards(), tmp_path), torch.randn(9, DIM, device="cuda")
    rk.mips_topk(queries, table, 8)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="pin_memory"), torch.cuda.graph(graph):
        rk.mips_topk(queries, table, 8)


@pytest.mark.parametrize("where", CAPTURABLE)
def test_nothing_waits_for_the_gpu(where):
    shards = random_shards()
    table, queries = table_on(where, shards), torch.randn(9, DIM, device="cuda", requires_grad=True)
    exclude = torch.randint(-1, ROWS, (9, 3), device="cuda")
    rk.mips_topk(queries, table, 8, exclude=exclude)
    torch.cuda.set_sync_debug_mode("error")
    try:
        top = rk.mips_topk(queries, table, 8, exclude=exclude)
        top.scores.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    everything = torch.cat([shard.float() for shard in shards]).cuda()
    torch.testing.assert_close(queries.grad, everything[top.indices].sum(1))


@pytest.mark.parametrize("where", ["mapped codes", "pageable"])
def test_gradients_reach_queries_from_rows_of_the_host(where, tmp_path):
    shards, queries = random_shards(), torch.randn(9, DIM, device="cuda", requires_grad=True)
    top = rk.mips_topk(queries, table_on(where, shards, tmp_path), 8)
    top.scores.sum().backward()
    everything = torch.cat([shard.float() for shard in shards]).cuda()
    torch.testing.assert_close(queries.grad, everything[top.indices].sum(1))


def test_streams_do_not_disturb_each_other():
    shards = random_shards()
    tables = [table_on(where, shards) for where in CAPTURABLE]
    queries = [torch.randn(33, DIM, device="cuda") for _ in range(8)]
    expected = [on_the_cpu(q, shards, 8) for q in queries]
    for table in tables:
        streams = [torch.cuda.Stream() for _ in queries]
        torch.cuda.synchronize()
        found = []
        for stream, q in zip(streams, queries, strict=True):
            with torch.cuda.stream(stream):
                found.append(rk.mips_topk(q, table, 8))
        torch.cuda.synchronize()
        for top, wanted in zip(found, expected, strict=True):
            assert_same_topk(top, wanted)


@pytest.mark.parametrize("B", [1, 512, 4096])
@pytest.mark.parametrize("where", ["device", "codes", "pinned"])
def test_memory_keeps_to_the_budget(where, B):
    table = table_on(where, random_shards(rows=300_000))
    queries = torch.randn(B, DIM, device="cuda")
    rk.mips_topk(queries, table, 100)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    top = rk.mips_topk(queries, table, 100)
    returned = sum(x.numel() * x.element_size() for x in top)
    used = torch.cuda.max_memory_allocated() - before
    # Results of a piece, and what merging two of them takes.
    assert used <= gpu.WORKSPACE_BYTES + 16 * returned + (4 << 20)


def test_a_swap_of_rows_in_place_is_seen():
    rows = torch.randn(5000, DIM, device="cuda")
    queries = torch.randn(7, DIM, device="cuda")
    table = rk.ShardedTable.from_tensors([rows]).quantize()
    rk.mips_topk(queries, table, 5)
    rows.copy_(torch.randn(5000, DIM))
    assert_same_topk(rk.mips_topk(queries, table, 5), on_the_cpu(queries, [rows.cpu()], 5))


def test_rows_written_since_they_were_encoded_cannot_be_captured():
    rows, queries = torch.randn(5000, DIM, device="cuda"), torch.randn(7, DIM, device="cuda")
    table = rk.ShardedTable.from_tensors([rows]).quantize()
    rk.mips_topk(queries, table, 5)
    rows.mul_(2)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="search once before the capture"), torch.cuda.graph(graph):
        rk.mips_topk(queries, table, 5)


@pytest.mark.parametrize("where", ["device", "codes", "pinned codes"])
def test_compiled_whole(where):
    shards, queries = random_shards(), torch.randn(9, DIM, device="cuda")
    table = table_on(where, shards)
    compiled = torch.compile(lambda q: rk.mips_topk(q, table, 8), fullgraph=True)
    assert_same_topk(compiled(queries), on_the_cpu(queries, shards, 8))


def test_opcheck():
    table = rk.ShardedTable.from_tensors([torch.randn(900, DIM, device="cuda")]).quantize()
    queries = torch.randn(4, DIM, device="cuda", requires_grad=True)
    arguments = (queries, list(table.shards), 5, None, None, True, table.codes.tensors())
    torch.library.opcheck(torch.ops.realm_kernels.mips_topk.default, arguments)


def test_a_table_on_disk_is_streamed(tmp_path):
    shards = random_shards()
    rk.ShardedTable.from_tensors(shards).save(tmp_path / "table")
    table = rk.StreamedTable(tmp_path / "table", window_bytes=1 << 20)
    queries = torch.randn(9, DIM, device="cuda", requires_grad=True)
    barred = dict(
        exclude=torch.randint(-1, ROWS, (9, 3), device="cuda"), row_mask=torch.rand(ROWS, device="cuda") < 0.9
    )
    top = rk.mips_topk(queries, table, 8, **barred)
    assert_same_topk([x.detach() for x in top], on_the_cpu(queries.detach(), shards, 8, **barred))
    (gradient,) = torch.autograd.grad(top.scores.sum(), queries)
    everything = torch.cat([shard.float() for shard in shards]).cuda()
    torch.testing.assert_close(gradient, everything[top.indices].sum(1))


def test_a_tensor_on_the_host_is_refused():
    with pytest.raises(ValueError, match="table must be on cuda:0"):
        rk.mips_topk(torch.randn(2, DIM, device="cuda"), torch.randn(100, DIM), 5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_current_device_does_not_matter():
    shards, queries = random_shards(), torch.randn(9, DIM, device="cuda:1")
    table = rk.ShardedTable.from_tensors(shards).to("cuda:1").quantize()
    assert_same_topk(rk.mips_topk(queries, table, 8), on_the_cpu(queries, shards, 8))
