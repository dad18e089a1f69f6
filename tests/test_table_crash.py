"""TableWriter: whole or not at all, whatever fails and whenever: the old table or the new one."""

import errno
import os
import resource
import shutil
import threading
from itertools import count

import pytest
import torch
from table_crash_cases import (
    ROWS,
    before_call,
    change,
    is_clean,
    is_exact,
    names,
    turn_and_compact,
    value_of,
    write,
)

import realm_kernels as rk


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["io-error", "disk-full"])
@pytest.mark.parametrize("existing", [True, False], ids=["replace", "create"])
def test_a_failing_call_is_one_clear_error_and_leaves_no_debris(tmp_path, existing, code):
    def fail(_name):
        raise OSError(code, os.strerror(code))

    seen = set()
    for number in count():
        path = tmp_path / f"t{number}"
        if existing:
            write(path, 1)
        error = None
        with before_call(number, fail) as calls:
            try:
                write(path, 2)
            except OSError as caught:
                error = caught
        if len(calls) <= number:
            break
        name = calls[number][0]
        if error is None:
            # What is not needed any more may stay, and what may be needed does: the next writer sweeps.
            assert name in ("unlink", "open") and value_of(path) == 2
        else:
            assert error.errno == code and f"({os.strerror(code)})" in str(error)
            assert str(tmp_path) in str(error) and "\n" not in str(error)
        if not path.exists():
            seen.add(None)
            assert not existing
            continue
        seen.add(value_of(path))
        # Where the rename may not be on disk yet, the old shards stay beside the new.
        assert is_clean(path) or value_of(path) == 2
        write(path, 3)
        assert value_of(path) == 3 and is_clean(path)
    assert number > 15 and seen == {1 if existing else None, 2}


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["io-error", "disk-full"])
@pytest.mark.parametrize("edit", [change, turn_and_compact], ids=lambda edit: edit.__name__)
def test_a_failing_call_of_an_editor_leaves_the_old_version_or_the_new(tmp_path, edit, code):
    write(tmp_path / "base", 1)
    edit(tmp_path / "base", 2)

    def fail(_name):
        raise OSError(code, os.strerror(code))

    seen = set()
    for number in count():
        path = shutil.copytree(tmp_path / "base", tmp_path / f"t{number}")
        error = None
        with before_call(number, fail) as calls:
            try:
                edit(path, 3)
            except OSError as caught:  # not kept: its frames may hold the version that was open
                error = caught.errno, str(caught)
        if len(calls) <= number:
            break
        if error is not None:
            assert error[0] == code and str(path) in error[1] and "\n" not in error[1]
        seen.add(value_of(path))
        assert error is not None or value_of(path) == 3
        # What the failure left behind, if anything, the next writer sweeps.
        edit(path, 4)
        assert value_of(path) == 4 and is_exact(path)
    assert number > 20 and seen == {2, 3}


def test_a_disk_that_takes_only_a_part_of_a_write_is_noticed(tmp_path):
    path = tmp_path / "t"
    write(path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel writes up to the limit, then says EFBIG.
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with (
            pytest.raises(OSError, match="cannot write this file") as caught,
            rk.TableWriter(path, dim=3, dtype=torch.float32) as writer,
        ):
            writer.append(torch.ones(1000, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and "shard-000002" in str(caught.value)
    assert value_of(path) == 1 and is_clean(path)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    original = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: original(descriptor, bytes(data[:7])))
    write(tmp_path / "t", 1)
    assert value_of(tmp_path / "t") == 1


def test_an_exception_in_the_block_leaves_the_old_table_and_no_debris(tmp_path):
    path = tmp_path / "t"
    write(path, 1)
    before = names(path)
    with (
        pytest.raises(KeyboardInterrupt),
        rk.TableWriter(path, dim=3, dtype=torch.float32, shard_rows=2) as writer,
    ):
        writer.append(torch.zeros(3, 3))
        raise KeyboardInterrupt
    assert names(path) == before and value_of(path) == 1


def test_an_exception_in_the_block_takes_new_folders_away(tmp_path):
    with (
        pytest.raises(RuntimeError, match="mine"),
        rk.TableWriter(tmp_path / "a" / "b" / "t", dim=3, dtype=torch.float32) as writer,
    ):
        writer.append(torch.zeros(3, 3))
        raise RuntimeError("mine")
    assert os.listdir(tmp_path) == []


def test_a_failed_append_is_never_committed_even_if_it_was_caught(tmp_path):
    path = tmp_path / "t"
    write(path, 1)

    def fail(_name):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        pytest.raises(RuntimeError, match=f"an append failed, so nothing is committed to {path}"),
        rk.TableWriter(path, dim=3, dtype=torch.float32) as writer,
        pytest.raises(OSError, match="No space left"),
        before_call(0, fail),
    ):
        writer.append(torch.zeros(3, 3))
    assert value_of(path) == 1 and is_clean(path)


def test_a_refused_append_harms_nothing(tmp_path):
    with rk.TableWriter(tmp_path / "t", dim=3, dtype=torch.float32) as writer:
        with pytest.raises(ValueError, match=r"TableWriter: rows must be \[n, dim\] = \[any, 3\], got"):
            writer.append(torch.zeros(3, 4))
        writer.append(torch.ones(ROWS, 3))
    assert value_of(tmp_path / "t") == 1


def test_an_interrupt_right_after_the_rename_does_not_undo_it(tmp_path, monkeypatch):
    path, original = tmp_path / "t", os.replace
    write(path, 1)

    def replace(*args):
        original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write(path, 2)
    assert value_of(path) == 2


def test_all_is_flushed_before_the_rename_and_the_rename_before_the_removal(tmp_path, monkeypatch):
    """What a power failure needs: it may undo, in any order, whatever was not flushed."""
    path = tmp_path / "t"
    write(path, 1)
    old = names(path)
    events = []

    def record(name):
        original = getattr(os, name)

        def call(first, *args, **kwargs):
            file = os.readlink(f"/dev/fd/{first}") if isinstance(first, int) else str(first)
            events.append((name, os.path.basename(file)))
            return original(first, *args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in ("write", "pwrite", "fsync", "replace", "unlink"):
        record(name)
    write(path, 2)

    rename = next(i for i, event in enumerate(events) if event[0] == "replace")
    directory = [i for i, event in enumerate(events) if event == ("fsync", "t")]
    written = {file for name, file in events if name in ("write", "pwrite")}
    assert len(written) == 3
    for file in written:
        last_write = max(i for i, (name, of) in enumerate(events) if "write" in name and of == file)
        flushed = events.index(("fsync", file))
        assert last_write < flushed < rename
        assert any(flushed < i < rename for i in directory), "the file is flushed, its name is not"
    removals = [i for i, event in enumerate(events) if event[0] == "unlink"]
    removed = {events[i][1] for i in removals}
    assert {name for name in removed if name.startswith("shard")} == set(old) - {"manifest.json"}
    assert any(rename < i < min(removals) for i in directory)


def test_one_writer_at_a_time(tmp_path):
    with rk.TableWriter(tmp_path / "t", dim=3, dtype=torch.float32) as writer:
        with pytest.raises(BlockingIOError, match="another writer is at work on it.*" + str(tmp_path)):
            write(tmp_path / "t", 2)
        writer.append(torch.ones(ROWS, 3))
    assert value_of(tmp_path / "t") == 1
    assert write(tmp_path / "t", 2) == 2


def test_readers_see_whole_tables_while_writers_commit(tmp_path):
    path = tmp_path / "t"
    write(path, 0)
    done = threading.Event()

    def commit():
        for value in range(1, 25):
            write(path, value)
        done.set()

    writer = threading.Thread(target=commit)
    writer.start()
    seen = []
    while not done.is_set():
        seen.append(value_of(path))
    writer.join()
    assert seen == sorted(seen) and value_of(path) == 24


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    for name in ("notes.txt", "model-00001-of-00002.safetensors", "manifest.json.bak", "shard-1.safetensors"):
        (tmp_path / name).write_text("mine")
    write(tmp_path, 1)
    write(tmp_path, 2)
    assert value_of(tmp_path) == 2 and (tmp_path / "manifest.json.bak").read_text() == "mine"
    assert len(names(tmp_path)) == 4 + 3


def test_a_damaged_table_is_not_replaced_unasked(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "manifest.json").write_text("{")
    before = names(tmp_path)
    with pytest.raises(ValueError, match="manifest.json: .*; remove the folder to write a new table there"):
        write(tmp_path, 2)
    assert names(tmp_path) == before


def test_a_folder_that_cannot_be_made_or_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "t"):
        with pytest.raises(OSError, match=rf"cannot create this folder \(File exists\): '{tmp_path}/file'"):
            write(path, 1)
    if os.geteuid() != 0:  # root may write everywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(PermissionError, match=f"{tmp_path}/locked"):
            write(tmp_path / "locked", 1)
