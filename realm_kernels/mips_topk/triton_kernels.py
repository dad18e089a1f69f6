"""The Triton kernels of mips_topk: prepare, scan, select, rescore, shrink, finish, repair. triton.py launches
them.

Legend: B queries of one block, N rows of one piece of a shard, D width, G rows of a group, m groups selected,
U[b, g] upper bound of the canonical scores of query b in group g (README.md derives it), T = TOP keys kept a
query. Sizes that grow with a table are run-time arguments, so a growing table compiles nothing anew.
"""

import triton
import triton.language as tl

from .triton_keys import NOTHING, index_of, key_of, largest, merge_largest, value_of

# An error bound from here on says nothing, as the sums may have overflowed. Below it |q| |x| < 2^121, since
# the bound is at least 2^-21 of that: no partial sum reaches 2^128.
_OVERFLOW = tl.constexpr(2.0**100)
# A bound is three float32 operations, each off by at most 2^-24 of its result.
_ROUND_UP = tl.constexpr(1 + 2.0**-21)
# Squares below 2^-126 may vanish: D of them hide a norm of at most sqrt(D) * 2^-63.
_HIDDEN_NORM = tl.constexpr(2.0**-63)
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
LANES = tl.constexpr(8)  # of the canonical sum

INTERPRETED = triton.knobs.runtime.interpret  # set by TRITON_INTERPRET=1 before this module is imported


@triton.jit
def _to_tf32(x):
    """float32 rounded to the nearest tf32 (eleven significant bits), ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    return tl.where(tl.abs(x) < float("inf"), rounded, bits).to(tl.float32, bitcast=True)


@triton.jit
def prepare_kernel(
    queries,  # [B, D]
    scanned,  # [B, D_PADDED] queries in scan precision, zero beyond D
    slope,  # [B] float32, error bound for a row of norm 1
    offset,  # [B] float32, error bound for a row of norm 0
    left_out,  # [B] int64, key of the best group left out: none yet
    stride_b,
    stride_d,
    relative,  # bound of |s~ - q^.x| / (|q^| |x|)
    DIM: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Round each query to scan precision and bound what that and the scan may cost it: |s~ - s| <= slope |x|
    + offset.

    One program a query, norms in float64. Moves B * D * (query + scan bytes).
    """
    query = tl.program_id(0).to(tl.int64)
    rounded_square = tl.zeros([BLOCK_D], tl.float64)
    residual_square = tl.zeros([BLOCK_D], tl.float64)
    for start in range(0, D_PADDED, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q = tl.load(queries + query * stride_b + d.to(tl.int64) * stride_d, mask=d < DIM, other=0.0).to(
            tl.float32
        )
        if scanned.dtype.element_ty == tl.float32:
            rounded = _to_tf32(q)
        else:
            rounded = q.to(scanned.dtype.element_ty)
        tl.store(scanned + query * D_PADDED + d, rounded)
        rounded = rounded.to(tl.float32)
        # Equal infinities leave no residual, NaN leaves NaN.
        residual = tl.where(rounded == q, 0.0, q.to(tl.float64) - rounded.to(tl.float64))
        rounded_square += rounded.to(tl.float64) * rounded.to(tl.float64)
        residual_square += residual * residual
    norm = tl.sqrt(tl.sum(rounded_square, axis=0))
    residual_norm = tl.sqrt(tl.sum(residual_square, axis=0))
    # Hardware may flush inputs, products and sums below the smallest normal number; sqrt(D) <= D.
    flushed = DIM * _SMALLEST_NORMAL
    row_error = norm * relative + residual_norm + flushed
    own_error = norm * flushed + 2 * flushed
    is_zero = (norm == 0.0) & (residual_norm == 0.0)  # then every score is 0, exactly
    tl.store(slope + query, tl.where(is_zero, 0.0, row_error).to(tl.float32) * _ROUND_UP)
    tl.store(offset + query, tl.where(is_zero, 0.0, own_error).to(tl.float32) * _ROUND_UP)
    tl.store(left_out + query, NOTHING)


@triton.jit(do_not_specialize=["num_queries", "num_rows", "num_groups"])
def scan_kernel(
    scanned,  # [B, D_PADDED] queries in scan precision
    rows,  # [N, D]
    row_mask,  # [N] bool, or None
    group_max,  # [B, N / G] float32, largest s~ of the group's rows
    group_norm,  # [N / G] float32, at least the largest norm of the group's rows
    num_queries,
    num_rows,
    num_groups,
    stride_row,
    stride_d,
    stride_mask,
    norm_scale,  # 1 + what the float32 sum of D squares may lose, relative to the norm
    DIM: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UPCAST: tl.constexpr,  # Triton's interpreter takes bfloat16 for integers: multiply in float32 there
    STAGES: tl.constexpr,
):
    """Group maxima of the inner products in scan precision; the scores stay in registers.

    A program owns BLOCK_B queries and every num_programs(1)-th tile of BLOCK_N rows; programs of one tile and
    different queries have neighbouring ids, run together and share the tile in L2. Where D fits one block the
    queries stay in shared memory and tiles stream through STAGES buffers. Reads N * D once from memory,
    writes 4 * B * N / G. Limit: memory below about 200 flops a byte, the matrix rate above; a score costs one
    max and no more.
    """
    query = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    query_rows = scanned + query.to(tl.int64)[:, None] * D_PADDED  # [BLOCK_B, 1]
    is_query = (query < num_queries)[:, None]
    if D_PADDED == BLOCK_D:
        q = tl.load(query_rows + d[None, :], mask=is_query, other=0.0)  # [BLOCK_B, BLOCK_D]
    group_of_tile = tl.arange(0, BLOCK_N // GROUP)
    is_first = tl.program_id(0) == 0  # one program of each tile tells the norms
    for tile in tl.range(tl.program_id(1), tl.cdiv(num_rows, BLOCK_N), tl.num_programs(1), num_stages=STAGES):
        # Rows past the end repeat the last one, which changes no maximum.
        row = tl.minimum(tile * BLOCK_N + tl.arange(0, BLOCK_N), num_rows - 1).to(tl.int64)
        row_start = rows + row[:, None] * stride_row  # [BLOCK_N, 1]
        scores = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        square = tl.zeros([BLOCK_N], tl.float32)
        if D_PADDED == BLOCK_D:
            x = _load_columns(row_start, d, stride_d, DIM, BLOCK_D)
            scores = _add_products(scores, q, x, UPCAST)
            if is_first:
                square = _squares(x)
        else:
            for start in tl.range(0, D_PADDED, BLOCK_D, num_stages=STAGES):
                x = _load_columns(row_start, start + d, stride_d, DIM, BLOCK_D)
                q = tl.load(query_rows + start + d[None, :], mask=is_query, other=0.0)
                scores = _add_products(scores, q, x, UPCAST)
                if is_first:
                    square += _squares(x)
        if HAS_MASK:
            is_row = tl.load(row_mask + row * stride_mask) != 0
            scores = tl.where(is_row[None, :], scores, float("-inf"))
            square = tl.where(is_row, square, 0.0)
        square = tl.where(square < float("inf"), square, float("inf"))  # NaN too, lest a maximum drop it
        group = tile * (BLOCK_N // GROUP) + group_of_tile
        best = tl.max(tl.reshape(scores, [BLOCK_B, BLOCK_N // GROUP, GROUP]), axis=2)
        place = query.to(tl.int64)[:, None] * num_groups + group[None, :]
        tl.store(group_max + place, best, mask=is_query & (group < num_groups)[None, :])
        if is_first:
            most = tl.max(tl.reshape(square, [BLOCK_N // GROUP, GROUP]), axis=1)
            norm = tl.sqrt_rn(most) * norm_scale + DIM * _HIDDEN_NORM
            tl.store(group_norm + group, norm, mask=group < num_groups)


@triton.jit
def _load_columns(row_start, d, stride_d, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns d [BLOCK_D] of rows [BLOCK_N, 1], zero beyond D."""
    place = row_start + d.to(tl.int64)[None, :] * stride_d
    if DIM % BLOCK_D == 0:
        return tl.load(place)
    else:
        return tl.load(place, mask=d[None, :] < DIM, other=0.0)


@triton.jit
def _add_products(scores, q, x, UPCAST: tl.constexpr):
    """scores + q x^T in the precision of q; float32 operands in tf32."""
    if UPCAST:
        return tl.dot(q.to(tl.float32), tl.trans(x.to(tl.float32)), scores)
    else:
        return tl.dot(q, tl.trans(x.to(q.dtype)), scores)


@triton.jit
def _squares(x):
    x = x.to(tl.float32)
    return tl.sum(x * x, axis=1)


@triton.jit
def _upper_bound(group_max, group_norm, slope, offset):
    """U, float32: no canonical score of a row in the group is larger. +inf where nothing is known, -inf: no
    row."""
    error = (group_norm * slope + offset) * _ROUND_UP
    bound = tl.where(error < _OVERFLOW, group_max + error, float("inf"))  # NaN compares false
    return tl.where(
        slope == slope, bound, float("-inf")
    )  # the slope of a NaN query is NaN, and nothing is returned


@triton.jit
def _keep_largest(keys, best, left_out, TOP: tl.constexpr, NOTE: tl.constexpr):
    """Store the TOP largest of keys, descending; with NOTE, tell left_out the largest of the others."""
    top = largest(keys, TOP)
    tl.store(best + tl.arange(0, TOP), top)
    if NOTE:
        # The maximum of integers: the order in which programs arrive changes nothing.
        tl.atomic_max(left_out, tl.max(tl.where(keys < tl.min(top, axis=0), keys, NOTHING), axis=0))


@triton.jit(do_not_specialize=["num_groups"])
def select_kernel(
    group_max,  # [B, N / G] float32
    group_norm,  # [N / G] float32
    slope,  # [B] float32
    offset,  # [B] float32
    best,  # [B, parts, TOP] int64, keys of (U, group), descending in each part
    left_out,  # [B] int64, raised to the best key of those not kept
    num_groups,
    PART: tl.constexpr,
    TOP: tl.constexpr,
    KEEP: tl.constexpr,
):
    """KEEP groups of each part of PART, among them the TOP with the largest U; ties go to the smaller id.

    A program owns one query and one part, held in registers. With KEEP = TOP it sorts them. With more it
    filters: the TOP-th largest of the maxima of 2 * KEEP bins is a floor under the TOP-th largest U, and few
    more than TOP groups reach it (neighbours fall into different bins, so clusters spread). What does not fit
    into KEEP, and what shrink_kernel drops later, is left out and told, and at worst repaired. Reads 4 bytes
    a group and query, writes 8 * KEEP / PART. Limit: memory when filtering, about 15 instructions a group.
    """
    query, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = part * PART + tl.arange(0, PART)
    inside = group < num_groups
    maxima = tl.load(group_max + query * num_groups + group, mask=inside, other=float("-inf"))
    norms = tl.load(group_norm + group, mask=inside, other=0.0)
    bound = _upper_bound(maxima, norms, tl.load(slope + query), tl.load(offset + query))
    bound = tl.where(inside, bound, float("-inf"))
    keys = tl.where(bound > float("-inf"), key_of(bound, group), NOTHING)
    best += (query * tl.num_programs(1) + part) * KEEP
    if KEEP == TOP:
        _keep_largest(keys, best, left_out + query, TOP, True)
    else:
        bins = tl.max(tl.reshape(bound, [PART // (2 * KEEP), 2 * KEEP]), axis=0)
        floor = value_of(tl.min(largest(key_of(bins, tl.arange(0, 2 * KEEP)), TOP), axis=0))
        reaches = (bound >= floor) & (bound > float("-inf"))
        place = tl.cumsum(reaches.to(tl.int32), axis=0) - 1
        kept = reaches & (place < KEEP)
        tl.store(best + place, keys, mask=kept)
        rest = tl.arange(0, KEEP)
        tl.store(best + rest, NOTHING, mask=rest > tl.max(place, axis=0))
        tl.atomic_max(left_out + query, tl.max(tl.where(kept, NOTHING, keys), axis=0))


@triton.jit(do_not_specialize=["num_keys"])
def shrink_kernel(
    keys,  # [B, num_keys] int64
    best,  # [B, parts, TOP] int64
    left_out,  # [B] int64, with NOTE raised to the best key of those not kept
    flags,  # [B] int32
    num_keys,
    PART: tl.constexpr,
    TOP: tl.constexpr,
    NOTE: tl.constexpr,
    ONLY_FLAGGED: tl.constexpr,
):
    """The TOP largest of each part of PART keys: one round of a tournament. A program owns one query and one
    part."""
    query, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if ONLY_FLAGGED:  # noqa: SIM102, decided when the kernel is compiled
        if tl.load(flags + query) == 0:
            return
    place = part * PART + tl.arange(0, PART)
    block = tl.load(keys + query * num_keys + place, mask=place < num_keys, other=NOTHING)
    _keep_largest(block, best + (query * tl.num_programs(1) + part) * TOP, left_out + query, TOP, NOTE)


@triton.jit
def _canonical_keys(
    query,  # pointer, [D] of one query
    rows,  # pointer, [N, D]
    row_mask,  # pointer, [N] bool, or None
    exclude,  # pointer, [E] int64 of one query
    row,  # [R] int32
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
    start = rows + row.to(tl.int64)[:, None] * stride_row  # [R, 1]
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
    if HAS_MASK:
        is_row = is_row & (tl.load(row_mask + row.to(tl.int64) * stride_mask, mask=is_row, other=0) != 0)
    row_id = row.to(tl.int64) + first_row
    for e in range(num_excluded):
        is_row = is_row & (row_id != tl.load(exclude + e * stride_exclude))
    return tl.where(is_row, key_of(score, row), NOTHING)


@triton.jit(do_not_specialize=["num_rows", "first_row", "num_excluded", "num_positions", "first_position"])
def rescore_kernel(
    queries,  # [B, D]
    rows,  # [N, D]
    row_mask,  # [N] bool, or None
    exclude,  # [B, E] int64
    selected,  # [B, num_positions / G] int64 keys of (U, group); None: every row from first_position on
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
    found = _canonical_keys(
        queries + query * stride_query_b,
        rows,
        row_mask,
        exclude + query * stride_exclude_b,
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
    tl.store(keys + query * num_positions + position, found, mask=position < num_positions)


@triton.jit(do_not_specialize=["num_keys", "first_row", "k"])
def finish_kernel(
    keys,  # [B, num_keys] int64 keys of (canonical score, row)
    left_out,  # [B] int64 key of (U, group) of the best group left out
    flags,  # [B] int32: the certificate failed
    kth,  # [B] int64 key of the k-th row
    repairs,  # [1] int64, how many certificates failed
    scores,  # [B, k] float32
    indices,  # [B, k] int64
    num_keys,
    first_row,
    k,
    PART: tl.constexpr,
    TOP: tl.constexpr,
    GROUP: tl.constexpr,
    REPAIRED: tl.constexpr,
):
    """The k first rows of each query, and the certificate that no group left out can change them.

    A program owns one query, whose PART or fewer keys it sorts in registers. With REPAIRED it writes the rows
    of the flagged queries anew, and certifies nothing.
    """
    query = tl.program_id(0).to(tl.int64)
    if REPAIRED:  # noqa: SIM102, decided when the kernel is compiled
        if tl.load(flags + query) == 0:
            return
    place = tl.arange(0, PART)
    top = largest(tl.load(keys + query * num_keys + place, mask=place < num_keys, other=NOTHING), TOP)
    rank = tl.arange(0, TOP)
    tl.store(scores + query * k + rank, value_of(top), mask=rank < k)
    index = tl.where(top == NOTHING, -1, first_row + index_of(top).to(tl.int64))
    tl.store(indices + query * k + rank, index, mask=rank < k)
    if not REPAIRED:
        last = tl.max(tl.where(rank == k - 1, top, NOTHING), axis=0)
        left = tl.load(left_out + query)
        # A group cannot matter if U < tau, or if U = tau and all its ids are larger. High halves compare as
        # values, and that of NOTHING is below every value: too few rows, and any group left out may hold one.
        above = (left >> 32) > (last >> 32)
        before = index_of(left).to(tl.int64) * GROUP < index_of(last)
        failed = (left != NOTHING) & (above | (((left >> 32) == (last >> 32)) & before))
        tl.store(kth + query, last)
        tl.store(flags + query, failed.to(tl.int32))
        tl.atomic_add(repairs, failed.to(tl.int64))


@triton.jit(do_not_specialize=["num_rows", "num_groups", "first_row", "num_excluded"])
def repair_kernel(
    queries,  # [B, D]
    rows,  # [N, D]
    row_mask,  # [N] bool, or None
    exclude,  # [B, E] int64
    group_max,  # [B, N / G] float32
    group_norm,  # [N / G] float32
    slope,  # [B] float32
    offset,  # [B] float32
    flags,  # [B] int32
    kth,  # [B] int64 key of the k-th row so far
    best,  # [B, parts, TOP] int64
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
    DIM: tl.constexpr,
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
    slope, offset = tl.load(slope + query), tl.load(offset + query)
    group_max += query * num_groups
    parts = tl.num_programs(1)
    run = tl.cdiv(tl.cdiv(num_groups, parts), PART) * PART
    end = tl.minimum((part + 1) * run, num_groups)
    found = tl.full([TOP], NOTHING, tl.int64)
    for first in range(part * run, end, PART):
        several = first + tl.arange(0, PART)
        maxima = tl.load(group_max + several, mask=several < end, other=float("-inf"))
        norms = tl.load(group_norm + several, mask=several < end, other=0.0)
        bounds = _upper_bound(maxima, norms, slope, offset)
        bounds = tl.where(several < end, bounds, float("-inf"))
        if (tl.max(bounds, axis=0) >= tau) & (tl.max(bounds, axis=0) > float("-inf")):
            for group in range(first, tl.minimum(first + PART, end)):
                bound = _upper_bound(tl.load(group_max + group), tl.load(group_norm + group), slope, offset)
                if (bound >= tau) & (bound > float("-inf")):
                    row = group * GROUP + tl.arange(0, GROUP)
                    keys = _canonical_keys(
                        queries + query * stride_query_b,
                        rows,
                        row_mask,
                        exclude + query * stride_exclude_b,
                        row,
                        row < num_rows,
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
                    if tl.max(keys, axis=0) > tl.min(found, axis=0):
                        found = merge_largest(found, keys)
    tl.store(best + (query * parts + part) * TOP + tl.arange(0, TOP), found)
