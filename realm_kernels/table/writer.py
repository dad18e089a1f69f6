"""rk.TableWriter: stream rows into a table directory; they appear all at once, or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ..validation import FLOAT_DTYPES, check_tensor, dtype_name
from . import files, manifest, shard_file
from .manifest import Manifest, Shard

OP = "TableWriter"
SHARD_ROWS = 1 << 20  # 512 MiB of float32 at D = 128: few files, each checked in about a second
_PIECE_BYTES = 16 << 20  # of a large append, converted and written at a time
_TEMPORARY = re.compile(r"manifest\.json\.[0-9a-f]{8}")


class TableWriter:
    """Write a table directory as a stream of rows, committed whole when the `with` block ends.

    path: directory of the table; created with its parents where it is missing. A table that is there already
        is replaced, as its next version.
    dim: D, columns of every row.
    dtype: torch.float32, bfloat16 or float16, of the rows on disk.
    shard_rows: rows per file. At most one piece of 16 MiB is held in memory, however many rows come.

    Until the block ends readers see the table as it was, after it the new one: the commit is one rename of
    manifest.json. If the block ends by an exception, or the process dies at any instant, the old table stays.
    One writer at a time: a second one raises BlockingIOError. `version` is the number the commit gets, one
    more than that of the table it replaces.

    Raises TypeError or ValueError for bad arguments or rows, ValueError where a damaged table is in the way,
    OSError naming the path where the disk is full or the folder cannot be written.

    >>> import tempfile, torch, realm_kernels as rk
    >>> with rk.TableWriter(tempfile.mkdtemp(), dim=128, dtype=torch.bfloat16) as writer:
    ...     for _ in range(3):
    ...         writer.append(torch.randn(1000, 128))
    """

    def __init__(
        self, path: str | os.PathLike[str], *, dim: int, dtype: torch.dtype, shard_rows: int = SHARD_ROWS
    ) -> None:
        for name, value in (("dim", dim), ("shard_rows", shard_rows)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{OP}: {name} must be an int, got {type(value).__name__} {value!r}")
            if value < 1:
                raise ValueError(f"{OP}: {name} must be at least 1, got {value}")
        if dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{OP}: dtype must be one of {', '.join(map(dtype_name, FLOAT_DTYPES))}, got {dtype!r}"
            )
        self.path = Path(path)
        self.dim, self.dtype, self.shard_rows = dim, dtype, shard_rows
        self.version = 0
        self.rows = 0
        self._token = ""  # marks this writer's files
        self._lock: int | None = None  # held inside the `with` block
        self._created: list[Path] = []
        self._old: Manifest | None = None
        self._new: Manifest | None = None
        self._shards: list[Shard] = []
        self._file: _OpenShard | None = None
        self._broken = False

    def __enter__(self) -> TableWriter:
        if self._token:
            raise RuntimeError(f"{OP}: a writer writes once: make a new one for {self.path}")
        self._created = files.make_directories(self.path)
        try:
            self._lock = files.lock(self.path)
            self._old = _table_at(self.path)
            self.version = (self._old.version if self._old else 0) + 1
            self._token = secrets.token_hex(4)
            # Nobody else writes while the lock is held: what no manifest names was left by a writer that
            # died.
            _sweep(self.path, self._old)
        except BaseException:
            self._release()
            raise
        return self

    def append(self, rows: Tensor) -> None:
        """Add rows [n, dim] of a float dtype, from any device; they are converted to the table's dtype."""
        if self._lock is None:
            raise RuntimeError(f"{OP}: append works inside the `with` block only")
        check_tensor(OP, "rows", rows, "[n, dim]", (None, self.dim), FLOAT_DTYPES)
        self._broken = True  # until all of the rows are written: a part of them must never be committed
        for piece in rows.detach().split(max(1, _PIECE_BYTES // (4 * self.dim))):
            self._write(piece.to("cpu", self.dtype).contiguous())
        self._broken = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        whole = False
        try:
            if kind is None:
                self._commit()
                whole = True
        finally:
            try:
                if not whole and not self._took_place():
                    self._discard()
            finally:
                self._release()

    def committed(self) -> Manifest:
        """The manifest that was committed. RuntimeError before that."""
        if self._new is None or self._lock is not None:
            raise RuntimeError(f"{OP}: nothing is committed to {self.path} by this writer yet")
        return self._new

    def _write(self, piece: Tensor) -> None:
        while piece.shape[0] > 0:
            if self._file is None:
                name = f"shard-{self.version:06d}-{self._token}-{len(self._shards):05d}.safetensors"
                self._file = _OpenShard(self.path / name, self.shard_rows, self.dim, self.dtype)
            taken = piece[: self.shard_rows - self._file.rows]
            self._file.append(taken)
            self.rows += taken.shape[0]
            piece = piece[taken.shape[0] :]
            if self._file.rows == self.shard_rows:
                self._finish_shard()

    def _finish_shard(self) -> None:
        assert self._file is not None
        file = self._file
        size, checksum = file.finish()
        self._shards.append(Shard(file.path.name, self.rows - file.rows, file.rows, size, checksum))
        self._file = None

    def _commit(self) -> None:
        """Shards durable, then their names, then the manifest, then the rename, which is the commit."""
        if self._broken:
            raise RuntimeError(f"{OP}: an append failed, so nothing is committed to {self.path}")
        if self._file is not None:
            self._finish_shard()
        self._new = Manifest(self.version, self.dim, self.dtype, self.rows, tuple(self._shards))
        temporary = self._temporary()
        descriptor = files.create(temporary)
        try:
            files.write(descriptor, manifest.encode(self._new), temporary)
            files.flush(descriptor, temporary)
        finally:
            os.close(descriptor)
        files.flush_directory(self.path)
        with files.naming(temporary, f"rename this file to {manifest.FILE_NAME}"):
            os.replace(temporary, self.path / manifest.FILE_NAME)
        # The old shards go only when the rename is known to be on disk: before that a power failure may undo
        # it.
        files.flush_directory(self.path)
        for shard in self._old.shards if self._old else ():
            files.remove(self.path / shard.file)

    def _took_place(self) -> bool:
        """Whether the commit happened, asked of the disk: an interrupt may come right after the rename."""
        if self._new is None:
            return False
        try:
            return manifest.read(self.path) == self._new
        except FileNotFoundError:
            return False
        except (OSError, ValueError):
            return True  # unknown: the files stay, and the next writer sweeps them if no manifest names them

    def _discard(self) -> None:
        if self._file is not None:
            self._file.close()
            files.remove(self._file.path)
        for shard in self._shards:
            files.remove(self.path / shard.file)
        files.remove(self._temporary())
        self._new = None

    def _release(self) -> None:
        """Give the lock back; directories made for a table that was not committed go with it."""
        abandoned = self._created if self._new is None else []
        if abandoned and self._lock is not None:
            files.remove(self.path / files.LOCK_NAME)
        files.remove_directories(abandoned)
        if self._lock is not None:
            files.unlock(self._lock)
            self._lock = None

    def _temporary(self) -> Path:
        return self.path / f"{manifest.FILE_NAME}.{self._token}"


class _OpenShard:
    """A shard being written. Its header and checksum are right from the start if it gets `capacity` rows."""

    def __init__(self, path: Path, capacity: int, dim: int, dtype: torch.dtype) -> None:
        self.path, self.capacity, self.dim, self.dtype = path, capacity, dim, dtype
        self.rows = 0
        self._digest = hashlib.sha256()
        self._descriptor = files.create(path)
        try:
            self._write(memoryview(shard_file.header(capacity, dim, dtype)))
        except BaseException:
            self.close()
            files.remove(path)
            raise

    def append(self, rows: Tensor) -> None:
        self._write(shard_file.raw_bytes(rows))
        self.rows += rows.shape[0]

    def finish(self) -> tuple[int, str]:
        """Correct the header, flush, close. Returns size and checksum."""
        checksum = self._digest.hexdigest()
        if self.rows < self.capacity:
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            files.write(self._descriptor, shard_file.header(self.rows, self.dim, self.dtype), self.path)
            checksum = shard_file.file_checksum(self._descriptor)
        files.flush(self._descriptor, self.path)
        self.close()
        return shard_file.DATA_OFFSET + self.rows * self.dim * self.dtype.itemsize, checksum

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, data: memoryview) -> None:
        files.write(self._descriptor, data, self.path)
        self._digest.update(data)


def _table_at(directory: Path) -> Manifest | None:
    """The table that is there, or None. A damaged one is an error: nothing replaces it unasked."""
    try:
        return manifest.read(directory)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}; remove the folder to write a new table there") from None


def _sweep(directory: Path, committed: Manifest | None) -> None:
    kept = {shard.file for shard in committed.shards} if committed else set()
    with files.naming(directory, "list this folder"):
        names = os.listdir(directory)
    for name in names:
        if (manifest.SHARD_NAME.fullmatch(name) and name not in kept) or _TEMPORARY.fullmatch(name):
            files.remove(directory / name)
