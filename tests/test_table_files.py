"""A table directory: what was appended is what is read, and damage is named with its file."""

import hashlib
import os

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from table_files_cases import shard_paths, write

import realm_kernels as rk
from realm_kernels.table import manifest, shard_file
from realm_kernels.table.shard_stream import PIECE_BYTES, OpenShard

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows_of(table):
    return torch.cat(list(table.shards))


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_appended_is_what_is_read(tmp_path, dtype, mmap):
    rows = torch.randn(25, 6).to(dtype)
    rows[3, 2], rows[4, 1], rows[5, 5] = torch.nan, -torch.inf, -0.0
    with rk.TableWriter(tmp_path / "t", dim=6, dtype=dtype, shard_rows=10) as writer:
        for piece in rows.split([1, 0, 13, 11]):
            writer.append(piece)
    table = rk.ShardedTable.open(tmp_path / "t", mmap=mmap, verify=True)
    assert same_bits(rows_of(table), rows)
    assert [shard.shape[0] for shard in table.shards] == [10, 10, 5]
    assert table.version == writer.version == 1


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), max_size=6), shard_rows=st.integers(1, 12))
def test_files_do_not_depend_on_how_the_rows_were_appended(tmp_path_factory, sizes, shard_rows):
    path = tmp_path_factory.mktemp("t")
    rows = torch.arange(sum(sizes) * 2, dtype=torch.float32).view(-1, 2)
    whole = write(path / "whole", rows, shard_rows=shard_rows).committed()
    with rk.TableWriter(path / "pieces", dim=2, dtype=torch.float32, shard_rows=shard_rows) as writer:
        for piece in rows.split(sizes):
            writer.append(piece)
    assert whole.checksums == writer.committed().checksums
    assert same_bits(rows_of(rk.ShardedTable.open(path / "pieces", verify=True)), rows)


def test_append_converts_to_the_dtype_of_the_table(tmp_path):
    rows = torch.randn(4, 12)[:, ::3].requires_grad_()  # strided, with a gradient
    with rk.TableWriter(tmp_path / "t", dim=4, dtype=torch.bfloat16) as writer:
        writer.append(rows)
        writer.append(rows.half())
    assert same_bits(
        rows_of(rk.ShardedTable.open(tmp_path / "t")),
        torch.cat([rows.detach().bfloat16(), rows.detach().half().bfloat16()]),
    )


def test_save_and_open_give_the_rows_back(tmp_path):
    shards = [torch.randn(n, 3) for n in (4, 0, 5)]
    table = rk.ShardedTable.from_tensors(shards)
    assert table.save(tmp_path / "t", shard_rows=2) == 1
    assert table.save(tmp_path / "t") == 2
    opened = rk.ShardedTable.open(str(tmp_path / "t"))
    assert same_bits(rows_of(opened), torch.cat(shards)) and opened.version == 2
    assert opened.save(tmp_path / "t") == 3  # onto the files it is mapped from
    assert same_bits(rows_of(opened), torch.cat(shards))


def test_an_empty_table_is_a_table(tmp_path):
    write(tmp_path / "t", torch.empty(0, 5).half())
    table = rk.ShardedTable.open(tmp_path / "t", verify=True)
    assert (table.num_rows, table.dim, table.dtype) == (0, 5, torch.float16)


def test_appending_holds_one_piece_in_memory(tmp_path, monkeypatch):
    pieces = []
    append = OpenShard.append
    monkeypatch.setattr(
        OpenShard, "append", lambda self, rows, ids: (pieces.append(rows.nbytes), append(self, rows, ids))
    )
    write(tmp_path / "t", torch.zeros(1, 128).expand(100_000, 128))
    assert sum(pieces) == 100_000 * 128 * 4 and max(pieces) <= PIECE_BYTES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_safetensors_library_reads_our_shards(tmp_path, dtype):
    rows = torch.randn(7, 3).to(dtype)
    write(tmp_path / "t", rows, shard_rows=4)
    files = [safetensors.torch.load_file(path) for path in shard_paths(tmp_path / "t")]
    assert [list(file) for file in files] == [["rows"], ["rows"]]
    assert same_bits(torch.cat([file["rows"] for file in files]), rows)


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_we_read_shards_of_the_safetensors_library(tmp_path, dtype, mmap):
    rows = torch.randn(7, 3).to(dtype)
    name = "shard-000001-00000000-00000.safetensors"
    safetensors.torch.save_file({"rows": rows}, tmp_path / name)
    raw = (tmp_path / name).read_bytes()
    shard = manifest.Shard(name, 0, 7, len(raw), hashlib.sha256(raw).hexdigest(), 0, 7, 0)
    (tmp_path / "manifest.json").write_bytes(manifest.encode(manifest.Manifest(1, 3, dtype, 7, 7, (shard,))))
    assert same_bits(rows_of(rk.ShardedTable.open(tmp_path, mmap=mmap, verify=True)), rows)


def test_rows_begin_on_a_page():
    assert len(shard_file.header(2**40, 2**20, torch.bfloat16)) == shard_file.DATA_OFFSET == 4096


def test_checksums_are_those_of_sha256sum(tmp_path):
    committed = write(tmp_path / "t", torch.randn(7, 3), shard_rows=4).committed()
    for shard in committed.shards:
        assert shard.checksum == hashlib.sha256((tmp_path / "t" / shard.file).read_bytes()).hexdigest()


def test_writing_into_a_mapped_shard_never_reaches_the_file(tmp_path):
    rows = torch.randn(5, 3)
    write(tmp_path / "t", rows)
    table = rk.ShardedTable.open(tmp_path / "t")
    table.shards[0].fill_(7.0)
    assert table.shards[0].eq(7.0).all()
    assert same_bits(rows_of(rk.ShardedTable.open(tmp_path / "t", verify=True)), rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_search_over_a_mapped_table_gives_the_same_bits(tmp_path, dtype):
    rows, queries = torch.randn(300, 24).to(dtype), torch.randn(5, 24)
    write(tmp_path, rows, shard_rows=77)
    expected = rk.mips_topk(queries, rows, 9)
    found = rk.mips_topk(queries, rk.ShardedTable.open(tmp_path), 9)
    assert torch.equal(found.indices, expected.indices) and same_bits(found.scores, expected.scores)


def test_a_table_of_many_shards_keeps_one_file_open_and_one_in_memory_none(tmp_path):
    write(tmp_path / "t", torch.randn(40, 2), shard_rows=1)
    before = len(os.listdir("/dev/fd"))
    table = rk.ShardedTable.open(tmp_path / "t", verify=True)
    assert len(table.shards) == 40 and len(os.listdir("/dev/fd")) == before + 1  # the manifest, held
    read = rk.ShardedTable.open(tmp_path / "t", mmap=False)
    assert len(os.listdir("/dev/fd")) == before + 1
    del table, read
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
def test_a_reader_keeps_its_version_while_writers_commit_others(tmp_path, mmap):
    first = torch.randn(6, 3)
    write(tmp_path / "t", first, shard_rows=2)
    table = rk.ShardedTable.open(tmp_path / "t", mmap=mmap)
    for version in range(2, 5):
        assert write(tmp_path / "t", torch.full((4, 3), float(version))).version == version
    assert same_bits(rows_of(table), first) and table.version == 1
    assert rk.ShardedTable.open(tmp_path / "t").version == 4


def test_a_reader_overtaken_by_a_commit_opens_the_new_table(tmp_path, monkeypatch):
    write(tmp_path / "t", torch.zeros(2, 3))
    stale = manifest.read(tmp_path / "t")
    write(tmp_path / "t", torch.ones(4, 3))
    answers = iter([stale])
    read = manifest.read
    monkeypatch.setattr(manifest, "read", lambda path: next(answers, None) or read(path))
    table = rk.ShardedTable.open(tmp_path / "t")
    assert table.version == 2 and rows_of(table).eq(1.0).all() and table.num_rows == 4


def test_rows_lie_beyond_two_to_the_31(tmp_path):
    """Ids and offsets beyond 2^31, in files with holes: only the pages that are asked for exist."""
    sizes = [2**30, 2**30, 3]
    shards, first = [], 0
    for number, rows in enumerate(sizes):
        name = f"shard-000001-00000000-{number:05d}.safetensors"
        with open(tmp_path / name, "wb") as file:
            file.write(shard_file.header(rows, 1, torch.bfloat16))
            file.truncate(shard_file.DATA_OFFSET + 2 * rows)
            file.seek(shard_file.DATA_OFFSET + 2 * (rows - 2))
            file.write(
                torch.tensor([number + 1.0, -number - 1.0]).bfloat16().view(torch.uint8).numpy().tobytes()
            )
            size = file.seek(0, os.SEEK_END)
            shards.append(manifest.Shard(name, first, rows, size, "0" * 64, first, first + rows, 0))
        first += rows
    (tmp_path / "manifest.json").write_bytes(
        manifest.encode(manifest.Manifest(1, 1, torch.bfloat16, first, first, tuple(shards)))
    )
    table = rk.ShardedTable.open(tmp_path)
    indices = torch.tensor([2**30 - 1, 2**30 - 2, 2**31 - 1, 2**31 + 2, 2**31 + 1, 2**31, -1])
    assert table.num_rows == 2**31 + 3
    assert table.rows(indices).flatten().tolist() == [-1.0, 1.0, -2.0, -3.0, 3.0, 0.0, 0.0]
