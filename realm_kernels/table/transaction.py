"""One change of a table directory: new files beside the old, one rename, then the old ones go."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from . import files, manifest
from .manifest import Manifest

_TEMPORARY = re.compile(r"manifest\.json\.[0-9a-f]{8}")
# What link() says where a filesystem has no hard links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Transaction:
    """The writer's lock of a table directory, and the files that one commit adds.

    path: directory of the table. begin() takes the lock, end() gives it back and, where no commit() came
    before it, removes every file that new_shard() named. old: the table that is there, None where there is
    none. version: the number the commit gets.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.version = 0
        self.old: Manifest | None = None
        self.new: Manifest | None = None
        self.begun = False
        self._token = ""  # marks this writer's files
        self._lock: int | None = None
        self._created: list[Path] = []
        self._shards: list[Path] = []

    @property
    def is_open(self) -> bool:
        return self._lock is not None

    def begin(self, *, create: bool) -> None:
        """Take the lock. `create` makes the directory; without it there must be a table."""
        if create:
            self._created = files.make_directories(self.path)
        else:
            manifest.read(self.path)
        self.begun = True
        try:
            self._lock = files.lock(self.path)
            self.old = _table_at(self.path) if create else manifest.read(self.path)
            self.version = (self.old.version if self.old else 0) + 1
            self._token = secrets.token_hex(4)
            # Nobody else writes while the lock is held: what no manifest names was left by a writer that
            # died, or by a reader that is done.
            sweep(self.path, self.old)
        except BaseException:
            self._release()
            raise

    def new_shard(self) -> Path:
        """A name for a shard that no table ever had."""
        path = self.path / f"shard-{self.version:06d}-{self._token}-{len(self._shards):05d}.safetensors"
        self._shards.append(path)
        return path

    def commit(self, new: Manifest) -> None:
        """The shards are durable. Now their names, then the manifest, then the rename: the commit."""
        self.new = new
        temporary = self._temporary()
        descriptor = files.create(temporary)
        try:
            files.write(descriptor, manifest.encode(new), temporary)
            files.flush(descriptor, temporary)
        finally:
            os.close(descriptor)
        files.flush_directory(self.path)
        self._retire()
        with files.naming(temporary, f"rename this file to {manifest.FILE_NAME}"):
            os.replace(temporary, self.path / manifest.FILE_NAME)
        # The old shards go only when the rename is known to be on disk: before that a power failure may undo
        # it.
        files.flush_directory(self.path)
        with suppress(OSError):  # what stays is the next writer's to sweep
            sweep(self.path, new)

    def end(self, whole: bool) -> None:
        try:
            if not whole and not self._took_place():
                for path in (*self._shards, self._temporary(), self._retired()):
                    files.remove(path)
                self.new = None
        finally:
            self._release()

    def _retire(self) -> None:
        """Give the old manifest a second name, under which its readers hold its files after the rename."""
        if self.old is None:
            return
        retired = self._retired()
        with files.naming(retired, f"link {manifest.FILE_NAME} to this file"):
            try:
                os.link(self.path / manifest.FILE_NAME, retired)
            except OSError as error:
                # Then readers keep what they mapped all the same, but no name.
                if error.errno not in _NO_LINKS:
                    raise

    def _took_place(self) -> bool:
        """Whether the commit happened, asked of the disk: an interrupt may come right after the rename."""
        if self.new is None:
            return False
        try:
            return manifest.read(self.path) == self.new
        except FileNotFoundError:
            return False
        except (OSError, ValueError):
            return True  # unknown: the files stay, and the next writer sweeps them if no manifest names them

    def _release(self) -> None:
        """Give the lock back; directories made for a table that was not committed go with it."""
        abandoned = self._created if self.new is None else []
        if abandoned and self._lock is not None:
            files.remove(self.path / files.LOCK_NAME)
        files.remove_directories(abandoned)
        if self._lock is not None:
            files.unlock(self._lock)
            self._lock = None

    def _temporary(self) -> Path:
        return self.path / f"{manifest.FILE_NAME}.{self._token}"

    def _retired(self) -> Path:
        version = self.old.version if self.old else 0
        return self.path / f"manifest-{version:06d}-{self._token}.json"


def sweep(directory: Path, committed: Manifest | None) -> None:
    """Remove what neither the committed table nor a reader needs. For the holder of the lock only."""
    kept = {shard.file for shard in committed.shards} if committed else set()
    with files.naming(directory, "list this folder"):
        names = os.listdir(directory)
    for name in names:
        if manifest.RETIRED_NAME.fullmatch(name):
            kept |= _still_read(directory / name)
    for name in names:
        if (manifest.SHARD_NAME.fullmatch(name) and name not in kept) or _TEMPORARY.fullmatch(name):
            files.remove(directory / name)


def _still_read(retired: Path) -> set[str]:
    """The shards of a replaced version that a reader holds; the manifest of one that nobody holds goes."""
    # For writing, though nothing is written: some systems lock only such files exclusively.
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    with files.naming(retired, "look whether readers hold this replaced version"):
        descriptor = os.open(retired, flags)
        try:
            # A second name of the current manifest was left by a writer that died before its rename.
            if not files.is_same_file(descriptor, retired.parent / manifest.FILE_NAME):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Under the lock: a reader that comes now finds the name gone and takes the newer version.
            files.remove(retired)
            return set()
        except BlockingIOError:
            with suppress(ValueError):  # damaged since: what its reader has mapped outlives the files
                return {shard.file for shard in manifest.read_from(descriptor, retired).shards}
            return set()
        finally:
            os.close(descriptor)


def _table_at(directory: Path) -> Manifest | None:
    """The table that is there, or None. A damaged one is an error: nothing replaces it unasked."""
    try:
        return manifest.read(directory)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}; remove the folder to write a new table there") from None
