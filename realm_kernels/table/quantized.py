"""int8 codes of a table's rows and the bounds of their error: what a certified search scans instead.

Two layouts of one thing: panels of 32 rows for the C++ scan, groups of rows in order for a GPU
(device_codes.py).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native
from ..validation import dtype_name
from . import device_codes

PANEL_ROWS = 32  # kCodeRows of csrc/cpu/mips_topk.h
MAX_DIM = 1 << 14  # kMaxCodeDim
BOUNDS = 3  # floats of CodeBounds
SAMPLE_ROWS = 1 << 14  # the mean of as many rows serves as well as that of all: any vector is correct

_lock = threading.Lock()


@dataclass(frozen=True)
class Int8Codes:
    """Codes c of rows x = mean + s c + e; those of a panel or group share a scale s and bounds of e and s c.

    A cache of the rows: once they are written to it is out of date, and `refresh` encodes them anew.

    mean: float32 [D]. written: int64 [S, 2] on the CPU, how often each shard had been written to, and where
        it was, when it was encoded.
    codes: of each shard uint8 [panels, bytes], c + 128 in the order the C++ scan reads them; on a GPU int8
        [groups, G, D32], row after row.
    bounds: of each shard float32 [panels or groups, 3]: s, at least ||e||, at least ||s c||.
    """

    mean: Tensor
    written: Tensor
    codes: tuple[Tensor, ...]
    bounds: tuple[Tensor, ...]

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def tensors(self) -> list[Tensor]:
        """As the op takes them: mean, written, then codes and bounds of each shard."""
        pairs = zip(self.codes, self.bounds, strict=True)
        return [self.mean, self.written, *(part for pair in pairs for part in pair)]

    @staticmethod
    def of(shards: Sequence[Tensor], device: torch.device | None = None) -> Int8Codes:
        """The codes of all shards, for scans on `device`: two passes over the rows, one byte an element."""
        device = device or shards[0].device
        with torch.inference_mode(False):  # of whatever mode, a later search may write into them
            if device.type == "cpu":
                codes, bounds = _empty_panels(shards)
            else:
                codes, bounds = device_codes.empty(shards, device)
            made = Int8Codes(
                mean=torch.empty(shards[0].shape[1], device=device),
                written=torch.full((len(shards), 2), -1),
                codes=tuple(codes),
                bounds=tuple(bounds),
            )
        refresh(shards, made.tensors())
        return made


def are_for_the_cpu(codes: Sequence[Tensor]) -> bool:
    """Whether the codes, Int8Codes.tensors(), are panels for the C++ scan."""
    return codes[2].dtype == torch.uint8


def _empty_panels(shards: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    panels = [-(-shard.shape[0] // PANEL_ROWS) for shard in shards]
    panel_bytes = -(-shards[0].shape[1] // 8) * 8 * PANEL_ROWS
    codes = [torch.empty(count, panel_bytes, dtype=torch.uint8) for count in panels]
    return codes, [torch.empty(count, BOUNDS) for count in panels]


def refuses(shards: Sequence[Tensor], device: torch.device) -> str | None:
    """Why these shards cannot be encoded for scans on `device`, or None."""
    if device.type == "cpu":
        if native.cpu is None:
            return f"the C++ module is missing: {native.cpu_missing}"
    elif device.type != "cuda":
        return f"device must be cpu or cuda, got {device}"
    elif not torch.cuda.is_available():
        return f"device is {device}, and torch finds no GPU"
    if shards[0].device.type != "cpu" and shards[0].device != device:
        return f"codes of a table on {shards[0].device} are kept there, got device {device}"
    if shards[0].shape[1] > MAX_DIM:
        return f"D must be at most {MAX_DIM}, got {shards[0].shape[1]}"
    if any(shard.is_inference() for shard in shards):
        return "tensors made in inference mode do not tell when they are written to: pass shard.clone()"
    return None


def refresh(shards: Sequence[Tensor], codes: Sequence[Tensor]) -> None:
    """Encode `shards` into codes, Int8Codes.tensors(), unless these are of the rows as they are.

    On a GPU this waits until they are there, whatever stream a search then runs on.
    """
    mean, written, *parts = codes
    with _lock:
        if are_of(codes, shards):
            return
        on_gpu = mean.device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "ShardedTable: the rows were written to since their codes were made, and encoding cannot be "
                "captured: search once before the capture"
            )
        now = torch.tensor(_state(shards))
        mean.copy_(sample_mean(shards))
        for shard, found, bounds in zip(shards, parts[::2], parts[1::2], strict=True):
            if are_for_the_cpu(codes):
                _encode_panels(shard, mean, found, bounds)
            else:
                device_codes.encode(shard, mean, found, bounds)
        if on_gpu:
            torch.cuda.current_stream(mean.device).synchronize()
        written.copy_(now)


def _encode_panels(shard: Tensor, mean: Tensor, codes: Tensor, bounds: Tensor) -> None:
    assert native.cpu is not None
    rows = shard if shard.stride(1) == 1 else shard.contiguous()
    native.cpu.encode_rows(
        (rows.data_ptr(), rows.shape[0], rows.stride(0)),
        dtype_name(rows.dtype),
        rows.shape[1],
        mean.data_ptr(),
        (codes.data_ptr(), bounds.data_ptr()),
        torch.get_num_threads(),
        "",
    )


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
