"""What each stage of our ops should take on a GPU, by bytes, products, instructions; nothing is measured.

    python -m benchmarks.time_model          # prints the tables
    python -m benchmarks.time_model --write  # and puts them into docs/benchmarks.md

A stage takes as long as the slowest of what it does: bytes of device memory and of the L2, products in the
tensor cores, instructions of the other units; work of one kind is taken to hide behind that of another. Sizes
come from the ops' own plans, so the tables move with them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from realm_kernels.linear_marginal_loss import triton as linear
from realm_kernels.linear_marginal_loss.chunks import chunks_of
from realm_kernels.linear_marginal_loss.problem import Problem
from realm_kernels.marginal_loss.plan import cost as marginal_cost
from realm_kernels.mips_topk import triton_plan
from realm_kernels.mips_topk.plan import cost as mips_cost
from realm_kernels.mips_topk.triton_plan import ceil_div
from realm_kernels.score_spans.plan import cost as score_cost
from realm_kernels.score_spans.reference import count as span_count
from realm_kernels.score_spans.triton import tile as score_tile
from realm_kernels.table import device_codes

from . import time_model_hopper
from .bench_marginal_loss import SHAPES as MARGINAL_SHAPES
from .bench_score_spans import SHAPES as SCORE_SHAPES
from .gpu_model import H200, Gpu, Stage
from .linear_marginal_loss_cases import DOCUMENTS, SHAPES, TOKENS
from .report import Lines, markdown_of

DOCS = Path(__file__).parents[1] / "docs/benchmarks.md"
BEGIN, END = "<!-- time model: begin -->", "<!-- time model: end -->"
WIKIPEDIA, DIM = 13_353_718, 128
WIDTH, VOCABULARY = SHAPES["base"]
BATCHES = (1, 16, 64, 128, 256, 512, 1024, 4096)
LINEAR_BATCHES = (16, 64, 512)
LINEAR_BACKENDS = {
    "triton": "two kernels between the products",
    "triton:epilogue": "a first product of our own with the statistics, one kernel behind it",
    "torch": "torch between them",
}

# One step of a sorting network on a 64-bit key: a shuffle, a comparison and a choice of two words each.
OPS_PER_SORT_STEP = 10
# A group in the filter of select_kernel, as its plan says.
OPS_PER_FILTERED_GROUP = 15
# From the largest product of a group of codes to its bound, as scan_codes_kernel says.
OPS_PER_BOUND = 10
# Instructions a number of a representation that the loops of score_spans compile to for sm_90.
SCORE_FORWARD, SCORE_BACKWARD = 10, 17


def mips_topk_stages(
    batch: int, num_rows: int, dim: int, k: int, dtype: torch.dtype = torch.bfloat16, codes: bool = False
) -> list[Stage]:
    """The Triton search of queries [B, D] over rows [N, D] of one dtype, or over int8 codes of them."""
    code_group = device_codes.group_rows(num_rows, dim) if codes else None
    plan = triton_plan.plan_for(batch, num_rows, dim, k, 0, dtype, dtype, code_group=code_group)
    passes = ceil_div(batch, plan.batch)
    row_bytes = dim * dtype.itemsize
    scanned_bytes = dim if codes else row_bytes
    tiles_of_queries = passes * ceil_div(min(batch, plan.batch), plan.scan.block_b)
    scored = tiles_of_queries * plan.scan.block_b * num_rows  # padded queries are multiplied too
    part, keep = triton_plan.select_part(plan.num_groups, plan.selected)
    select = sorting(plan.num_groups, part, plan.selected)
    if keep != plan.selected:
        bins = plan.num_groups * 2 * keep // part
        select = OPS_PER_FILTERED_GROUP * plan.num_groups + sorting(bins, 2 * keep, plan.selected)
    kept = ceil_div(plan.num_groups, part) * keep
    shrink, select_rounds = tournament(kept, plan.selected, to_one_list=True)
    of_groups = plan.selected * plan.group
    read = of_groups if plan.kept is None else min(of_groups, plan.kept)
    finish, finish_rounds = tournament(read, plan.top)
    _, repair_rounds = tournament(plan.repair_parts * plan.top, plan.top)
    stages = [
        Stage(
            "scan",
            bytes=passes * num_rows * scanned_bytes + 4 * batch * plan.num_groups,
            l2_bytes=tiles_of_queries * num_rows * scanned_bytes,
            flops=2 * scored * dim,
            dtype=torch.int8 if codes else dtype,
            # A maximum a score; the bound of a group of codes, or the squares of the norms of rows.
            ops=scored + (OPS_PER_BOUND * scored / plan.group if codes else passes * num_rows * dim),
            launches=2 * passes,
        ),
        Stage(
            "select",
            bytes=4 * batch * plan.num_groups + 16 * batch * kept,
            l2_bytes=0 if codes else 4 * batch * plan.num_groups,
            ops=batch * (select + shrink),
            launches=passes * select_rounds,
        ),
    ]
    if plan.kept is not None:
        refine, refine_rounds = tournament(of_groups, plan.kept, to_one_list=True)
        stages.append(
            Stage(
                "refine",
                bytes=batch * of_groups * (dim + 16),
                # Conversion and multiply-add, at twice the rate of a maximum.
                ops=batch * (of_groups * dim + refine),
                launches=passes * refine_rounds,
            )
        )
    return [
        *stages,
        Stage(
            "rescore",
            bytes=batch * read * (row_bytes + 8),
            float64_flops=2 * batch * read * dim,
            launches=passes,
        ),
        Stage("finish", bytes=8 * batch * read, ops=batch * finish, launches=passes * finish_rounds),
        Stage("repair", launches=passes * (1 + repair_rounds)),
    ]


def tournament(width: int, top: int, to_one_list: bool = False) -> tuple[float, int]:
    """Instructions of the rounds that leave `top` of `width` keys, and the launches with the one before."""
    widths = triton_plan.rounds(width, top, to_one_list)
    sorted_widths = widths[:-1] if to_one_list else widths
    ops = sum(sorting(keys, triton_plan.sort_keys(keys, top), top) for keys in sorted_widths)
    return ops, len(widths)


def sorting(keys: float, part: int, top: int) -> float:
    """Instructions to keep `top` keys of each part: runs of `top` are sorted, then halved to one."""
    log_top = math.log2(top)
    steps = log_top * (log_top + 1) / 2 + (log_top + 1 if part > top else 0)
    return keys * steps * OPS_PER_SORT_STEP


def linear_marginal_loss_stages(batch: int, backend: str) -> list[Stage]:
    """Forward and backward in bfloat16, by one of LINEAR_BACKENDS."""
    with FakeTensorMode():  # the plan looks at device and dtype; no GPU is needed
        hidden = torch.empty(batch, DOCUMENTS, TOKENS, WIDTH, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(VOCABULARY, WIDTH, dtype=torch.bfloat16, device="cuda")
        scores = torch.empty(batch, DOCUMENTS, device="cuda")
        targets = torch.empty(batch, TOKENS, dtype=torch.int64, device="cuda")
        problem = Problem(scores, hidden, weight, targets, None, None, None, -100, "sequence")
        plan = chunks_of(problem, in_place=backend != "torch")
    chunks = ceil_div(plan.rows, plan.step())
    logits, operand, table = 4 * VOCABULARY * plan.rows, 2 * plan.rows * WIDTH, 2 * VOCABULARY * WIDTH
    flops = 2 * plan.rows * WIDTH * VOCABULARY
    # A logit is read for its row's statistics, unless the product had them, read again and written as a
    # half-precision gradient; torch's calls of the chunk read or write it eleven times (README.md of the op).
    passes, launches = {"triton:epilogue": (1.5, 2), "triton": (2.5, 3), "torch": (11, 16)}[backend]
    # A tile of our product reads its words and its rows; how often cuBLAS does is not known.
    words, rows = linear.PRODUCT_V, linear.PRODUCT_R
    tiles = chunks * ceil_div(VOCABULARY, words) * ceil_div(plan.step(), rows)
    tiles_read = tiles * (words + rows) * 2 * WIDTH if backend == "triton:epilogue" else 0
    moved = logits + operand + chunks * table
    return [
        Stage("logits", bytes=moved, l2_bytes=tiles_read, flops=flops, launches=chunks),
        Stage("between", bytes=passes * logits, launches=chunks * launches),
        Stage("posterior", launches=chunks * 3),
        Stage("d_hidden", bytes=logits / 2 + 2 * operand + chunks * table, flops=flops, launches=chunks),
        # Its float32 sum [V, H] is read and written for each chunk.
        Stage("d_weight", bytes=logits / 2 + operand + 4 * chunks * table, flops=flops, launches=chunks),
    ]


def epilogue_wins_above(batch: int, gpu: Gpu) -> float:
    """The share of the library's matrix rate that the first product must reach to win by its statistics."""
    (product, between), (_, shorter) = (
        [stage.seconds(gpu) for stage in linear_marginal_loss_stages(batch, backend)[:2]]
        for backend in ("triton", "triton:epilogue")
    )
    return product / (product + between - shorter)


def marginal_loss_stages(shape: str, mode: str) -> list[Stage]:
    batch, documents, tokens = MARGINAL_SHAPES[shape]
    moved, flops = marginal_cost(batch, documents, tokens, mode, 4, 4)
    gradients = batch * documents * (tokens + 1) * 4
    return [
        Stage("forward", bytes=moved, float64_flops=flops),
        Stage("reduce", bytes=16 * batch),
        Stage("backward", bytes=moved + gradients, float64_flops=2 * flops),
    ]


def score_spans_stages(shape: str) -> list[Stage]:
    """In float32."""
    rows, length, width, max_width = SCORE_SHAPES[shape]
    spans = rows * span_count(length, max_width)
    half = 4 * rows * length * width
    tile = score_tile(length, width, 4)["BLOCK_T"]
    met = half * (tile + max_width - 1) / tile  # wordpieces that a tile meets, its neighbours' too
    partial = 4 * rows * ceil_div(length, tile) * width
    moved, _ = score_cost(rows, length, width, max_width, 4)
    return [
        # Most instructions have twice the rate of a maximum.
        Stage("forward", bytes=moved, l2_bytes=half + met, ops=SCORE_FORWARD * spans * width / 2),
        Stage(
            "backward",
            bytes=2 * half + 16 * spans + 2 * half + partial,
            l2_bytes=2 * (half + met) + 2 * half,
            ops=SCORE_BACKWARD * spans * width / 2,
        ),
        Stage("sum of d_v", bytes=partial),
    ]


def lines_of(
    labels: Sequence[str],
    stages: Callable[[str], list[Stage]],
    limit: Callable[[str], float],
    gpu: Gpu,
    unit: str = "ms",
) -> Lines:
    """A line a shape: each stage and what bounds it, their sum, the limit, its share, and a blank."""
    per_second = {"ms": 1e3, "µs": 1e6}[unit]

    def told(seconds: float, bound: str = "") -> str:
        return f"{per_second * seconds:.3f}" + (f" {bound}" if bound else "")

    body: list[list[str]] = []
    header: list[str] = []
    for label in labels:
        found = stages(label)
        names = [stage.name for stage in found]
        header = ["shape", *names, f"expected, {unit}", f"limit, {unit}", "of the limit", f"measured, {unit}"]
        cells = [told(stage.seconds(gpu), stage.bound(gpu)) for stage in found]
        total, least = sum(stage.seconds(gpu) for stage in found), limit(label)
        body.append([label, *cells, told(total), told(least), f"{least / total:.0%}", ""])
    return header, body


def mips_limit(
    batch: int, k: int, dtype: torch.dtype, gpu: Gpu, num_rows: int = WIKIPEDIA, dim: int = DIM
) -> float:
    moved, flops = mips_cost(batch, num_rows, dim, k, dtype.itemsize, 2)
    return max(moved / gpu.memory_bytes, flops / gpu.products[dtype])


def tables(gpu: Gpu) -> str:
    """The Markdown of all of them."""
    losses = [*linear_marginal_loss_tables(gpu), marginal_loss_table(gpu), score_spans_table(gpu)]
    return "\n".join([*mips_topk_tables(gpu), *hopper_tables(gpu), *losses])


def mips_topk_tables(gpu: Gpu) -> list[str]:
    batches = {f"B={batch}": batch for batch in BATCHES}
    found = []
    for codes, told in ((False, "bfloat16"), (True, "int8 codes of bfloat16 rows")):
        for k in (8, 100):
            lines = lines_of(
                list(batches),
                lambda label, k=k, codes=codes: mips_topk_stages(
                    batches[label], WIKIPEDIA, DIM, k, codes=codes
                ),
                lambda label, k=k, codes=codes: mips_limit(
                    batches[label], k, torch.int8 if codes else torch.bfloat16, gpu
                ),
                gpu,
            )
            title = f"**mips_topk, {told}**, N = {WIKIPEDIA:,}, D = {DIM}, k = {k}, Triton"
            found.append(f"{title}\n\n{markdown_of(lines)}")
    return found


def hopper_tables(gpu: Gpu) -> list[str]:
    found = []
    for title, num_rows, dim, k, codes, batches in time_model_hopper.SEARCHES:
        of_label = {f"B={batch}": batch for batch in batches}
        shape = num_rows, dim, k
        lines = lines_of(
            list(of_label),
            lambda label, of=of_label, shape=shape, codes=codes: time_model_hopper.stages(
                of[label], *shape, codes=codes
            ),
            lambda label, of=of_label, shape=shape, codes=codes: mips_limit(
                of[label], shape[2], torch.int8 if codes else torch.bfloat16, gpu, *shape[:2]
            ),
            gpu,
        )
        told = f"**mips_topk, {title}**, N = {num_rows:,}, D = {dim}, k = {k}, Hopper scan"
        found.append(f"{told}\n\n{markdown_of(lines)}")
    lines = lines_of(
        list(time_model_hopper.PEERS),
        lambda name: time_model_hopper.PEERS[name](512, WIKIPEDIA, DIM, 8, gpu),
        lambda _: mips_limit(512, 8, torch.bfloat16, gpu),
        gpu,
    )
    told = f"**mips_topk and peers, bfloat16**, N = {WIKIPEDIA:,}, D = {DIM}, k = 8, B = 512"
    return [*found, f"{told}\n\n{markdown_of(lines)}"]


def linear_marginal_loss_tables(gpu: Gpu) -> list[str]:
    batches = {f"B={batch}": batch for batch in LINEAR_BATCHES}
    flops = 3 * 2 * DOCUMENTS * TOKENS * WIDTH * VOCABULARY  # of an example
    found = []
    for backend, through in LINEAR_BACKENDS.items():
        lines = lines_of(
            list(batches),
            lambda label, backend=backend: linear_marginal_loss_stages(batches[label], backend),
            lambda label: flops * batches[label] / gpu.products[torch.bfloat16],
            gpu,
        )
        title = "**linear_marginal_loss, bfloat16**, forward and backward,"
        title += f" K = {DOCUMENTS}, M = {TOKENS}, H = {WIDTH}, V = {VOCABULARY}, {through}"
        if backend == "triton:epilogue":
            title += (
                f" (wins where it multiplies at {epilogue_wins_above(64, gpu):.0%} of the library's rate)"
            )
        found.append(f"{title}\n\n{markdown_of(lines)}")
    return found


def marginal_loss_table(gpu: Gpu) -> str:
    shapes = {f"{mode} {shape}": (shape, mode) for shape in MARGINAL_SHAPES for mode in ("sequence", "token")}
    lines = lines_of(
        list(shapes),
        lambda label: marginal_loss_stages(*shapes[label]),
        lambda label: sum(stage.bytes for stage in marginal_loss_stages(*shapes[label])) / gpu.memory_bytes,
        gpu,
        unit="µs",
    )
    return f"**marginal_loss, float32**, forward and backward, Triton\n\n{markdown_of(lines)}"


def score_spans_table(gpu: Gpu) -> str:
    lines = lines_of(
        list(SCORE_SHAPES),
        score_spans_stages,
        lambda shape: sum(stage.bytes for stage in score_spans_stages(shape)) / gpu.memory_bytes,
        gpu,
        unit="µs",
    )
    return (
        f"**score_spans, float32**, forward and backward, spans of up to 10, Triton\n\n{markdown_of(lines)}"
    )


def written(text: str, gpu: Gpu) -> str:
    """The document with its tables renewed between the marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables(gpu)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"renew the tables of {DOCS.name}")
    if parser.parse_args().write:
        DOCS.write_text(written(DOCS.read_text(), H200))
    else:
        print(tables(H200))


if __name__ == "__main__":
    main()
