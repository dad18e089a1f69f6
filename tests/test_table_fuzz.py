"""Hostile manifests and shard headers: one clear error of ours, and nothing is opened elsewhere."""

import copy
import hashlib
import json
import os
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import realm_kernels as rk

quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
strings = st.sampled_from(["../x", "/etc/passwd", "rows", "ids", "F32", "I64", "", "shard-000001"])
scalars = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | strings | st.text(max_size=4)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "t"
    with rk.TableWriter(path, dim=3, dtype=torch.float32, shard_rows=3) as writer:
        writer.append(torch.randn(5, 3))
    with rk.TableEditor(path) as editor:
        editor.tombstone([1])
    (tmp_path / "secret").write_text("{}")
    return path


def seal(path, body):
    raw = json.dumps({**body, "checksum": "0" * 64}).encode()
    checksum = hashlib.sha256(raw).hexdigest().encode()
    (path / "manifest.json").write_bytes(raw[: -64 - 2] + checksum + b'"}')


def places(value, way=()):
    """Every way into a JSON value."""
    yield way
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*way, key))


def changed(body, data):
    """A copy of `body` in which one place is set, removed or added."""
    body = copy.deepcopy(body)
    way = data.draw(st.sampled_from([way for way in places(body) if way]))
    part = body
    for key in way[:-1]:
        part = part[key]
    action, value = data.draw(st.sampled_from(["set", "remove", "add"])), data.draw(values)
    if action == "remove":
        del part[way[-1]]
    elif action == "add" and isinstance(part, dict):
        part["extra"] = value
    else:
        part[way[-1]] = value
    return body


def open_hostile(path):
    """Open and verify; whatever comes out but an error of ours, or is opened elsewhere, fails."""
    opened, original = [], os.open

    def record(file, *args, **kwargs):
        opened.append(os.path.realpath(file))
        return original(file, *args, **kwargs)

    with mock.patch.object(os, "open", record):
        try:
            table = rk.ShardedTable.open(path, verify=True)
        except (ValueError, OSError) as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert table.num_rows == sum(shard.shape[0] for shard in table.shards)
            table.rows(torch.arange(table.num_rows))
        problems = rk.table.verify(path)
    assert all(str(path) in problem for problem in problems)
    assert opened and all(os.path.dirname(file) == str(path) for file in opened)


@quick
@given(data=st.data())
def test_a_fuzzed_manifest_is_refused_in_one_line_or_tells_the_truth(table, data):
    kept = (table / "manifest.json").read_bytes()
    body = json.loads(kept)
    for _ in range(data.draw(st.integers(1, 3))):
        body = changed(body, data)
    seal(table, body)
    try:
        open_hostile(table)
    finally:
        (table / "manifest.json").write_bytes(kept)


@quick
@given(data=st.data())
def test_a_fuzzed_shard_header_is_refused_in_one_line(table, data):
    path = sorted(table.glob("shard-*"))[0]
    kept = path.read_bytes()
    if data.draw(st.booleans()):
        head = json.dumps(changed(json.loads(kept[8:4096]), data)).encode()[:4088].ljust(4088)
        length = data.draw(st.sampled_from([4088, 0, 1, 2**63, 2**64 - 1, len(kept)]))
    else:
        head, length = data.draw(st.binary(max_size=200)), data.draw(st.integers(0, 2**64 - 1))
    raw = length.to_bytes(8, "little") + head
    path.write_bytes(raw + kept[len(raw) :])
    try:
        open_hostile(table)
    finally:
        path.write_bytes(kept)


@pytest.mark.parametrize("kind", ["manifest.json", "shard", ".lock", "retired"])
def test_a_link_planted_in_the_directory_leads_nowhere(table, kind):
    secret = table.parent / "secret"
    first_shard = sorted(table.glob("shard-*"))[0].name
    name = {"shard": first_shard, "retired": "manifest-000001-00000000.json"}.get(kind, kind)
    (table / name).unlink(missing_ok=True)
    (table / name).symlink_to(secret)
    if kind != "shard":
        with pytest.raises(OSError, match=r"it is a symbolic link\): '" + str(table / name)):
            rk.TableWriter(table, dim=3, dtype=torch.float32).__enter__()
    if kind in ("manifest.json", "shard"):
        (problem,) = rk.table.verify(table)
        assert "symbolic link" in problem and name in problem
    assert secret.read_text() == "{}"
