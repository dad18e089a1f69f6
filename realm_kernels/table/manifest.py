"""manifest.json: which shard files make up a table, and how it refuses what is damaged or hostile."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..validation import dtype_name
from . import files

FORMAT = 1
FILE_NAME = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Every name a writer gives a shard: version, token of the writer, number. Nothing else is opened or removed,
# so a manifest cannot point outside its directory.
SHARD_NAME = re.compile(r"shard-\d{6,}-[0-9a-f]{8}-\d{5,}\.safetensors")

_CHECKSUM = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 64 << 20  # a manifest of 250,000 shards; a larger file is not one of ours
_MAX_COUNT = 2**62  # products with it are Python's own, but row ids must stay in int64


@dataclass(frozen=True)
class Shard:
    """One file of a table: rows [first_row, first_row + rows), `size` bytes with the SHA-256 `checksum`."""

    file: str
    first_row: int
    rows: int
    size: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    version: int
    dim: int
    dtype: torch.dtype
    rows: int
    shards: tuple[Shard, ...]

    @property
    def checksums(self) -> list[str]:
        """What the table holds, by content: equal where, and only where, the same shards were written."""
        return [shard.checksum for shard in self.shards]


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json. Its own checksum is taken with 64 zeros in the checksum's place."""
    body = {
        "format": FORMAT,
        "version": manifest.version,
        "dim": manifest.dim,
        "dtype": dtype_name(manifest.dtype),
        "rows": manifest.rows,
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
    path = directory / FILE_NAME
    try:
        descriptor = files.open_to_read(path, "read this manifest")
    except FileNotFoundError:
        raise FileNotFoundError(
            errno.ENOENT, f"this is not a table: it has no {FILE_NAME}", str(directory)
        ) from None
    except NotADirectoryError:
        raise NotADirectoryError(errno.ENOTDIR, "a table must be a directory", str(directory)) from None
    with open(descriptor, "rb") as file, files.naming(path, "read this manifest"):
        if os.fstat(descriptor).st_size > _MAX_BYTES:
            raise ValueError(f"{path}: a manifest must be at most {_MAX_BYTES} bytes, this one is larger")
        raw = file.read()
    return decode(raw, path)


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
    for name in ("version", "dim", "rows"):
        _require(_is_count(body.get(name)), f"{name} must be a whole number, got {_short(body.get(name))}")
    _require(body["dim"] >= 1, "dim must be at least 1, got 0")
    dtype, entries = body.get("dtype"), body.get("shards")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Refused(f"dtype must be one of {', '.join(DTYPES)}, got {_short(dtype)}")
    if not isinstance(entries, list):
        raise _Refused(f"shards must be a list, got {_short(entries)}")

    shards: list[Shard] = []
    rows = 0
    for number, entry in enumerate(entries):
        shards.append(_shard(number, entry, first_row=rows))
        rows += shards[-1].rows
    _require(len({shard.file for shard in shards}) == len(shards), "no two shards may be the same file")
    _require(rows == body["rows"], f"rows must be the sum over its shards, {rows}, got {body['rows']}")
    return Manifest(body["version"], body["dim"], DTYPES[dtype], rows, tuple(shards))


def _shard(number: int, entry: object, first_row: int) -> Shard:
    names = Shard.__dataclass_fields__
    if not isinstance(entry, dict) or set(entry) != set(names):
        raise _Refused(f"shard {number} must have the fields {', '.join(names)}, got {_short(entry)}")
    shard = Shard(**entry)
    if not isinstance(shard.file, str) or not SHARD_NAME.fullmatch(shard.file):
        rule = "must be named shard-VERSION-TOKEN-NUMBER.safetensors"
        raise _Refused(f"the file of shard {number} {rule}, got {_short(shard.file)}")
    for name in ("first_row", "rows", "size"):
        value = entry[name]
        _require(_is_count(value), f"{name} of shard {number} must be a whole number, got {_short(value)}")
    _require(
        shard.first_row == first_row,
        f"shard {number} must begin at row {first_row}, where the one before it ends, got {shard.first_row}",
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
