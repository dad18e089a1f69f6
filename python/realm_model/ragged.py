"""Rows of different lengths in two flat arrays, in memory or mapped from files: how token ids are held.

Row i is values[ends[i - 1] : ends[i]]. Files are raw little-endian arrays, `NAME.values` and `NAME.ends`
(int64), so that a million rows are two mappings and no Python list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

ENDS = np.dtype("<i8")


@dataclass(frozen=True)
class Ragged:
    """values [total, ...] of any dtype, ends int64 [rows]."""

    values: np.ndarray
    ends: np.ndarray

    @staticmethod
    def from_lists(rows: Sequence[Sequence[int]]) -> Ragged:
        """Rows of token ids in memory, as int32."""
        ends = np.cumsum([len(row) for row in rows], dtype=ENDS)
        values = np.fromiter((value for row in rows for value in row), dtype=np.int32)
        return Ragged(values, ends)

    @staticmethod
    def open(stem: Path, rows: int, dtype: str, width: int = 0) -> Ragged:
        """Map `stem.values` and `stem.ends`. Raises ValueError naming a file that is not as it was."""
        ends = _map(stem.with_name(f"{stem.name}.ends"), ENDS, rows)
        total = int(ends[-1]) if rows else 0
        values = _map(stem.with_name(f"{stem.name}.values"), np.dtype(dtype), total * max(width, 1))
        return Ragged(values.reshape(-1, width) if width else values, ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> np.ndarray:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row must be in [0, {len(self)}), got {row}")
        row %= len(self)
        return self.values[self.begin(row) : self.ends[row]]

    def begin(self, row: int) -> int:
        return int(self.ends[row - 1]) if row > 0 else 0

    def padded(self, rows: Tensor, fill: int = 0) -> Tensor:
        """Rows int64 [...] -> int64 [..., the longest], filled with `fill`: 0 is [PAD].

        Row len(self) is the row that holds nothing: the null document.
        """
        flat = rows.reshape(-1).numpy()
        held = flat < len(self)
        safe = np.where(held, flat, 0)
        last = np.where(held, self._ends_at(safe), 0)
        first = np.where(held & (safe > 0), self._ends_at(safe - 1), 0)
        lengths = last - first
        width = int(lengths.max(initial=0))
        columns = np.arange(width)
        inside = columns < lengths[:, None]
        out = np.full((len(flat), width), fill, dtype=np.int64)
        out[inside] = self.values[(first[:, None] + columns)[inside]]
        return torch.from_numpy(out).view(*rows.shape, width)

    def _ends_at(self, rows: np.ndarray) -> np.ndarray:
        return self.ends[rows] if len(self) else np.zeros_like(rows)


class RaggedWriter:
    """Append rows to `stem.values` and `stem.ends`; `digest` is of all that was written."""

    def __init__(self, stem: Path, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self.digest = hashlib.sha256()
        self._values = stem.with_name(f"{stem.name}.values").open("wb")
        self._ends = stem.with_name(f"{stem.name}.ends").open("wb")
        self.total = 0

    def append(self, row: Sequence[int] | Sequence[tuple[int, int]] | np.ndarray | bytes) -> None:
        """A row of numbers, of pairs, or of bytes."""
        array = np.frombuffer(row, np.uint8) if isinstance(row, bytes) else np.asarray(row, dtype=self.dtype)
        self.total += len(array)
        self._write(self._values, array.tobytes())
        self._write(self._ends, self.total.to_bytes(8, "little"))

    def _write(self, file: object, data: bytes) -> None:
        file.write(data)  # type: ignore[attr-defined]
        self.digest.update(data)

    def close(self) -> None:
        self._values.close()
        self._ends.close()

    def __enter__(self) -> RaggedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    size = path.stat().st_size if path.is_file() else -1
    if size != count * dtype.itemsize:
        found = f"{size} bytes" if size >= 0 else "no such file"
        raise ValueError(f"{path} must hold {count * dtype.itemsize} bytes, got {found}")
    # An empty file cannot be mapped. As a plain array a map is read several times faster, row by row.
    return np.asarray(np.memmap(path, dtype, "r")) if count else np.empty(0, dtype)
