"""The Triton backend of mips_topk: what it serves. The search itself is in triton_search.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import backends, native
from ..table import quantized
from . import gpu


def refuses(
    queries: Tensor,
    shards: list[Tensor],
    k: int,
    exclude: Tensor | None,
    row_mask: Tensor | None,
    codes: Sequence[Tensor] = (),
) -> str | None:
    missing = native.triton_missing()
    if not missing and queries.device.type == "cpu" and backends.forced_backend() == "triton":
        from .triton_scan import INTERPRETED

        if INTERPRETED:
            return None
    refused = gpu.refuses(queries, missing, "8.0 or higher", lambda capability: capability >= (8, 0))
    if queries.device.type == "cpu" and not missing:
        return f"{refused} (CPU tensors with TRITON_INTERPRET=1, when forced)"
    return refused


def forward(
    queries: Tensor,
    shards: list[Tensor],
    k: int,
    exclude: Tensor | None,
    row_mask: Tensor | None,
    codes: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    from .triton_search import search  # imports triton

    if codes and not (codes[0].device == queries.device and quantized.are_of(codes, shards)):
        codes = ()
    return search(queries, shards, k, exclude, row_mask, codes)


BACKEND = backends.Backend(name="triton", refuses=refuses, forward=forward)
