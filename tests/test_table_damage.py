"""A damaged or hostile table directory: each damage is named with its file, and nothing is unpickled."""

import os
import pickle
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from table_files_cases import reseal, shard_paths, write

import realm_kernels as rk
from realm_kernels.table import shard_file


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
