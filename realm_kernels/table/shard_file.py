"""One shard on disk: a safetensors file with the tensor "rows" [n, D], and "ids" [n] where rows were removed.

The format is 8 bytes (little-endian length of the header), the header in JSON, the raw rows. Ours pads the
header with spaces to 4096 bytes, so that the rows begin on a page: aligned for any kernel that reads them
from a mapping.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from . import files
from .manifest import Shard

TENSOR_NAME = "rows"
IDS_NAME = "ids"  # int64, increasing; a tombstone's id i stands as -1 - i
DATA_OFFSET = 4096
_MAX_HEADER = 100_000_000  # the limit of the safetensors format itself
_READ_BYTES = 8 << 20

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def header(rows: int, dim: int, dtype: torch.dtype, holds_ids: bool = False) -> bytes:
    """The first DATA_OFFSET bytes of a shard of these sizes."""
    entries = _entries(rows, dim, dtype, holds_ids)
    text = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    return (DATA_OFFSET - 8).to_bytes(8, "little") + text.ljust(DATA_OFFSET - 8)


def data_bytes(rows: int, dim: int, dtype: torch.dtype, holds_ids: bool = False) -> int:
    """Of the rows and the ids behind them."""
    return rows * (dim * dtype.itemsize + (8 if holds_ids else 0))


def _entries(rows: int, dim: int, dtype: torch.dtype, holds_ids: bool) -> dict[str, object]:
    """What the header says of each tensor. The ids come last, so that the rows begin on a page."""
    end = data_bytes(rows, dim, dtype)
    entries: dict[str, object] = {
        TENSOR_NAME: {"dtype": SAFETENSORS_DTYPES[dtype], "shape": [rows, dim], "data_offsets": [0, end]}
    }
    if holds_ids:
        entries[IDS_NAME] = {"dtype": "I64", "shape": [rows], "data_offsets": [end, end + 8 * rows]}
    return entries


def file_checksum(descriptor: int, seen: Callable[[int], object] = lambda count: None) -> str:
    """SHA-256 of a whole open file, as sha256sum prints it; `seen` is told of the bytes read."""
    digest = hashlib.sha256()
    offset = 0
    while block := os.pread(descriptor, _READ_BYTES, offset):
        digest.update(block)
        offset += len(block)
        seen(len(block))
    return digest.hexdigest()


def sealed(shard: Shard, dim: int, dtype: torch.dtype, checksum: str) -> Shard:
    """The entry of a shard that is written: with its size and checksum."""
    size = DATA_OFFSET + data_bytes(shard.rows, dim, dtype, shard.holds_ids)
    return replace(shard, size=size, checksum=checksum)


@contextmanager
def opened(directory: Path, shard: Shard, dim: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """(descriptor, byte at which the rows begin) of a shard whose size and header are as they must be.

    Raises FileNotFoundError where the file is missing, ValueError naming the file where it is damaged.
    """
    path = directory / shard.file
    try:
        descriptor = files.open_to_read(path, "open this shard")
    except FileNotFoundError:
        rule = "the manifest names this shard, but the file is missing"
        raise FileNotFoundError(errno.ENOENT, rule, str(path)) from None
    try:
        _check_size(path, os.fstat(descriptor).st_size, shard.size)
        yield descriptor, _data_start(path, descriptor, shard, dim, dtype)
    finally:
        os.close(descriptor)


def check_content(
    descriptor: int, path: Path, shard: Shard, seen: Callable[[int], object] = lambda count: None
) -> None:
    """Raise ValueError where the content is not what was committed."""
    if file_checksum(descriptor, seen) != shard.checksum:
        raise ValueError(f"{path}: the shard is damaged: its SHA-256 is not the manifest's")


def read(directory: Path, shard: Shard, dim: int, dtype: torch.dtype, *, mmap: bool, verify: bool) -> Tensor:
    """The rows of one shard, [shard.rows, dim]: mapped copy-on-write, or read into memory.

    A mapping is private: what a program writes into the tensor stays in its own memory and never reaches the
    file.
    """
    path = directory / shard.file
    with opened(directory, shard, dim, dtype) as (descriptor, start):
        if verify:
            check_content(descriptor, path, shard)
        return _load(path, descriptor, start, shard.rows, dim, dtype, mmap)


def read_ids(directory: Path, shard: Shard, dim: int, dtype: torch.dtype) -> Tensor:
    """The ids of a shard that holds them, int64 [shard.rows]; -1 - id for a tombstone."""
    path = directory / shard.file
    with opened(directory, shard, dim, dtype) as (descriptor, start):
        ids = _load(
            path, descriptor, start + data_bytes(shard.rows, dim, dtype), shard.rows, 1, torch.int64, False
        ).flatten()
    whole = torch.where(ids < 0, -1 - ids, ids)
    fits = (
        shard.rows > 0
        and bool((whole[1:] > whole[:-1]).all())
        and int(whole[0]) >= shard.first_id
        and int(whole[-1]) < shard.after_id
        and int((ids < 0).sum()) == shard.tombstones
    )
    if not fits:
        raise ValueError(
            f"{path}: ids must grow within [{shard.first_id}, {shard.after_id}) and have "
            f"{shard.tombstones} tombstones, as the manifest says"
        )
    return ids


def raw_bytes(rows: Tensor) -> memoryview:
    """The memory of a contiguous tensor, writable, without a copy."""
    return memoryview(rows.view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]


def _load(
    path: Path, descriptor: int, start: int, rows: int, dim: int, dtype: torch.dtype, mmap: bool
) -> Tensor:
    if rows == 0:
        return torch.empty(0, dim, dtype=dtype)
    if mmap:
        end = start + data_bytes(rows, dim, dtype)
        return _map(path, descriptor)[start:end].view(dtype).view(rows, dim)
    tensor = torch.empty(rows, dim, dtype=dtype)
    target = raw_bytes(tensor)
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done : done + _READ_BYTES]], start + done)
        if count == 0:
            raise ValueError(f"{path}: the shard ended after {start + done} bytes while it was read")
        done += count
    return tensor


def _map(path: Path, descriptor: int) -> Tensor:
    """All bytes of an open file, uint8, in a private mapping that outlives the descriptor."""
    # Through the descriptor, so that what was checked is what is mapped. Python's own mmap would keep a
    # descriptor open for each shard, and a table may have more shards than a process may have open files.
    size = os.fstat(descriptor).st_size
    try:
        return torch.from_file(f"/dev/fd/{descriptor}", shared=False, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise OSError(errno.ENOMEM, f"cannot map this shard ({reason})", str(path)) from None


def _check_size(path: Path, actual: int, expected: int) -> None:
    if actual != expected:
        word = "truncated" if actual < expected else "damaged"
        raise ValueError(f"{path}: the shard is {word}: it must have {expected} bytes, got {actual}")


def _data_start(path: Path, descriptor: int, shard: Shard, dim: int, dtype: torch.dtype) -> int:
    """Where the rows begin, after checking that the header says what the manifest says."""

    def require(holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{path}: {rule}")

    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    require(
        2 <= length <= min(_MAX_HEADER, shard.size - 8),
        f"the safetensors header must fit into the file of {shard.size} bytes, got a length of {length}",
    )
    try:
        names = json.loads(os.pread(descriptor, length, 8))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the safetensors header must be JSON: {error}") from None
    entries = _entries(shard.rows, dim, dtype, shard.holds_ids)
    require(
        isinstance(names, dict) and set(names) - {"__metadata__"} == set(entries),
        f"a shard must hold one tensor, named {TENSOR_NAME!r}"
        + (f", and the {IDS_NAME!r} of its rows" if shard.holds_ids else ""),
    )
    for name, expected in entries.items():
        require(names[name] == expected, f"{name} must be {expected}, as the manifest says")
    content = data_bytes(shard.rows, dim, dtype, shard.holds_ids)
    start = 8 + length
    require(
        start + content == shard.size,
        f"header and rows must fill the file of {shard.size} bytes, got {start} + {content}",
    )
    require(
        start % dtype.itemsize == 0, f"the rows must be aligned to {dtype.itemsize} bytes, got offset {start}"
    )
    return start
