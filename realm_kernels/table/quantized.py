"""int8 codes of a table's rows and the bounds of their error: what a certified search scans instead."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native
from ..validation import dtype_name

PANEL_ROWS = 32  # kCodeRows of csrc/cpu/mips_topk.h
MAX_DIM = 1 << 14  # kMaxCodeDim
BOUNDS = 3  # floats of CodeBounds
SAMPLE_ROWS = 1 << 14  # the mean of as many rows serves as well as that of all: any vector is correct

_lock = threading.Lock()


@dataclass(frozen=True)
class Int8Codes:
    """Codes c of rows x = mean + s c + e, panel by panel: 32 rows share a scale s and bounds of e and s c.

    A cache of the rows: once they are written to it is out of date, and `refresh` encodes them anew.

    mean: float32 [D]. written: int64 [S, 2], how often each shard had been written to, and where it was,
        when it was encoded.
    codes: of each shard uint8 [panels, bytes], c + 128 in the order the scan reads them.
    bounds: of each shard float32 [panels, 3]: s, at least ||e||, at least ||s c||.
    """

    mean: Tensor
    written: Tensor
    codes: tuple[Tensor, ...]
    bounds: tuple[Tensor, ...]

    def tensors(self) -> list[Tensor]:
        """As the op takes them: mean, written, then codes and bounds of each shard."""
        pairs = zip(self.codes, self.bounds, strict=True)
        return [self.mean, self.written, *(part for pair in pairs for part in pair)]

    @staticmethod
    def of(shards: Sequence[Tensor]) -> Int8Codes:
        """The codes of all shards: two passes over the rows, one byte an element."""
        dim = shards[0].shape[1]
        panels = [-(-shard.shape[0] // PANEL_ROWS) for shard in shards]
        panel_bytes = -(-dim // 8) * 8 * PANEL_ROWS
        with torch.inference_mode(False):  # of whatever mode, a later search may write into them
            codes = Int8Codes(
                mean=torch.empty(dim),
                written=torch.full((len(shards), 2), -1),
                codes=tuple(torch.empty(count, panel_bytes, dtype=torch.uint8) for count in panels),
                bounds=tuple(torch.empty(count, BOUNDS) for count in panels),
            )
        refresh(shards, codes.tensors())
        return codes


def refuses(shards: Sequence[Tensor]) -> str | None:
    """Why these shards cannot be encoded, or None."""
    if native.cpu is None:
        return f"the C++ module is missing: {native.cpu_missing}"
    if shards[0].device.type != "cpu":
        return f"codes are offered on the CPU so far, and the table is on {shards[0].device}"
    if shards[0].shape[1] > MAX_DIM:
        return f"D must be at most {MAX_DIM}, got {shards[0].shape[1]}"
    if any(shard.is_inference() for shard in shards):
        return "tensors made in inference mode do not tell when they are written to: pass shard.clone()"
    return None


def refresh(shards: Sequence[Tensor], codes: Sequence[Tensor]) -> None:
    """Encode `shards` into codes, Int8Codes.tensors(), unless these are of the rows as they are."""
    assert native.cpu is not None
    mean, written, *parts = codes
    with _lock:
        if are_of(codes, shards):
            return
        now = torch.tensor(_state(shards))
        mean.copy_(sample_mean(shards))
        for shard, bytes_, bounds in zip(shards, parts[::2], parts[1::2], strict=True):
            rows = shard if shard.stride(1) == 1 else shard.contiguous()
            native.cpu.encode_rows(
                (rows.data_ptr(), rows.shape[0], rows.stride(0)),
                dtype_name(rows.dtype),
                rows.shape[1],
                mean.data_ptr(),
                (bytes_.data_ptr(), bounds.data_ptr()),
                torch.get_num_threads(),
                "",
            )
        written.copy_(now)


def are_of(codes: Sequence[Tensor], shards: Sequence[Tensor]) -> bool:
    """Whether the codes, Int8Codes.tensors(), are those of the rows as they are."""
    written: list[list[int]] = codes[1].tolist()
    return written == _state(shards)


def _state(shards: Sequence[Tensor]) -> list[list[int]]:
    return [[shard._version, shard.data_ptr()] for shard in shards]


def sample_mean(shards: Sequence[Tensor]) -> Tensor:
    """The mean of rows spread evenly over the table, float32 [D]; zero where they are not finite."""
    step = max(1, sum(shard.shape[0] for shard in shards) // SAMPLE_ROWS)
    sample = torch.cat([shard[::step].float() for shard in shards])
    sample = sample[sample.isfinite().all(1)]
    mean = sample.mean(0) if sample.shape[0] > 0 else sample.new_zeros(sample.shape[1])
    return torch.where(mean.isfinite(), mean, 0.0)
