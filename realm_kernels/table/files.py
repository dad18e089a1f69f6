"""What a durable commit is made of: whole writes, flushed files, one lock, errors that name the path."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK_NAME = ".lock"


@contextmanager
def naming(path: Path, action: str) -> Iterator[None]:
    """Make an OSError say in one line what could not be done, why, and on which path."""
    try:
        yield
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror or str(error)
        raise type(error)(error.errno, f"cannot {action} ({reason})", str(error.filename or path)) from None


def open_to_read(path: Path, action: str) -> int:
    """A regular file, never through a symbolic link: a table reads nothing outside its directory."""
    with naming(path, action):
        # O_NONBLOCK: opening a pipe that was put in a file's place must not wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor


def create(path: Path) -> int:
    """A new file, open for writing. FileExistsError where there is one: nothing is overwritten in place."""
    with naming(path, "create this file"):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def write(descriptor: int, data: bytes | memoryview, path: Path) -> None:
    """All of `data`: one os.write may take only a part."""
    rest = memoryview(data)
    with naming(path, "write this file"):
        while len(rest) > 0:
            rest = rest[os.write(descriptor, rest) :]


def write_at(descriptor: int, data: bytes | memoryview, offset: int, path: Path) -> None:
    """All of `data`, from byte `offset` of the file on."""
    rest = memoryview(data)
    with naming(path, "write this file"):
        while len(rest) > 0:
            count = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[count:], offset + count


def flush(descriptor: int, path: Path) -> None:
    with naming(path, "flush this file to disk"):
        os.fsync(descriptor)


def flush_directory(path: Path) -> None:
    """Make creations, renames and removals in a directory survive a power failure."""
    with naming(path, "flush this directory to disk"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file that may be gone already. What cannot be removed is left for the next writer to sweep."""
    with suppress(OSError):
        os.unlink(path)


def make_directories(path: Path) -> list[Path]:
    """Create a directory and its missing parents, durably. Returns those it made, outermost first."""
    with naming(path, "create this folder"):
        missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    created: list[Path] = []
    try:
        for folder in reversed(missing):
            with naming(folder, "create this folder"):
                try:
                    folder.mkdir()
                except FileExistsError:
                    if not folder.is_dir():  # not another writer that was first, but a file
                        raise
                    continue
            created.append(folder)
            flush_directory(folder.parent)
    except BaseException:
        remove_directories(created)
        raise
    return created


def remove_directories(created: list[Path]) -> None:
    """Undo make_directories, as far as nobody put anything into them."""
    for folder in reversed(created):
        try:
            folder.rmdir()
        except OSError:
            return


def lock(directory: Path) -> int:
    """Hold the directory's writer lock until unlock(); the kernel gives it back if this process dies.

    Raises BlockingIOError where another writer holds it. Readers take no lock.
    """
    path = directory / LOCK_NAME
    while True:
        with naming(path, "create the writer's lock"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            with naming(path, "lock this table for writing"):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise BlockingIOError(error.errno, "another writer is at work on it") from None
            # A writer that gave up on a new directory removes its lock with it: then this one locks nothing.
            if is_same_file(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def unlock(descriptor: int) -> None:
    """Give the lock back, also where a forked child still holds a copy of the descriptor."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
