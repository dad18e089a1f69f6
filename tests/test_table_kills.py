"""A writer killed at any call, and at random instants: a reader opens a whole table, the old or the new."""

import os
import random
import shutil
import signal
import time
from itertools import count

import pytest
from table_crash_cases import (
    before_call,
    change,
    die,
    in_child,
    is_clean,
    is_exact,
    turn_and_compact,
    value_of,
    write,
)

INSTANTS = 200  # of a writer, an editor that replaces, and one that appends, takes out and compacts


@pytest.mark.parametrize("existing", [True, False], ids=["replace", "create"])
def test_killed_before_any_call_leaves_the_old_table_or_the_new(tmp_path, existing):
    seen = set()
    for number in count():
        path = tmp_path / f"t{number}"
        if existing:
            write(path, 1)

        def work(path=path, number=number):
            with before_call(number, die):
                write(path, 2)

        status = in_child(work)
        try:
            seen.add(value_of(path))
        except FileNotFoundError:
            assert not existing
            seen.add(None)
        # What the dead left behind neither blocks the next writer nor stays.
        write(path, 3)
        assert value_of(path) == 3 and is_clean(path)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    assert number > 15 and seen == {1 if existing else None, 2}


@pytest.mark.parametrize("edit", [change, turn_and_compact], ids=lambda edit: edit.__name__)
def test_an_editor_killed_before_any_call_leaves_the_old_version_or_the_new(tmp_path, edit):
    write(tmp_path / "base", 1)
    edit(tmp_path / "base", 2)
    seen = set()
    for number in count():
        path = shutil.copytree(tmp_path / "base", tmp_path / f"t{number}")

        def work(path=path, number=number):
            with before_call(number, die):
                edit(path, 3)

        status = in_child(work)
        seen.add(value_of(path))
        edit(path, 4)
        assert value_of(path) == 4 and is_exact(path)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    assert number > 20 and seen == {2, 3}


@pytest.mark.parametrize("kind", [write, change, turn_and_compact], ids=lambda kind: kind.__name__)
def test_killed_at_random_instants_leaves_a_whole_table(tmp_path, kind):
    path, rng = tmp_path / "t", random.Random(kind.__name__)
    write(path, 0)
    start = time.monotonic()
    kind(path, 0)
    took = time.monotonic() - start

    seen, (began, begins) = [0.0], os.pipe()
    for _ in range(INSTANTS // 3 + 1):
        pid = os.fork()
        if pid == 0:
            try:
                os.write(begins, b"b")
                for value in count(int(seen[-1]) + 1):
                    kind(path, value)
            finally:
                os._exit(1)
        os.read(began, 1)
        time.sleep(rng.uniform(0, 4 * took))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        seen.append(value_of(path))
    assert seen == sorted(seen) and seen[-1] > 0
    kind(path, seen[-1] + 1)
    assert value_of(path) == seen[-1] + 1 and is_exact(path)
