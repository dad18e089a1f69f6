"""Triton kernels of mips_topk that score rows canonically: the rows of selected groups, and the repair.

The legend is in triton_scan.py.
"""

import triton
import triton.language as tl

from .triton_codes import row_bounds
from .triton_keys import NOTHING, index_of, key_of, merge_largest, value_of
from .triton_select import load_bounds, may_return

LANES = tl.constexpr(8)  # of the canonical sum


@triton.jit
def _canonical_keys(
    query,  # pointer, [D] of one query
    rows,  # pointer, [N, D]
    row_mask,  # pointer, [N] bool, or None
    exclude,  # pointer, [E] int64 of one query
    row,  # [R] int32
    place,  # [R] where in rows they lie
    is_row,  # [R] bool: which of them to look at
    first_row,
    num_excluded,
    stride_query_d,
    stride_row,
    stride_d,
    stride_mask,
    stride_exclude,
    DIM: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Keys of (canonical score, row) [R], NOTHING where the row may not be returned (design, section 4).

    Lane j sums the float64 products of d = j (mod 8) in increasing d. Products of two float32 are exact in
    float64, so a fused multiply-add gives the same bits.
    """
    lane = tl.arange(0, LANES)
    start = rows + place.to(tl.int64)[:, None] * stride_row  # [R, 1]
    p = tl.zeros([row.shape[0], LANES], tl.float64)
    # Sixteen steps in flight hide most of the latency of a gather.
    for first in tl.range(0, DIM, LANES, loop_unroll_factor=16):
        d = (first + lane).to(tl.int64)
        q = tl.load(query + d * stride_query_d, mask=d < DIM, other=0.0).to(tl.float32).to(tl.float64)
        x = tl.load(start + d[None, :] * stride_d, mask=is_row[:, None] & (d < DIM)[None, :], other=0.0)
        p += q[None, :] * x.to(tl.float32).to(tl.float64)
    # ((p0+p4)+(p2+p6)) + ((p1+p5)+(p3+p7)): halve over the bits of the lane, highest first.
    p = tl.sum(tl.reshape(p, [row.shape[0], 2, 2, 2]), axis=1)
    p = tl.sum(tl.sum(p, axis=1), axis=1)
    score = p.to(tl.float32) + 0.0  # [R], -0 becomes +0
    is_row = is_row & (score == score)
    is_row = may_return(
        row, is_row, row_mask, exclude, first_row, num_excluded, stride_mask, stride_exclude, HAS_MASK
    )
    return tl.where(is_row, key_of(score, row), NOTHING)


@triton.jit(do_not_specialize=["num_rows", "first_row", "num_excluded", "num_positions", "first_position"])
def rescore_kernel(
    queries,  # [B, D]
    rows,  # [N, D]
    row_mask,  # [N] bool, or None
    exclude,  # [B, E] int64
    selected,  # [B, num_positions / G] int64 keys of (U, group); None: every row from first_position on
    ceiling,  # [B] int64: only keys below it count; None: all
    keys,  # [B, num_positions] int64 keys of (canonical score, row)
    num_rows,
    first_row,
    num_excluded,
    num_positions,
    first_position,
    stride_query_b,
    stride_query_d,
    stride_row,
    stride_d,
    stride_mask,
    stride_exclude_b,
    stride_exclude,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SELECTED: tl.constexpr,
    STAGED: tl.constexpr,  # rows holds the rows of the positions, [B, num_positions, D]
):
    """Canonical scores of the rows of the selected groups.

    A program owns one query and BLOCK_R rows, a row a thread, eight float64 sums each. Reads D * row bytes
    and writes 8 bytes a row: B * m * G rows in all. Limit: the gather of whole groups, then the float64 rate.
    """
    query = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = position < num_positions
    if SELECTED:
        slot = query * (num_positions // GROUP) + position // GROUP
        chosen = tl.load(selected + slot, mask=is_row, other=NOTHING)
        is_row = chosen != NOTHING
        row = tl.where(is_row, index_of(chosen), 0) * GROUP + position % GROUP
    else:
        row = first_position + position
    is_row = is_row & (row < num_rows)
    place = query * num_positions + position if STAGED else row
    found = _canonical_keys(
        queries + query * stride_query_b,
        rows,
        row_mask,
        exclude + query * stride_exclude_b,
        row,
        place,
        is_row,
        first_row,
        num_excluded,
        stride_query_d,
        stride_row,
        stride_d,
        stride_mask,
        stride_exclude,
        DIM,
        HAS_MASK,
    )
    if ceiling is not None:
        found = tl.where(found < tl.load(ceiling + query), found, NOTHING)
    tl.store(keys + query * num_positions + position, found, mask=position < num_positions)


@triton.jit(do_not_specialize=["num_queries", "num_rows", "num_groups", "first_row", "num_excluded"])
def repair_kernel(
    queries,  # [B, D]
    rows,  # [N, D]
    row_mask,  # [N] bool, or None
    exclude,  # [B, E] int64
    terms,  # [5, B] float32, or None: rows have no codes
    codes,  # [N / G, G, D32] int8, or None
    bounds,  # [N / G, 3] float32, or None
    group_max,  # [B, N / G] float32
    group_norm,  # [N / G] float32, or None
    slope,  # [B] float32, or None
    offset,  # [B] float32, or None
    flags,  # [B] int32
    kth,  # [B] int64 key of the k-th row so far
    ceiling,  # [B] int64: only keys below it count; None: all
    best,  # [B, parts, TOP] int64
    num_queries,
    num_rows,
    num_groups,
    first_row,
    num_excluded,
    stride_query_b,
    stride_query_d,
    stride_row,
    stride_d,
    stride_mask,
    stride_exclude_b,
    stride_exclude,
    stride_code,
    float32_error,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
    TOP: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Rescore every group whose U reaches the k-th score so far, for the queries whose certificate failed.

    Always launched; without a flag a program reads four bytes and leaves. A program owns one query and one
    run of groups, looks at U of PART groups at a time, and keeps its TOP best rows in registers. Rows behind
    the k-th so far are dropped before sorting: where all scores are equal, that is nearly all. At most N * D
    row bytes a query.
    """
    query, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(flags + query) == 0:
        return
    last = tl.load(kth + query)
    tau = value_of(last)
    parts = tl.num_programs(1)
    run = tl.cdiv(tl.cdiv(num_groups, parts), PART) * PART
    end = tl.minimum((part + 1) * run, num_groups)
    found = tl.full([TOP], NOTHING, tl.int64)
    for first in range(part * run, end, PART):
        several = first + tl.arange(0, PART)
        uppers = load_bounds(group_max, group_norm, slope, offset, query, several, several < end, num_groups)
        if (tl.max(uppers, axis=0) >= tau) & (tl.max(uppers, axis=0) > float("-inf")):
            for group in range(first, tl.minimum(first + PART, end)):
                upper = load_bounds(
                    group_max, group_norm, slope, offset, query, group, group < end, num_groups
                )
                if (upper >= tau) & (upper > float("-inf")):
                    row = group * GROUP + tl.arange(0, GROUP)
                    is_row = row < num_rows
                    if codes is not None:  # read only the rows that their codes do not exclude
                        bound = row_bounds(
                            queries + query * stride_query_b,
                            terms + query,
                            codes,
                            bounds,
                            row,
                            is_row,
                            num_queries,
                            stride_query_d,
                            stride_code,
                            float32_error,
                            DIM,
                            BLOCK_D,
                            GROUP,
                        )
                        is_row = is_row & (bound >= tau)
                    keys = _canonical_keys(
                        queries + query * stride_query_b,
                        rows,
                        row_mask,
                        exclude + query * stride_exclude_b,
                        row,
                        row,
                        is_row,
                        first_row,
                        num_excluded,
                        stride_query_d,
                        stride_row,
                        stride_d,
                        stride_mask,
                        stride_exclude,
                        DIM,
                        HAS_MASK,
                    )
                    keys = tl.where(keys >= last, keys, NOTHING)
                    if ceiling is not None:
                        keys = tl.where(keys < tl.load(ceiling + query), keys, NOTHING)
                    if tl.max(keys, axis=0) > tl.min(found, axis=0):
                        found = merge_largest(found, keys)
    tl.store(best + (query * parts + part) * TOP + tl.arange(0, TOP), found)
