"""TableEditor: versions share what did not change, ids name rows for good, what was taken out never comes."""

import hashlib
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import realm_kernels as rk
from realm_kernels.table import manifest

D = 3


def start(path, rows, shard_rows=4):
    with rk.TableWriter(path, dim=D, dtype=torch.float32, shard_rows=shard_rows) as writer:
        writer.append(rows)
    return path


def shard_names(path):
    return [shard.file for shard in manifest.read(path).shards]


def content(path):
    """{id: row} of the rows that are there, by way of what a user calls."""
    table = rk.ShardedTable.open(path, verify=True)
    numbers = torch.arange(table.num_rows)
    alive = numbers if table.row_mask is None else numbers[table.row_mask]
    return {int(table.ids(number)): table.rows(number).tolist() for number in alive}


@settings(max_examples=40, deadline=None)
@given(data=st.data(), shard_rows=st.integers(1, 7))
def test_any_sequence_of_changes_is_that_of_a_dictionary(tmp_path_factory, data, shard_rows):
    path = tmp_path_factory.mktemp("t")
    count = data.draw(st.integers(0, 12))
    start(path, torch.arange(count * D).view(-1, D).float(), shard_rows)
    expected = {i: [float(D * i + d) for d in range(D)] for i in range(count)}
    next_id = count
    for version in range(2, data.draw(st.integers(2, 5))):
        with rk.TableEditor(path, shard_rows=shard_rows) as editor:
            there = sorted(expected)
            gone = data.draw(st.lists(st.sampled_from(there), unique=True)) if there else []
            editor.tombstone(gone)
            rest = [i for i in there if i not in gone]
            changed = data.draw(st.lists(st.sampled_from(rest), unique=True)) if rest else []
            rows = torch.rand(len(changed), D)
            editor.replace(torch.tensor(changed, dtype=torch.int64), rows)
            new = torch.rand(data.draw(st.integers(0, 9)), D)
            assert editor.append(new) == range(next_id, next_id + len(new))
            if data.draw(st.booleans()):
                editor.compact()
        for i in gone:
            del expected[i]
        expected |= dict(zip(changed, rows.tolist(), strict=True))
        expected |= {next_id + n: row for n, row in enumerate(new.tolist())}
        next_id += len(new)
        assert content(path) == expected and editor.committed().version == version
        assert set(os.listdir(path)) == {*shard_names(path), "manifest.json", ".lock"}


def test_unchanged_shards_are_shared_between_versions(tmp_path):
    start(tmp_path, torch.randn(12, D))
    first = shard_names(tmp_path)
    with rk.TableEditor(tmp_path, shard_rows=4) as editor:
        editor.replace([5], torch.zeros(1, D))
        editor.append(torch.randn(2, D))
    second = shard_names(tmp_path)
    assert [second[0], second[2]] == [first[0], first[2]] and second[1] != first[1] and len(second) == 4
    with rk.TableEditor(tmp_path, shard_rows=4) as editor:
        editor.tombstone([0])
        editor.compact()
    third = shard_names(tmp_path)
    assert third[1:3] == second[1:3] and third[0] not in second
    table = rk.ShardedTable.open(tmp_path)
    assert table.ids(torch.tensor([0, 12, -1])).tolist() == [1, 13, -1] and table.num_rows == 13


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("compacted", [False, True], ids=["tombstones", "compacted"])
def test_a_search_never_returns_what_was_taken_out(tmp_path, backend, compacted):
    rows, queries = torch.randn(40, D), torch.randn(6, D)
    queries[5] = 0.0  # every row scores 0
    start(tmp_path, rows, shard_rows=9)
    gone = rk.mips_topk(queries, rows, 5).indices.unique()
    with rk.TableEditor(tmp_path, shard_rows=9) as editor:
        editor.tombstone(gone)
        if compacted:
            editor.compact()
    table = rk.ShardedTable.open(tmp_path)
    assert (table.row_mask is None) == compacted
    mask = torch.ones(40, dtype=torch.bool)
    mask[gone] = False
    expected = rk.mips_topk(queries, rows, 20, row_mask=mask)
    with rk.use_backend(backend):
        for row_mask in {None, table.row_mask}:
            k = min(20, table.num_rows)
            top = rk.mips_topk(queries, table, k, row_mask=row_mask)
            assert torch.equal(table.ids(top.indices), expected.indices[:, :k])
            assert torch.equal(top.scores, expected.scores[:, :k])


def test_bad_ids_are_refused_before_anything_is_written(tmp_path):
    start(tmp_path, torch.randn(6, D))
    with rk.TableEditor(tmp_path) as editor:
        editor.tombstone([2])
    before = sorted(os.listdir(tmp_path))
    cases = [
        ([1, 3, 1], ValueError, "ids must name each row once, got 1 twice"),
        ([6], ValueError, "ids must be those of rows in version 2 .* got 6, which no row ever had"),
        ([-1], ValueError, "got -1, which no row ever had"),
        ([0, 2], ValueError, "got 2, which was taken out"),
        (["x"], TypeError, r"ids must be whole numbers \[n\], got list"),
        (torch.zeros(2), ValueError, "ids must be of dtype int64"),
    ]
    with rk.TableEditor(tmp_path) as editor:
        for ids, error, message in cases:
            with pytest.raises(error, match="^TableEditor: .*" + message):
                editor.tombstone(ids)
            with pytest.raises(error, match="^TableEditor: .*" + message):
                editor.replace(ids, torch.zeros(len(ids), D))
        with pytest.raises(ValueError, match=r"TableEditor: rows must be \[n, D\] = \[2, 3\]"):
            editor.replace([0, 1], torch.zeros(1, D))
        assert sorted(os.listdir(tmp_path)) == before
    with pytest.raises(RuntimeError, match="append works inside"):
        editor.append(torch.zeros(1, D))
    with pytest.raises(FileNotFoundError, match="this is not a table"), rk.TableEditor(tmp_path / "no"):
        pass
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("change", ["replace", "tombstone", "compact"])
def test_damage_is_never_given_a_new_checksum(tmp_path, change):
    start(tmp_path, torch.randn(8, D))
    with rk.TableEditor(tmp_path) as editor:
        editor.tombstone([0, 4])
    victim = tmp_path / shard_names(tmp_path)[1]
    raw = bytearray(victim.read_bytes())
    raw[4096 + 20] ^= 1
    victim.write_bytes(raw)
    with (
        pytest.raises(ValueError, match=victim.name + ": the shard is damaged"),
        rk.TableEditor(tmp_path) as editor,
    ):
        if change == "compact":
            editor.compact()
        elif change == "replace":
            editor.replace([5], torch.zeros(1, D))
        else:
            editor.tombstone([5])
    assert manifest.read(tmp_path).version == 2


def test_ids_that_lie_are_refused(tmp_path):
    start(tmp_path, torch.randn(4, D))
    with rk.TableEditor(tmp_path) as editor:
        editor.tombstone([1])
    (name,) = shard_names(tmp_path)
    raw = (tmp_path / name).read_bytes()
    ids = torch.tensor([0, -2, 3, 2]).numpy().tobytes()
    (tmp_path / name).write_bytes(raw[:-32] + ids)
    with pytest.raises(ValueError, match=name + r": ids must grow within \[0, 4\) and have 1 tombstones"):
        rk.ShardedTable.open(tmp_path)


def test_a_saved_copy_keeps_ids_and_tombstones(tmp_path):
    start(tmp_path / "a", torch.randn(9, D))
    with rk.TableEditor(tmp_path / "a", shard_rows=4) as editor:
        editor.tombstone([2, 8])
        editor.compact()
    with rk.TableEditor(tmp_path / "a", shard_rows=4) as editor:
        editor.tombstone([4])
    table = rk.ShardedTable.open(tmp_path / "a")
    table.save(tmp_path / "b", shard_rows=3)
    assert content(tmp_path / "b") == content(tmp_path / "a")
    part = table.part(2, 6)
    assert part.ids(torch.arange(4)).tolist() == [3, 4, 5, 6] and part.row_mask.tolist() == [1, 0, 1, 1]


def test_a_refresh_leaves_tombstones_buried_and_commits_the_ids(tmp_path):
    start(tmp_path, torch.zeros(6, D))
    with rk.TableEditor(tmp_path) as editor:
        editor.tombstone([4])
    table = rk.ShardedTable.open(tmp_path)
    encode = lambda snapshot: torch.full((6, D), snapshot).split(4)  # noqa: E731
    with rk.TableRefresher(table, encode, mode="async", every=1, path=tmp_path) as refresher:
        refresher.build(0, lambda: 7.0)
    assert table.shards[1][0].isnan().all() and table.hold is None
    assert content(tmp_path) == {i: [7.0] * D for i in (0, 1, 2, 3, 5)}
    assert manifest.read(tmp_path).version == table.version == 3


def test_shards_of_other_writers_can_be_edited(tmp_path):
    import safetensors.torch

    rows, name = torch.randn(5, D), "shard-000001-00000000-00000.safetensors"
    safetensors.torch.save_file({"rows": rows}, tmp_path / name)
    raw = (tmp_path / name).read_bytes()
    shard = manifest.Shard(name, 0, 5, len(raw), hashlib.sha256(raw).hexdigest(), 0, 5, 0)
    whole = manifest.assemble(1, D, torch.float32, [shard], 5)
    (tmp_path / "manifest.json").write_bytes(manifest.encode(whole))
    with rk.TableEditor(tmp_path) as editor:
        editor.tombstone([3])
    rows = rows.tolist()
    assert content(tmp_path) == {i: rows[i] for i in (0, 1, 2, 4)}
    opened = safetensors.torch.load_file(tmp_path / shard_names(tmp_path)[0])
    assert opened["ids"].tolist() == [0, 1, 2, -4, 4]
