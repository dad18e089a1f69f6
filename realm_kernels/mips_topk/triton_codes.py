"""Triton kernels of mips_topk over int8 codes: queries encoded, group bounds, and a closer look at rows.

A row is x = mean + s c + e and a query q = t d + f, with integers c and d of eight bits, so

    q.x = q.mean + s t (d.c) + s (f.c) + q.e,    |s (f.c) + q.e| <= ||f|| X + ||q|| E

for X >= s ||c|| and E >= ||e|| of every row of a group (README.md derives the terms for rounding). d.c is an
integer and exact, so a group's bound is formed once from its largest one. The legend is in triton_scan.py.
"""

import triton
import triton.language as tl

from .triton_keys import NOTHING, index_of, key_of
from .triton_select import OVERFLOW, ROUND_UP, may_return

_SMALLEST_STEP = tl.constexpr(2.0**-60)
_SMALLEST_BOUND = tl.constexpr(2.0**-126)
_ABSOLUTE = tl.constexpr(2.0**-140)  # what ten operations lose below the normal numbers
_RELATIVE = tl.constexpr(2.0**-21)  # what float32 loses of q.mean and of the product, in all operations
_LEAST = tl.constexpr(-(2**31))


@triton.jit
def _float32_up(value):
    """float32, no smaller than the float64 value >= 0, and zero or normal."""
    return tl.where(value > 0, tl.maximum(value * (1 + 2.0**-20), _SMALLEST_BOUND), value).to(tl.float32)


@triton.jit
def prepare_codes_kernel(
    queries,  # [B, D]
    mean,  # [D] float32
    scanned,  # [B, D_PADDED] int8 codes d of the queries, zero beyond D
    terms,  # [5, B] float32
    left_out,  # [B] int64, key of the best group left out: none yet
    num_queries,
    stride_b,
    stride_d,
    float64_error,  # what a float64 sum of D products may lose, of the norms
    DIM: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Encode each query, and bound what that costs. One program a query, sums in float64."""
    query = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, D_PADDED, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        place = queries + query * stride_b + d.to(tl.int64) * stride_d
        q = tl.load(place, mask=d < DIM, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(q))
    step = tl.max(largest, axis=0) / 127
    step = tl.where(step < float("inf"), tl.maximum(step, _SMALLEST_STEP), 1.0)
    square = tl.zeros([BLOCK_D], tl.float64)
    residual_square = tl.zeros([BLOCK_D], tl.float64)
    mean_square = tl.zeros([BLOCK_D], tl.float64)
    centre = tl.zeros([BLOCK_D], tl.float64)
    for start in range(0, D_PADDED, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        place = queries + query * stride_b + d.to(tl.int64) * stride_d
        q = tl.load(place, mask=d < DIM, other=0.0).to(tl.float32)
        m = tl.load(mean + d, mask=d < DIM, other=0.0).to(tl.float64)
        # Any integer will do, as the residual is what it leaves; what is not finite is not bounded.
        code = q / step
        code = (code + tl.where(code < 0, -0.5, 0.5)).to(tl.int32).to(tl.float32)
        code = tl.where(tl.abs(code) <= 127, code, 0.0)
        tl.store(scanned + query * D_PADDED + d, code.to(tl.int8))
        residual = q.to(tl.float64) - step.to(tl.float64) * code.to(tl.float64)
        square += q.to(tl.float64) * q.to(tl.float64)
        residual_square += residual * residual
        mean_square += m * m
        centre += q.to(tl.float64) * m
    norm = tl.sqrt(tl.sum(square, axis=0))
    residual_norm = tl.sqrt(tl.sum(residual_square, axis=0))
    mean_norm = tl.sqrt(tl.sum(mean_square, axis=0))
    centre = tl.sum(centre, axis=0)
    own_error = 2 * float64_error * norm * mean_norm + _RELATIVE * tl.abs(centre) + _ABSOLUTE
    own_error = tl.where(norm == 0.0, 0.0, own_error)  # then every score is 0, exactly
    terms += query
    tl.store(terms, step)
    tl.store(terms + num_queries, centre.to(tl.float32))
    tl.store(terms + 2 * num_queries, _float32_up(residual_norm + float64_error * norm))
    tl.store(terms + 3 * num_queries, _float32_up(norm * (1 + float64_error)))
    tl.store(terms + 4 * num_queries, _float32_up(own_error))
    tl.store(left_out + query, NOTHING)


@triton.jit
def _bound(product, error, centre, norm):
    """U >= centre + product + what they stand for; +inf where nothing is known, -inf for a NaN query."""
    error = (error + _RELATIVE * tl.abs(product)) * ROUND_UP
    # Below 2^100 no sum here can reach 2^128: the error is at least 2^-21 of it. NaN compares false.
    bound = tl.where(error < OVERFLOW, (centre + product) + error, float("inf"))
    return tl.where(norm == norm, bound, float("-inf"))


@triton.jit(do_not_specialize=["num_queries", "num_rows", "num_groups"])
def scan_codes_kernel(
    scanned,  # [B, D_PADDED] int8 codes of the queries
    terms,  # [5, B] float32
    codes,  # [N / G, G, D32] int8
    bounds,  # [N / G, 3] float32: s, E, X
    row_mask,  # [N] bool, or None
    group_max,  # [B, N / G] float32: U
    num_queries,
    num_rows,
    num_groups,
    stride_row,  # D32
    stride_mask,
    D_PADDED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Upper bounds U of the canonical scores of each group, from integers alone.

    Programs, tiles and order as in scan_kernel. A score costs one integer maximum; ten operations more make
    the bound of a group. Reads N * D bytes once from memory, writes 4 * B * N / G.
    """
    query = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    query_rows = scanned + query.to(tl.int64)[:, None] * D_PADDED  # [BLOCK_B, 1]
    is_query = query < num_queries
    if D_PADDED == BLOCK_D:
        q = tl.load(query_rows + d[None, :], mask=is_query[:, None], other=0)
    step = tl.load(terms + query, mask=is_query, other=0.0)[:, None]
    centre = tl.load(terms + num_queries + query, mask=is_query, other=0.0)[:, None]
    of_norm = tl.load(terms + 2 * num_queries + query, mask=is_query, other=0.0)[:, None]
    of_residual = tl.load(terms + 3 * num_queries + query, mask=is_query, other=0.0)[:, None]
    own_error = tl.load(terms + 4 * num_queries + query, mask=is_query, other=0.0)[:, None]
    group_of_tile = tl.arange(0, BLOCK_N // GROUP)
    for tile in tl.range(tl.program_id(1), tl.cdiv(num_rows, BLOCK_N), tl.num_programs(1), num_stages=STAGES):
        # Past the last group its last row again; what pads the group has codes 0, and only loosens it.
        row = tl.minimum(tile * BLOCK_N + tl.arange(0, BLOCK_N), num_groups * GROUP - 1)
        row_start = codes + row.to(tl.int64)[:, None] * stride_row
        products = tl.zeros([BLOCK_B, BLOCK_N], tl.int32)
        if D_PADDED == BLOCK_D:
            products = tl.dot(q, tl.trans(tl.load(row_start + d[None, :])), products, out_dtype=tl.int32)
        else:
            for start in tl.range(0, D_PADDED, BLOCK_D, num_stages=STAGES):
                x = tl.load(row_start + start + d[None, :])
                q = tl.load(query_rows + start + d[None, :], mask=is_query[:, None], other=0)
                products = tl.dot(q, tl.trans(x), products, out_dtype=tl.int32)
        if HAS_MASK:
            mask_row = row.to(tl.int64) * stride_mask
            is_row = tl.load(row_mask + mask_row, mask=row < num_rows, other=0) != 0
            products = tl.where(is_row[None, :], products, _LEAST)
        best = tl.max(tl.reshape(products, [BLOCK_B, BLOCK_N // GROUP, GROUP]), axis=2)
        group = tile * (BLOCK_N // GROUP) + group_of_tile
        is_group = group < num_groups
        scale = tl.load(bounds + 3 * group, mask=is_group, other=0.0)[None, :]
        residual = tl.load(bounds + 3 * group + 1, mask=is_group, other=0.0)[None, :]
        norm = tl.load(bounds + 3 * group + 2, mask=is_group, other=0.0)[None, :]
        error = of_norm * norm + of_residual * residual + own_error
        bound = _bound(step * (scale * best.to(tl.float32)), error, centre, of_residual)
        if HAS_MASK:
            bound = tl.where(best == _LEAST, float("-inf"), bound)
        place = query.to(tl.int64)[:, None] * num_groups + group[None, :]
        tl.store(group_max + place, bound, mask=is_query[:, None] & is_group[None, :])


@triton.jit
def row_bounds(
    query,  # pointer, [D] of one query
    terms,  # pointer, [5] of one query, num_queries apart
    codes,  # pointer, [N / G, G, D32] int8
    bounds,  # pointer, [N / G, 3] float32
    row,  # [R] int32
    is_row,  # [R] bool
    num_queries,
    stride_query_d,
    stride_code,
    float32_error,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Upper bounds [R] of the canonical scores of rows, from their codes and the query as it is."""
    start = codes + row.to(tl.int64)[:, None] * stride_code  # [R, 1]
    total = tl.zeros([row.shape[0]], tl.float32)
    for first in range(0, DIM, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        q = tl.load(query + d.to(tl.int64) * stride_query_d, mask=d < DIM, other=0.0).to(tl.float32)
        inside = is_row[:, None] & (d < DIM)[None, :]
        c = tl.load(start + d[None, :], mask=inside, other=0).to(tl.float32)
        total += tl.sum(c * q[None, :], axis=1)
    group = row // GROUP
    scale = tl.load(bounds + 3 * group, mask=is_row, other=0.0)
    residual = tl.load(bounds + 3 * group + 1, mask=is_row, other=0.0)
    norm = tl.load(bounds + 3 * group + 2, mask=is_row, other=0.0)
    query_norm = tl.load(terms + 3 * num_queries)
    error = query_norm * (float32_error * norm + residual) + tl.load(terms + 4 * num_queries)
    bound = _bound(scale * total, error, tl.load(terms + num_queries), query_norm)
    # Sums of float32 products may overflow where the bound of their error does not.
    return tl.where((tl.abs(total) < float("inf")) | (bound == float("-inf")), bound, float("inf"))


@triton.jit(do_not_specialize=["num_queries", "num_rows", "first_row", "num_excluded", "num_positions"])
def refine_kernel(
    queries,  # [B, D]
    terms,  # [5, B] float32
    codes,  # [N / G, G, D32] int8
    bounds,  # [N / G, 3] float32
    row_mask,  # [N] bool, or None
    exclude,  # [B, E] int64
    selected,  # [B, m] int64 keys of (U, group)
    keys,  # [B, m * G] int64 keys of (U of the row, row)
    num_queries,
    num_rows,
    first_row,
    num_excluded,
    num_positions,
    stride_query_b,
    stride_query_d,
    stride_code,
    stride_mask,
    stride_exclude_b,
    stride_exclude,
    float32_error,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Upper bounds of the rows of the selected groups, so that few need to be read themselves.

    A program owns one query and BLOCK_R rows. Without the query's rounding a row's bound is about half as
    loose as its group's, and most rows of a group are far below the best: of m * G rows some 2 k are left.
    Reads D and writes 8 bytes a row.
    """
    query = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = position < num_positions
    slot = query * (num_positions // GROUP) + position // GROUP
    chosen = tl.load(selected + slot, mask=is_row, other=NOTHING)
    is_row = is_row & (chosen != NOTHING)
    row = tl.where(is_row, index_of(chosen), 0) * GROUP + position % GROUP
    is_row = is_row & (row < num_rows)
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
    is_row = may_return(
        row,
        is_row & (bound > float("-inf")),
        row_mask,
        exclude + query * stride_exclude_b,
        first_row,
        num_excluded,
        stride_mask,
        stride_exclude,
        HAS_MASK,
    )
    found = tl.where(is_row, key_of(bound, row), NOTHING)
    tl.store(keys + query * num_positions + position, found, mask=position < num_positions)
