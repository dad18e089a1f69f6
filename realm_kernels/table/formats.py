"""Embeddings in the files of others, read and written as a stream of rows: .npy, .npz, safetensors, faiss.

Nothing is ever unpickled: of a .bin torch's own loader takes tensors and nothing else (weights_only), and
other pickles are refused with what to do instead. At most one piece of rows is in memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..validation import FLOAT_DTYPES, dtype_name
from . import files, manifest, shard_file
from .sharded import ShardedTable
from .writer import TableWriter

BLOCK_EMB = "block_emb"  # the index of a published REALM checkpoint
PIECE_BYTES = 16 << 20
SUFFIXES = (".npy", ".npz", ".safetensors", ".faiss", ".index", ".bin")
EXPORTS = (".npy", ".safetensors", ".faiss")
_PICKLES = (".pkl", ".pickle", ".pt", ".pth")
_NUMPY = {"<f2": torch.float16, "<f4": torch.float32}
_FAISS_FLAT = {b"IxFI": "inner product", b"IxF2": "L2", b"IxFl": "any metric"}
_FAISS_HEAD = struct.Struct("<4siqqqBi")  # fourcc, d, ntotal, two unused, is_trained, metric
_FAISS_INNER_PRODUCT = 0


@dataclass(frozen=True)
class Source:
    """Rows [rows, dim] of `dtype` in a file of another format; pieces() streams them in order."""

    path: Path
    rows: int
    dim: int
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]


def open_source(path: str | os.PathLike[str], key: str | None = None) -> Source:
    """The rows in a .npy, .npz, .safetensors, .faiss, .bin file, a table or a checkpoint's directory.

    key: the array to take where a file holds several; unsaid, the only one of two axes, or `block_emb`.
    Raises ValueError naming the file for what is damaged, of another kind or a pickle, OSError for what
    cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path, key)
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{path}: a pickle can run any program when it is read, so it never is; where you trust it, "
            "read it yourself and write its vectors as an array first: of DPR's pairs (id, vector), by "
            "numpy.save('embeddings.npy', numpy.stack([vector for _, vector in pairs]))"
        )
    openers = {
        ".npy": _open_npy, ".npz": _open_npz, ".safetensors": _open_safetensors, ".bin": _open_bin,
        ".faiss": _open_faiss, ".index": _open_faiss,
    }  # fmt: skip
    if path.suffix not in openers:
        raise ValueError(f"{path}: the name must end in one of {', '.join(SUFFIXES)}, or be a folder")
    return openers[path.suffix](path, key)


def import_sources(
    sources: Sequence[Source], path: str | os.PathLike[str], dtype: torch.dtype | None, shard_rows: int
) -> Iterator[int]:
    """Commit the rows of all sources, one after another, as the table at `path`; yields rows of each piece.

    A table that is there is replaced, as TableWriter does. dtype: None is that of the first source. Raises
    ValueError for sources that differ in width.
    """
    first = sources[0]
    for source in sources:
        if source.dim != first.dim:
            raise ValueError(
                f"{source.path}: all sources must have one width, {first.dim} in {first.path}, "
                f"got {source.dim}"
            )
    with TableWriter(path, dim=first.dim, dtype=dtype or first.dtype, shard_rows=shard_rows) as writer:
        for source in sources:
            for piece in source.pieces():
                writer.append(piece)
                yield piece.shape[0]


def export(
    table: ShardedTable, path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> Iterator[int]:
    """Write the live rows of a table to a new .npy, .safetensors or .faiss file; yields rows written so far.

    The file appears under its name when it is whole. .faiss is float32, a flat index of inner products; .npy
    knows no bfloat16. A .safetensors holds "rows", and "ids" where they are not 0, 1, 2, ... Raises
    FileExistsError where there is a file: nothing is overwritten.
    """
    path = Path(path)
    if path.suffix not in EXPORTS:
        raise ValueError(f"{path}: the name must end in one of {', '.join(EXPORTS)}")
    if os.path.lexists(path):
        raise FileExistsError(17, "a file is there already, and nothing is overwritten", str(path))
    dtype = dtype or (torch.float32 if path.suffix == ".faiss" else table.dtype)
    if path.suffix == ".npy" and dtype == torch.bfloat16:
        raise ValueError(f"{path}: .npy has no bfloat16: choose float32, which loses nothing")
    if path.suffix == ".faiss" and dtype != torch.float32:
        raise ValueError(f"{path}: a flat faiss index is float32, got {dtype_name(dtype)}")
    rows = live_rows(table)
    has_ids = path.suffix == ".safetensors" and table.row_ids is not None
    partial = path.with_name(path.name + ".partial")
    descriptor = files.create(partial)
    try:
        files.write(descriptor, _head(path.suffix, rows, table.dim, dtype, has_ids), partial)
        done = 0
        for piece in _live_pieces(table):
            files.write(descriptor, shard_file.raw_bytes(piece.to("cpu", dtype).contiguous()), partial)
            done += piece.shape[0]
            yield done
        if has_ids and table.row_ids is not None:
            for number in range(len(table.shards)):
                ids = table.row_ids.stored(number)
                files.write(descriptor, shard_file.raw_bytes(ids[ids >= 0].contiguous()), partial)
        files.flush(descriptor, partial)
        with files.naming(path, "rename the written file to this"):
            os.link(partial, path)  # not rename: that would overwrite a file that came meanwhile
        files.flush_directory(path.absolute().parent)
    finally:
        os.close(descriptor)
        files.remove(partial)


def live_rows(table: ShardedTable) -> int:
    return table.num_rows if table.row_mask is None else int(table.row_mask.sum())


def _live_pieces(table: ShardedTable) -> Iterator[Tensor]:
    for number, shard in enumerate(table.shards):
        alive = None if table.row_ids is None else table.row_ids.alive(number)
        step = piece_rows(table.dim)
        for first in range(0, shard.shape[0], step):
            piece = shard[first : first + step]
            yield piece if alive is None else piece[alive[first : first + step]]


def piece_rows(dim: int) -> int:
    return max(1, PIECE_BYTES // (4 * dim))


def _head(suffix: str, rows: int, dim: int, dtype: torch.dtype, has_ids: bool) -> bytes:
    if suffix == ".safetensors":
        return shard_file.header(rows, dim, dtype, has_ids)
    if suffix == ".faiss":
        head = _FAISS_HEAD.pack(b"IxFI", dim, rows, 1 << 20, 1 << 20, 1, _FAISS_INNER_PRODUCT)
        return head + struct.pack("<Q", rows * dim)
    name = {kind: name for name, kind in _NUMPY.items()}[dtype]
    text = f"{{'descr': '{name}', 'fortran_order': False, 'shape': ({rows}, {dim}), }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.ljust(117).encode() + b"\n"


def _open_directory(path: Path, key: str | None) -> Source:
    """A table, or a checkpoint's folder: its weights in one file, or in shards with an index."""
    if (path / manifest.FILE_NAME).is_file():
        table = ShardedTable.open(path)
        return Source(path, live_rows(table), table.dim, table.dtype, lambda: _live_pieces(table))
    key = key or BLOCK_EMB
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return open_source(path / name, key)
        index = path / f"{name}.index.json"
        if index.is_file():
            try:
                shard = json.loads(index.read_text(encoding="utf-8"))["weight_map"][key]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index}: it must say in which file {key} is ({error!r})") from None
            if not isinstance(shard, str) or shard != os.path.basename(shard):
                raise ValueError(f"{index}: a shard must be a file in this folder, got {shard!r}")
            return open_source(path / shard, key)
    raise ValueError(
        f"{path}: a folder must be a table or a checkpoint, with {manifest.FILE_NAME}, model.safetensors or "
        "pytorch_model.bin"
    )


def _open_npy(path: Path, key: str | None) -> Source:
    def opened() -> BinaryIO:
        return open(path, "rb")

    with opened() as file:
        rows, dim, dtype = _npy_head(path, file)
        needed = file.tell() + rows * dim * dtype.itemsize
    size = path.stat().st_size
    if size != needed:
        raise ValueError(f"{path}: an array of [{rows}, {dim}] needs {needed} bytes, the file has {size}")
    return Source(path, rows, dim, dtype, lambda: _npy_pieces(path, opened, rows, dim, dtype))


def _open_npz(path: Path, key: str | None) -> Source:
    """An archive of .npy members; DPR's own pairs (ids, embeddings), saved by numpy.savez."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            if key is None:
                key = "embeddings" if "embeddings" in names else names[0] if len(names) == 1 else None
            if key not in names:
                raise ValueError(f"{path}: key must be one of its arrays, {', '.join(names)}, got {key}")
            with archive.open(f"{key}.npy") as member:
                rows, dim, dtype = _npy_head(path, member)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: the archive is damaged: {error}") from None

    def opened() -> Any:
        return zipfile.ZipFile(path).open(f"{key}.npy")

    return Source(path, rows, dim, dtype, lambda: _npy_pieces(path, opened, rows, dim, dtype))


def _npy_head(path: Path, file: Any) -> tuple[int, int, torch.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, kind = read[version](file)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: this is no .npy array: {str(error).splitlines()[0]}") from None
    if len(shape) != 2 or fortran or kind.str not in _NUMPY or shape[1] < 1:
        raise ValueError(
            f"{path}: the array must be [n, D] of float32 or float16, row after row, got {kind} {list(shape)}"
            + (" column after column" if fortran else "")
        )
    return shape[0], shape[1], _NUMPY[kind.str]


def _npy_pieces(
    path: Path, opened: Callable[[], Any], rows: int, dim: int, dtype: torch.dtype
) -> Iterator[Tensor]:
    try:
        with opened() as file:
            _npy_head(path, file)
            yield from _raw_pieces(path, file, rows, dim, dtype)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: the archive is damaged: {error}") from None


def _raw_pieces(path: Path, file: Any, rows: int, dim: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows as they lie in an open file."""
    step = piece_rows(dim)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        raw = bytearray(file.read(count * dim * dtype.itemsize))
        if len(raw) != count * dim * dtype.itemsize:
            raise ValueError(f"{path}: the file ends before row {rows} of [{rows}, {dim}]")
        yield torch.frombuffer(raw, dtype=dtype).view(count, dim)


def _open_safetensors(path: Path, key: str | None) -> Source:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            key = _chosen(path, key, shapes)
            dtype = file.get_slice(key)[:0].dtype
    except SafetensorError as error:
        raise ValueError(f"{path}: the file is damaged: {str(error).splitlines()[0]}") from None
    rows, dim = shapes[key]
    _require_float(path, key, dtype)

    def pieces() -> Iterator[Tensor]:
        with safe_open(path, framework="pt") as file:
            for first in range(0, rows, piece_rows(dim)):
                yield file.get_slice(key)[first : first + piece_rows(dim)]

    return Source(path, rows, dim, dtype, pieces)


def _open_bin(path: Path, key: str | None) -> Source:
    """Weights of torch.save, mapped; its restricted loader makes tensors and runs nothing."""
    try:
        weights = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # whatever the loader meets in a hostile file
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: it must hold tensors only, and nothing is executed ({reason})") from None
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    key = _chosen(path, key, {name: list(value.shape) for name, value in tensors.items()})
    rows, dim = tensors[key], tensors[key].shape[1]
    _require_float(path, key, rows.dtype)
    return Source(path, len(rows), dim, rows.dtype, lambda: iter(rows.split(piece_rows(dim))))


def _chosen(path: Path, key: str | None, shapes: dict[str, list[int]]) -> str:
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and shape[1] > 0]
    if key is None:
        key = BLOCK_EMB if BLOCK_EMB in matrices else matrices[0] if len(matrices) == 1 else None
    if key not in matrices:
        some = ", ".join(matrices[:8]) + (", ..." if len(matrices) > 8 else "")
        raise ValueError(f"{path}: key must be one of its arrays [n, D], {some or 'none'}, got {key}")
    return key


def _require_float(path: Path, key: str, dtype: torch.dtype) -> None:
    if dtype not in FLOAT_DTYPES:
        allowed = ", ".join(map(dtype_name, FLOAT_DTYPES))
        raise ValueError(f"{path}: {key} must be of dtype {allowed}, got {dtype_name(dtype)}")


def _open_faiss(path: Path, key: str | None) -> Source:
    """A flat index as faiss.write_index writes it: the head, the number of floats, the rows."""
    start = _FAISS_HEAD.size + 8
    with open(path, "rb") as file:
        raw = file.read(start)
    kinds = ", ".join(kind.decode() for kind in _FAISS_FLAT)
    if len(raw) < start or raw[:4] not in _FAISS_FLAT:
        raise ValueError(
            f"{path}: a faiss file must be a flat index ({kinds}), whose vectors are whole, got {raw[:4]!r}"
        )
    _, dim, rows, _, _, _, metric = _FAISS_HEAD.unpack(raw[: _FAISS_HEAD.size])
    if metric > 1:
        raise ValueError(f"{path}: a flat index must be of inner products or L2, got faiss metric {metric}")
    (numbers,) = struct.unpack("<Q", raw[_FAISS_HEAD.size :])
    size = path.stat().st_size
    if dim < 1 or rows < 0 or numbers != rows * dim or size != start + 4 * numbers:
        raise ValueError(
            f"{path}: a flat index of [{rows}, {dim}] must have {start + 4 * math.prod((rows, dim))} bytes, "
            f"the file has {size}"
        )

    def pieces() -> Iterator[Tensor]:
        with open(path, "rb") as file:
            file.seek(start)
            yield from _raw_pieces(path, file, rows, dim, torch.float32)

    return Source(path, rows, dim, torch.float32, pieces)
