"""Triton kernels of mips_topk, the scan: queries prepared, group maxima and norms of the rows.

Legend of all kernels: B queries of one block, N rows of one piece of a shard, D width, G rows of a group,
m groups selected, U[b, g] upper bound of the canonical scores of query b in group g (README.md derives it).
Sizes that grow with a table are run-time arguments, so a growing table compiles nothing anew.
"""

import triton
import triton.language as tl

from .triton_keys import NOTHING

# Squares below 2^-126 may vanish: D of them hide a norm of at most sqrt(D) * 2^-63.
_HIDDEN_NORM = tl.constexpr(2.0**-63)
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
_ROUND_UP = tl.constexpr(1 + 2.0**-21)  # a conversion to float32 is off by at most 2^-24

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
    """Round each query to scan precision, and bound what that costs: |s~ - s| <= slope |x| + offset.

    One program a query, norms in float64. Moves B * D * (query + scan bytes).
    """
    query = tl.program_id(0).to(tl.int64)
    rounded_square = tl.zeros([BLOCK_D], tl.float64)
    residual_square = tl.zeros([BLOCK_D], tl.float64)
    for start in range(0, D_PADDED, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        place = queries + query * stride_b + d.to(tl.int64) * stride_d
        q = tl.load(place, mask=d < DIM, other=0.0).to(tl.float32)
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
    norm_scale,  # 1 + what rounded squares and their sum may lose, relative to the norm
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
    max and no more, an element of a row half an instruction for its norm.
    """
    query = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    query_rows = scanned + query.to(tl.int64)[:, None] * D_PADDED  # [BLOCK_B, 1]
    is_query = (query < num_queries)[:, None]
    if D_PADDED == BLOCK_D:
        q = tl.load(query_rows + d[None, :], mask=is_query, other=0.0)  # [BLOCK_B, BLOCK_D]
    group_of_tile = tl.arange(0, BLOCK_N // GROUP)
    for tile in tl.range(tl.program_id(1), tl.cdiv(num_rows, BLOCK_N), tl.num_programs(1), num_stages=STAGES):
        # Rows past the end repeat the last one, which changes no maximum.
        row = tl.minimum(tile * BLOCK_N + tl.arange(0, BLOCK_N), num_rows - 1).to(tl.int64)
        row_start = rows + row[:, None] * stride_row  # [BLOCK_N, 1]
        # One program of each tile tells the norms, in turn.
        is_first = tile % tl.num_programs(0) == tl.program_id(0)
        scores = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        square = tl.zeros([BLOCK_N], tl.float32)
        if D_PADDED == BLOCK_D:
            x = _load_columns(row_start, d, stride_d, DIM, BLOCK_D)
            scores = _add_products(scores, q, x, UPCAST)
            if is_first:
                square = _squares(x, UPCAST)
        else:
            for start in tl.range(0, D_PADDED, BLOCK_D, num_stages=STAGES):
                x = _load_columns(row_start, start + d, stride_d, DIM, BLOCK_D)
                q = tl.load(query_rows + start + d[None, :], mask=is_query, other=0.0)
                scores = _add_products(scores, q, x, UPCAST)
                if is_first:
                    square += _squares(x, UPCAST)
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
def _squares(x, UPCAST: tl.constexpr):
    """Squared norms [BLOCK_N], a little rounded, by the tensor core: with ones, every column is the sum.

    An instruction squares two numbers and the sums cost no more; by lanes and shuffles norms cost more than
    the maxima of 128 queries. float16 squares would overflow: they are formed in bfloat16, too.
    """
    if UPCAST:
        x = x.to(tl.float32)
    elif x.dtype == tl.float16:
        x = x.to(tl.bfloat16)
    ones = tl.full([x.shape[1], 16], 1.0, x.dtype)
    return tl.max(tl.dot(x * x, ones), axis=1)
