"""manifest.json: which shard files make up a table, and how it refuses what is damaged or hostile."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..validation import dtype_name
from . import files

FORMAT = 2
FILE_NAME = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Every name a writer gives a shard: version, token of the writer, number. Nothing else is opened or removed,
# so a manifest cannot point outside its directory.
SHARD_NAME = re.compile(r"shard-\d{6,}-[0-9a-f]{8}-\d{5,}\.safetensors")
RETIRED_NAME = re.compile(r"manifest-\d{6,}-[0-9a-f]{8}\.json")

_CHECKSUM = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 64 << 20  # a manifest of 250,000 shards; a larger file is not one of ours
_MAX_COUNT = 2**62  # products with it are Python's own, but row ids must stay in int64


@dataclass(frozen=True)
class Shard:
    """One file of a table: rows [first_row, first_row + rows), `size` bytes with the SHA-256 `checksum`.

    The ids of its rows grow within [first_id, after_id). Where none is left out and no row is a tombstone
    they are said by that alone; otherwise the file holds them beside the rows.
    """

    file: str
    first_row: int
    rows: int
    size: int
    checksum: str
    first_id: int
    after_id: int
    tombstones: int  # rows that were taken out, and are NaN

    @property
    def holds_ids(self) -> bool:
        return self.tombstones > 0 or self.after_id - self.first_id != self.rows


@dataclass(frozen=True)
class Manifest:
    version: int
    dim: int
    dtype: torch.dtype
    rows: int  # tombstones included
    next_id: int  # of the next row that is appended: an id is given once, and never again
    shards: tuple[Shard, ...]

    @property
    def tombstones(self) -> int:
        return sum(shard.tombstones for shard in self.shards)

    @property
    def checksums(self) -> list[str]:
        """What the table holds, by content: equal where, and only where, the same shards were written."""
        return [shard.checksum for shard in self.shards]


def assemble(version: int, dim: int, dtype: torch.dtype, shards: Sequence[Shard], next_id: int) -> Manifest:
    """The manifest of these shards in this order, whatever their first_row says."""
    placed: list[Shard] = []
    rows = 0
    for shard in shards:
        placed.append(replace(shard, first_row=rows))
        rows += shard.rows
    return Manifest(version, dim, dtype, rows, next_id, tuple(placed))


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json. Its own checksum is taken with 64 zeros in the checksum's place."""
    body = {
        "format": FORMAT,
        "version": manifest.version,
        "dim": manifest.dim,
        "dtype": dtype_name(manifest.dtype),
        "rows": manifest.rows,
        "next_id": manifest.next_id,
        "shards": [vars(shard) for shard in manifest.shards],
        "checksum": "0" * 64,
    }
    raw = (json.dumps(body, indent=1) + "\n").encode()
    return b"".join(_sealed(raw, hashlib.sha256(raw).hexdigest().encode()))


def decode(raw: bytes, path: Path) -> Manifest:
    """The manifest in `raw`, every field of it checked. Raises ValueError naming `path` and the rule."""
    try:
        return _decode(raw)
    except _Refused as refused:
        raise ValueError(f"{path}: {refused}") from None


def read(directory: Path) -> Manifest:
    """The committed manifest. FileNotFoundError where there is none, ValueError where it is damaged."""
    descriptor = _open(directory)
    try:
        return read_from(descriptor, directory / FILE_NAME)
    finally:
        os.close(descriptor)


def read_and_hold(directory: Path) -> tuple[Manifest, Hold]:
    """The committed manifest, and what keeps writers from removing the files it names."""
    while True:
        hold = Hold(_open(directory))
        hold.lock()
        # A writer may have taken this very version away between the opening and the lock.
        if not files.is_same_file(hold.descriptor, directory / FILE_NAME) and hold.is_removed():
            continue
        return read_from(hold.descriptor, directory / FILE_NAME), hold


def read_from(descriptor: int, path: Path) -> Manifest:
    """The manifest in an open file."""
    size = os.fstat(descriptor).st_size
    if size > _MAX_BYTES:
        raise ValueError(f"{path}: a manifest must be at most {_MAX_BYTES} bytes, this one is larger")
    with files.naming(path, "read this manifest"):
        return decode(os.pread(descriptor, size, 0), path)


class Hold:
    """Keeps a version's files in their places as long as it lives: a shared lock on its manifest."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def lock(self) -> None:
        # Where the system has no locks there the mapping still outlives the removal of its file.
        with suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_SH)

    def is_removed(self) -> bool:
        return os.fstat(self.descriptor).st_nlink == 0

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the end of a program os is gone
        close(self.descriptor)

    def __reduce__(self) -> str | tuple[type, tuple[()]]:
        # A copy in another process has its rows in memory; the descriptor means nothing there.
        return object, ()


def _open(directory: Path) -> int:
    path = directory / FILE_NAME
    try:
        return files.open_to_read(path, "read this manifest")
    except FileNotFoundError:
        raise FileNotFoundError(
            errno.ENOENT, f"this is not a table: it has no {FILE_NAME}", str(directory)
        ) from None
    except NotADirectoryError:
        raise NotADirectoryError(errno.ENOTDIR, "a table must be a directory", str(directory)) from None


class _Refused(Exception):
    """The rule that a manifest breaks."""


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise _Refused(rule)


def _decode(raw: bytes) -> Manifest:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _Refused(f"a manifest must be JSON: {error}") from None
    if not isinstance(body, dict):
        raise _Refused(f"a manifest must be a JSON object, got {type(body).__name__}")
    # First the format: a later one may hold anything.
    found = body.get("format")
    _require(found == FORMAT, f"format must be {FORMAT}, the one this version reads, got {_short(found)}")
    _require_seal(raw, body.get("checksum"))
    for name in ("version", "dim", "rows", "next_id"):
        _require(_is_count(body.get(name)), f"{name} must be a whole number, got {_short(body.get(name))}")
    _require(body["dim"] >= 1, "dim must be at least 1, got 0")
    dtype, entries = body.get("dtype"), body.get("shards")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Refused(f"dtype must be one of {', '.join(DTYPES)}, got {_short(dtype)}")
    if not isinstance(entries, list):
        raise _Refused(f"shards must be a list, got {_short(entries)}")

    shards: list[Shard] = []
    rows = next_id = 0
    for number, entry in enumerate(entries):
        shards.append(_shard(number, entry, first_row=rows, least_id=next_id))
        rows += shards[-1].rows
        next_id = shards[-1].after_id
    _require(len({shard.file for shard in shards}) == len(shards), "no two shards may be the same file")
    _require(rows == body["rows"], f"rows must be the sum over its shards, {rows}, got {body['rows']}")
    _require(
        next_id <= body["next_id"],
        f"next_id must be at least {next_id}, where its last shard ends, got {body['next_id']}",
    )
    return Manifest(body["version"], body["dim"], DTYPES[dtype], rows, body["next_id"], tuple(shards))


def _shard(number: int, entry: object, first_row: int, least_id: int) -> Shard:
    names = Shard.__dataclass_fields__
    if not isinstance(entry, dict) or set(entry) != set(names):
        raise _Refused(f"shard {number} must have the fields {', '.join(names)}, got {_short(entry)}")
    shard = Shard(**entry)
    if not isinstance(shard.file, str) or not SHARD_NAME.fullmatch(shard.file):
        rule = "must be named shard-VERSION-TOKEN-NUMBER.safetensors"
        raise _Refused(f"the file of shard {number} {rule}, got {_short(shard.file)}")
    for name in ("first_row", "rows", "size", "first_id", "after_id", "tombstones"):
        value = entry[name]
        _require(_is_count(value), f"{name} of shard {number} must be a whole number, got {_short(value)}")
    _require(
        shard.first_row == first_row,
        f"shard {number} must begin at row {first_row}, where the one before it ends, got {shard.first_row}",
    )
    _require(
        least_id <= shard.first_id
        and shard.first_id + shard.rows <= shard.after_id
        and (shard.rows > 0 or shard.first_id == shard.after_id),
        f"shard {number} must hold {shard.rows} ids from {least_id} on, "
        f"got first_id {shard.first_id} and after_id {shard.after_id}",
    )
    _require(
        shard.tombstones <= shard.rows,
        f"shard {number} must have at most {shard.rows} tombstones, its rows, got {shard.tombstones}",
    )
    _require(_is_checksum(shard.checksum), f"checksum of shard {number} must be 64 hexadecimal digits")
    return shard


def _require_seal(raw: bytes, checksum: object) -> None:
    _require(_is_checksum(checksum), f"checksum must be 64 hexadecimal digits, got {_short(checksum)}")
    actual = hashlib.sha256(b"".join(_sealed(raw, b"0" * 64))).hexdigest()
    _require(actual == checksum, "the manifest is damaged: its own checksum does not match")


def _sealed(raw: bytes, checksum: bytes) -> tuple[bytes, bytes, bytes]:
    """`raw` with the value of its last "checksum" field, the manifest's own, replaced."""
    head, key, tail = raw.rpartition(b'"checksum": "')
    return head + key, checksum, tail[64:]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_COUNT


def _is_checksum(value: object) -> bool:
    return isinstance(value, str) and _CHECKSUM.fullmatch(value) is not None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
