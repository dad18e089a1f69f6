"""A table directory: what was appended is what is read, and damage is named with its file."""

import hashlib
import json
import os
import pickle
import resource

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import realm_kernels as rk
from realm_kernels.table import manifest, shard_file
from realm_kernels.table.shard_stream import PIECE_BYTES, OpenShard

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def write(path, rows, **arguments):
    with rk.TableWriter(path, dim=rows.shape[1], dtype=rows.dtype, **arguments) as writer:
        writer.append(rows)
    return writer


def rows_of(table):
    return torch.cat(list(table.shards))


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def shard_paths(path):
    return sorted(path.glob("shard-*.safetensors"))


def reseal(path, change):
    """Rewrite manifest.json after `change(body)`, with a right checksum: only the rules can refuse it."""
    body = json.loads((path / "manifest.json").read_bytes())
    change(body)
    body["checksum"] = "0" * 64
    raw = json.dumps(body).encode()
    checksum = hashlib.sha256(raw).hexdigest().encode()
    (path / "manifest.json").write_bytes(raw[: -64 - 2] + checksum + b'"}')


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


def test_every_flipped_byte_of_the_manifest_is_noticed(tmp_path):
    write(tmp_path, torch.randn(5, 3), shard_rows=3)
    raw = (tmp_path / "manifest.json").read_bytes()
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "manifest.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json: "):
            rk.ShardedTable.open(tmp_path)


def test_a_manifest_too_large_to_be_one_is_not_read(tmp_path):
    write(tmp_path, torch.randn(5, 3))
    os.truncate(tmp_path / "manifest.json", 2**40)  # a hole
    with pytest.raises(ValueError, match=r"manifest\.json: a manifest must be at most 67108864 bytes"):
        rk.ShardedTable.open(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 50, -1])
def test_a_truncated_manifest_is_noticed(tmp_path, keep):
    write(tmp_path, torch.randn(5, 3))
    raw = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").write_bytes(raw[:keep])
    with pytest.raises(ValueError, match=r"manifest\.json: "):
        rk.ShardedTable.open(tmp_path)


def test_every_flipped_byte_of_a_shard_is_noticed_by_verify(tmp_path):
    write(tmp_path, torch.randn(5, 3))
    (path,) = shard_paths(tmp_path)
    raw = path.read_bytes()
    header_end = raw.index(b"}}") + 2
    for position in [*range(header_end), header_end + 1, 4095, *range(4096, len(raw))]:
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=path.name):
            rk.ShardedTable.open(tmp_path, verify=True)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_at_all_make_a_table_open(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("t")
    (path / "manifest.json").write_bytes(raw)
    with pytest.raises(ValueError, match=r"manifest\.json: "):
        rk.ShardedTable.open(path)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda b: b.update(format=3), "format must be 2, the one this version reads, got 3"),
        (lambda b: b.pop("format"), "format must be 2, the one this version reads, got None"),
        (lambda b: b.update(version=-1), "version must be a whole number, got -1"),
        (lambda b: b.update(version=True), "version must be a whole number, got True"),
        (lambda b: b.update(dim=0), "dim must be at least 1, got 0"),
        (lambda b: b.update(dim=3.0), r"dim must be a whole number, got 3\.0"),
        (lambda b: b.update(dim=10**30), "dim must be a whole number"),
        (lambda b: b.update(dim=4), r"rows must be \{'dtype': 'F32', 'shape': \[3, 4\]"),
        (lambda b: b.update(dtype="int8"), "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (lambda b: b.update(dtype=["float32"]), "dtype must be one of"),
        (lambda b: b.update(dtype="bfloat16"), "rows must be {'dtype': 'BF16'"),
        (lambda b: b.update(rows=6), "rows must be the sum over its shards, 5, got 6"),
        (lambda b: b.update(shards={}), "shards must be a list, got {}"),
        (
            lambda b: b["shards"].append(7),
            "shard 2 must have the fields file, first_row, .*, first_id, after_id, tombstones, got 7",
        ),
        (lambda b: b["shards"][1].pop("size"), "shard 1 must have the fields"),
        (lambda b: b["shards"][1].update(mode="x"), "shard 1 must have the fields"),
        (lambda b: b["shards"][1].update(first_row=4), "shard 1 must begin at row 3, .* got 4"),
        (lambda b: b["shards"][1].update(first_id=2), "shard 1 must hold 2 ids from 3 on, got first_id 2"),
        (lambda b: b["shards"][1].update(after_id=4), "shard 1 must hold 2 ids from 3 on, got .*after_id 4"),
        (lambda b: b["shards"][1].update(tombstones=3), "shard 1 must have at most 2 tombstones, .* got 3"),
        (
            lambda b: b["shards"][1].update(tombstones=1),
            "one tensor, named 'rows', and the 'ids' of its rows",
        ),
        (lambda b: b.update(next_id=4), "next_id must be at least 5, where its last shard ends, got 4"),
        (lambda b: b["shards"][0].update(rows=-3), "rows of shard 0 must be a whole number, got -3"),
        (lambda b: b["shards"][0].update(size="9"), "size of shard 0 must be a whole number, got '9'"),
        (lambda b: b["shards"][0].update(checksum="0"), "checksum of shard 0 must be 64 hexadecimal digits"),
        (lambda b: b["shards"][1].update(file=b["shards"][0]["file"]), "no two shards may be the same file"),
        (lambda b: b["shards"][0].update(file="../secret"), "shard 0 must be named .* got '../secret'"),
        (lambda b: b["shards"][0].update(file="/etc/passwd"), "shard 0 must be named"),
        (lambda b: b["shards"][0].update(file=["x"]), "shard 0 must be named"),
        (lambda b: b["shards"][0].update(file=b["shards"][0]["file"] + "\n"), "shard 0 must be named"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_sealed_but_lying_manifest_is_refused(tmp_path, change, rule):
    write(tmp_path, torch.randn(5, 3), shard_rows=3)
    reseal(tmp_path, lambda body: None)
    rk.ShardedTable.open(tmp_path, verify=True)
    reseal(tmp_path, change)
    with pytest.raises(ValueError, match=str(tmp_path) + ".*" + rule) as caught:
        rk.ShardedTable.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_shard_whose_size_lies_in_both_places_is_refused(tmp_path):
    write(tmp_path, torch.randn(5, 3))
    (path,) = shard_paths(tmp_path)
    path.write_bytes(shard_file.header(5000, 3, torch.float32) + path.read_bytes()[4096:])
    reseal(
        tmp_path,
        lambda body: (
            body["shards"][0].update(rows=5000, after_id=5000),
            body.update(rows=5000, next_id=5000),
        ),
    )
    with pytest.raises(ValueError, match=path.name + ": header and rows must fill the file of 4156 bytes"):
        rk.ShardedTable.open(tmp_path)


@pytest.mark.parametrize(
    ("head", "rule"),
    [
        (b"\xff" * 8, "header must fit into the file"),
        (b"\0" * 8, "header must fit into the file"),
        ((16).to_bytes(8, "little") + b"[" * 16, "header must be JSON"),
        ((16).to_bytes(8, "little") + b"[1, 2]".ljust(16), "must hold one tensor, named 'rows'"),
        ((16).to_bytes(8, "little") + b'{"other": 1}'.ljust(16), "must hold one tensor, named 'rows'"),
        ((16).to_bytes(8, "little") + b'{"rows": null}'.ljust(16), "rows must be {'dtype'"),
    ],
    ids=["huge", "zero", "not-json", "list", "other-name", "null"],
)
def test_a_hostile_shard_header_is_refused(tmp_path, head, rule):
    write(tmp_path, torch.randn(5, 3))
    (path,) = shard_paths(tmp_path)
    path.write_bytes(head + path.read_bytes()[len(head) :])
    with pytest.raises(ValueError, match=path.name + ": .*" + rule):
        rk.ShardedTable.open(tmp_path)


@pytest.mark.parametrize("change", [-1, -60, -4156, 1], ids=["byte-short", "rows-gone", "empty", "byte-long"])
def test_a_shard_of_the_wrong_size_is_refused_unasked(tmp_path, change):
    write(tmp_path, torch.randn(5, 3))
    (path,) = shard_paths(tmp_path)
    os.truncate(path, 4156 + change)
    word = "truncated" if change < 0 else "damaged"
    with pytest.raises(ValueError, match=f"{path.name}: the shard is {word}: it must have 4156 bytes, got"):
        rk.ShardedTable.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, torch.randn(5, 3), shard_rows=3)
    path = shard_paths(tmp_path)[1]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"the file is missing: '{path}'"):
        rk.ShardedTable.open(tmp_path)


@pytest.mark.parametrize("which", ["manifest.json", "shard"])
def test_nothing_is_read_through_a_link_or_from_a_pipe(tmp_path, which):
    path = tmp_path / "t"
    write(path, torch.randn(5, 3))
    victim = path / "manifest.json" if which == "manifest.json" else shard_paths(path)[0]
    victim.rename(tmp_path / "outside")
    victim.symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match=r"it is a symbolic link\): '" + str(victim)):
        rk.ShardedTable.open(path)
    victim.unlink()
    os.mkfifo(victim)
    with pytest.raises(OSError, match=r"it is not a regular file\): '" + str(victim)):
        rk.ShardedTable.open(path)


def test_a_directory_may_itself_be_a_link(tmp_path):
    write(tmp_path / "t", torch.ones(5, 3))
    (tmp_path / "link").symlink_to(tmp_path / "t")
    assert write(tmp_path / "link", torch.ones(5, 3)).version == 2
    assert rk.ShardedTable.open(tmp_path / "link").version == 2


class Bomb:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize("which", ["manifest.json", "shard"])
def test_nothing_is_unpickled(tmp_path, which):
    write(tmp_path, torch.randn(5, 3))
    path = tmp_path / "manifest.json" if which == "manifest.json" else shard_paths(tmp_path)[0]
    path.write_bytes(pickle.dumps(Bomb()).ljust(path.stat().st_size))
    with pytest.raises(ValueError, match=path.name):
        rk.ShardedTable.open(tmp_path)


def test_what_is_no_table_is_said_to_be_none(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"this is not a table: it has no manifest.json: '{tmp_path}'"
    ):
        rk.ShardedTable.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="this is not a table"):
        rk.ShardedTable.open(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=f"a table must be a directory: '{tmp_path}/file'"):
        rk.ShardedTable.open(tmp_path / "file")


def test_a_mapping_the_kernel_refuses_is_one_clear_line(tmp_path):
    write(tmp_path, torch.randn(50_000, 64))  # 12.8 MB
    (path,) = shard_paths(tmp_path)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            rk.ShardedTable.open(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "cannot map this shard" in str(caught.value) and path.name in str(caught.value)
    assert "\n" not in str(caught.value)
