"""What the stages of the Hopper scan of mips_topk do (docs/hopper_scan.md), and of its peers at B = 512.

The plan of a search is C++ (csrc/cuda/mips_topk_plan.h); what is needed of it stands here once more, so that
the tables can be made where CUDA was not built, and a test compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from realm_kernels.mips_topk.gpu import WORKSPACE_BYTES
from realm_kernels.mips_topk.triton_plan import ceil_div

from .gpu_model import Gpu, Stage

WIKIPEDIA = 13_353_718
# What is scanned, rows, width, k, codes, queries.
SEARCHES: tuple[tuple[str, int, int, int, bool, tuple[int, ...]], ...] = (
    ("bfloat16", WIKIPEDIA, 128, 8, False, (1, 64, 128, 256, 512, 1024)),
    ("bfloat16", WIKIPEDIA, 128, 100, False, (128, 512)),
    ("int8 codes of bfloat16 rows", WIKIPEDIA, 128, 8, True, (1, 128, 512)),
    ("int8 codes of bfloat16 rows", WIKIPEDIA, 128, 100, True, (128, 512)),
    ("bfloat16", 1_000_000, 768, 8, False, (64, 128, 256, 512)),
)
TILE, GROUP, BLOCK, PANEL_BYTES = 128, 32, 64, 128  # rows of a tile, of a group; queries of a block
WIDE_BLOCKS, DEEP_BLOCKS, WIDE_PANELS = 8, 4, 4
CLUSTER, SM_OF_CLUSTERS = 4, 128 / 132  # on a GPU whose parts have 16 or 18 multiprocessors
MATRIX_SHARE = 0.97  # of the rate of products alone
# Three selections of a block follow each other, and the last block of a query sorts: latency, not rate.
SELECT_SECONDS, RESCORE_SECONDS = 3e-6, 4e-6
OPS_PER_SCORE = {torch.bfloat16: 72 / 64, torch.int8: 48 / 64}  # of maxima, and of what makes words of them


def kept(dim: int, k: int, codes: bool) -> int:
    """Tiles of a query."""
    if codes:
        return k + round(k * (math.exp(4.5 * 0.01 * math.sqrt(dim) * 1.8) - 1)) + 16
    return k + 8 + k // 4


def selected(dim: int, k: int, codes: bool) -> int:
    """Groups that are rescored at most."""
    return kept(dim, k, codes) * 5 // 4 if codes else 2 * kept(dim, k, codes)


def pass_of(batch: int, num_rows: int, dim: int, k: int, codes: bool) -> int:
    """Queries of a pass: words and keys of candidates fit the workspace."""
    words = 4 * ceil_div(ceil_div(num_rows, TILE), 4) * 4
    each = words + 8 * GROUP * selected(dim, k, codes) + (256 if codes else 512) * ceil_div(dim, 128)
    at_once = batch
    while at_once * each > WORKSPACE_BYTES:
        half = ceil_div(at_once, 2)
        at_once = half // BLOCK * BLOCK if half > BLOCK else half
    return at_once


def stages(batch: int, num_rows: int, dim: int, k: int, codes: bool = False) -> list[Stage]:
    """A search of bfloat16 rows as they are, or over int8 codes of them; all scores normally distributed."""
    dtype = torch.int8 if codes else torch.bfloat16
    at_once = pass_of(batch, num_rows, dim, k, codes)
    passes, blocks = ceil_div(batch, at_once), ceil_div(at_once, BLOCK)
    panels = ceil_div(dim * dtype.itemsize, PANEL_BYTES)
    table = num_rows * dim * dtype.itemsize
    words = 4 * batch * ceil_div(num_rows, TILE)
    deep = blocks > 1 and panels > WIDE_PANELS
    columns = ceil_div(blocks, DEEP_BLOCKS if deep else WIDE_BLOCKS)  # that read the rows from the L2
    each = ceil_div(blocks, columns)
    # Where queries stream a cluster reads theirs once for the rows of all its blocks.
    l2 = passes * columns * table * (1 + (each * BLOCK / TILE / CLUSTER if deep else 0))
    scores = passes * columns * each * BLOCK * num_rows
    # What reaches the floor: the k best and some whose bounds are rounded; over codes the plan's choice.
    groups = selected(dim, k, codes) if codes else k + max(2, k // 10)
    rows = batch * groups * GROUP
    return [
        Stage("prepare", launches=passes),
        Stage(
            "scan",
            bytes=passes * table + words,
            l2_bytes=l2 / (SM_OF_CLUSTERS if deep else 1),
            flops=2 * scores * dim / MATRIX_SHARE / (SM_OF_CLUSTERS if deep else 1),
            dtype=dtype,
            ops=OPS_PER_SCORE[dtype] * scores,
            launches=passes,
        ),
        Stage(
            "select", bytes=words * (2 if codes else 1.25), waiting=passes * SELECT_SECONDS, launches=passes
        ),
        Stage(
            "rescore",
            bytes=rows * (dim * dtype.itemsize + 16),
            float64_flops=0 if codes else 2 * rows * dim,
            waiting=passes * RESCORE_SECONDS,
            launches=passes,
        ),
        Stage("repair", launches=passes),
    ]


def _ours(batch: int, num_rows: int, dim: int, k: int, gpu: Gpu) -> list[Stage]:
    found = stages(batch, num_rows, dim, k)
    rest = sum(stage.seconds(gpu) for stage in found) - found[1].seconds(gpu)
    return [found[1], Stage("the rest", waiting=rest, launches=0)]


def _through_memory(score_bytes: int, reads: float) -> Callable[[int, int, int, int, Gpu], list[Stage]]:
    """A library's product, chunk by chunk, and a selection from its scores."""

    def found(batch: int, num_rows: int, dim: int, k: int, gpu: Gpu) -> list[Stage]:
        scores = score_bytes * batch * num_rows
        flops = 2 * batch * num_rows * dim
        return [
            Stage("scan", bytes=2 * num_rows * dim + scores, flops=flops, launches=num_rows / 2**18),
            Stage("the rest", bytes=reads * scores, launches=num_rows / 2**18),
        ]

    return found


def _fused_at(rate: float) -> Callable[[int, int, int, int, Gpu], list[Stage]]:
    """A fused search that makes so many flops a second, as its authors report it."""

    def found(batch: int, num_rows: int, dim: int, k: int, gpu: Gpu) -> list[Stage]:
        return [Stage("scan", waiting=2 * batch * num_rows * dim / rate), Stage("the rest", launches=0)]

    return found


# torch.topk of 16 bits by radix: two histograms, then a pass for what is above the k-th and one for it. faiss
# and cuVS keep float32 distances of a tile of queries and rows, and read them once.
PEERS = {
    "ours": _ours,
    "chunked torch, bfloat16 scores": _through_memory(2, 4),
    "product and one selection, float32 (faiss, cuVS)": _through_memory(4, 1),
    "fused, 88 TFLOP/s (flashlib)": _fused_at(88e12),
}
