"""The Triton kernels of linear_marginal_loss: the passes over a chunk of logits between its matrix products.

Legend: V vocabulary, R rows of the chunk (pairs of document and token), S parts of the vocabulary. Logits
stand vocabulary first, [V, R] float32, R contiguous. What moves, in bytes a logit:

    statistics   read 4                one program a tile [BLOCK_V, BLOCK_R], held in registers
    combine      read 8 S / V, twice   one program BLOCK_R rows, S = V / BLOCK_V
    gradient     read 4, write 2 or 4  one program BLOCK_V words with all their rows, in place
    product      write 4               in the place of the library's product and of statistics, where forced

All sums have a fixed order; no atomics. triton.py launches them.
"""

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # set by TRITON_INTERPRET=1 before this module is imported

_INF = tl.constexpr(float("inf"))
# The interpreter's own conversion to bfloat16 truncates, and it multiplies bfloat16 as integers.
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _log1p(x):
    """log(1 + x) for x > -1. What rounding 1 + x loses, the quotient x / ((1 + x) - 1) gives back (Kahan)."""
    y = 1.0 + x
    exact = y == 1.0
    return tl.where(exact, x, tl.log(y) * (x / tl.where(exact, 1.0, y - 1.0)))


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0: the Taylor series, whose term x^9 / 9! is below 2^-24 of x, down to -1/2."""
    q = 1.0 / 40320.0 * x + 1.0 / 5040.0
    q = q * x + 1.0 / 720.0
    q = q * x + 1.0 / 120.0
    q = q * x + 1.0 / 24.0
    q = q * x + 1.0 / 6.0
    q = q * x + 0.5
    return tl.where(x > -0.5, x + q * (x * x), tl.exp(x) - 1.0)


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """float32 to the dtype of the products' operands, to nearest."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, rounded, bits | 0x400000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _tile(logits, bias, v, r, V, R):
    """Logits of words v and rows r with the bias, -inf outside: [BLOCK_V, BLOCK_R]."""
    inside = (v < V)[:, None] & (r < R)[None, :]
    x = tl.load(logits + v.to(tl.int64)[:, None] * R + r[None, :], mask=inside, other=-_INF)
    if bias is not None:
        x += tl.load(bias + v, mask=v < V, other=0.0)[:, None]
    return x


@triton.jit
def _store_part(x, axis: tl.constexpr, peaks, sums, part, r, R):
    """(max, sum of exp(x - max)) of rows r of one part, over the axis of its words; -inf is no part of it."""
    peak = tl.max(x, axis=axis)
    shift = tl.where(peak == -_INF, 0.0, peak)
    total = tl.sum(tl.exp(x - tl.expand_dims(shift, axis)), axis=axis)  # NaN stays in the sum
    place = part.to(tl.int64) * R + r
    tl.store(peaks + place, peak, mask=r < R)
    tl.store(sums + place, total, mask=r < R)


@triton.jit
def linear_marginal_loss_statistics_kernel(
    logits,  # [V, R] float32
    bias,  # [V] float32 or None
    targets,  # [R] int64, in [0, V)
    peaks,  # [S, R] float32, the largest logit of a part but the target's
    sums,  # [S, R] float32, sum over the part but the target of exp(logit - peak)
    V,
    R,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The (max, sum) pairs of one part of the vocabulary.

    The target is summed apart from the rest: log p = -log1p(rest / e) keeps its digits where p is near 1.
    The last words first: the product wrote them last, and some are still in the cache.
    """
    row_blocks = tl.cdiv(R, BLOCK_R)
    part = tl.cdiv(V, BLOCK_V) - 1 - tl.program_id(0) // row_blocks
    v = part * BLOCK_V + tl.arange(0, BLOCK_V)
    r = tl.program_id(0) % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < R
    x = _tile(logits, bias, v, r, V, R)
    target = tl.load(targets + r, mask=inside, other=-1).to(tl.int32)
    x = tl.where(v[:, None] == target[None, :], -_INF, x)
    _store_part(x, 0, peaks, sums, part, r, R)


@triton.jit
def _columns(matrix, row, h, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Columns h [BLOCK_H] of some rows of a matrix [-1, H], zero beyond H."""
    place = matrix + row.to(tl.int64)[:, None] * H + h[None, :]
    x = tl.load(place) if H % BLOCK_H == 0 else tl.load(place, mask=h[None, :] < H, other=0.0)
    return x.to(tl.float32) if _INTERPRETED else x


@triton.jit
def linear_marginal_loss_product_kernel(
    weight,  # [V, H]
    hidden,  # [R, H], of the same dtype
    bias,  # [V] float32
    targets,  # [R] int64, in [0, V) or beyond
    logits,  # [V, R] float32, with the bias
    peaks,  # [S, R] float32
    sums,  # [S, R] float32
    V,
    R,
    H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """logits = W hidden^T + b, and the (max, sum) pairs of statistics, made while a tile is in registers.

    A program owns a tile of BLOCK_V words, which are one part, and BLOCK_R rows. Rows stand on the axis of
    the instruction that is spread over lanes and warps, so a thread has a quarter of a row's words and a part
    costs two shuffles. GROUP parts go along the rows together, so that what runs at a time shares both
    operands in the L2; the first words last, where gradient begins.

    A tile fills half of the registers, and nothing of its size may live beside it: the bias goes into the
    logits, the target's place holds -inf until the tile is written, and then gets its logit back.
    """
    row_blocks = tl.cdiv(R, BLOCK_R)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    first = tile // (GROUP * row_blocks) * GROUP
    height = tl.minimum(tl.cdiv(V, BLOCK_V) - first, GROUP)
    part = first + tile % (GROUP * row_blocks) % height
    corner_v, corner_r = part * BLOCK_V, tile % (GROUP * row_blocks) // height * BLOCK_R
    in_v, in_r = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_R)
    v, r = corner_v + in_v, corner_r + in_r
    x = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for start in tl.range(0, H, BLOCK_H, num_stages=STAGES):
        h = start + tl.arange(0, BLOCK_H)
        # Past the end the last word and the last row are read again; neither is told.
        rows = _columns(hidden, tl.minimum(r, R - 1), h, H, BLOCK_H)
        words = _columns(weight, tl.minimum(v, V - 1), h, H, BLOCK_H)
        x = tl.dot(rows, tl.trans(words), x, input_precision="ieee")

    x += tl.load(bias + v, mask=v < V, other=-_INF)[None, :]
    target = tl.load(targets + r, mask=r < R, other=-1)
    is_target = v[None, :] == target.to(tl.int32)[:, None]
    logit = tl.sum(tl.where(is_target, x, 0.0), axis=1)
    x = tl.where(is_target, -_INF, x)
    _store_part(x, 1, peaks, sums, part, r, R)
    # From the corner 32 bits suffice: a chunk has at most 2^26 logits, or one row.
    corner = logits + corner_v.to(tl.int64) * R + corner_r
    inside = (r < R)[:, None] & (v < V)[None, :]
    tl.store(corner + (in_v[None, :] * R + in_r[:, None]), x, mask=inside)
    tl.debug_barrier()  # the place of a target was written by another thread
    here = (target >= corner_v) & (target < tl.minimum(corner_v + BLOCK_V, V))
    tl.store(logits + target * R + r, logit, mask=here)


@triton.jit
def _parts(pointer, start, r, R, S, other, BLOCK_S: tl.constexpr):
    s = start + tl.arange(0, BLOCK_S)
    there = (s < S)[:, None] & (r < R)[None, :]
    return tl.load(pointer + s.to(tl.int64)[:, None] * R + r[None, :], mask=there, other=other)


@triton.jit
def linear_marginal_loss_combine_kernel(
    logits,  # [V, R] float32
    bias,  # [V] float32 or None
    targets,  # [R] int64, in [0, V)
    peaks,  # [S, R] float32
    sums,  # [S, R] float32
    log_p,  # [R] float64, log softmax at the target
    total,  # [R] float64, sum over V of exp(logit - largest)
    largest,  # [R] float32, of the logits; 0 where all are -inf
    R,
    S,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The statistics of rows from those of their parts, in float64: few numbers, on which all hangs."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < R
    target = tl.load(targets + r, mask=inside, other=0)
    logit = tl.load(logits + target * R + r, mask=inside, other=0.0)
    if bias is not None:
        logit += tl.load(bias + target, mask=inside, other=0.0)

    tops = tl.full([BLOCK_S, BLOCK_R], -_INF, tl.float32)
    for start in range(0, S, BLOCK_S):
        tops = tl.maximum(tops, _parts(peaks, start, r, R, S, -_INF, BLOCK_S))
    peak = tl.maximum(tl.max(tops, axis=0), logit)
    peak = tl.where(peak == -_INF, 0.0, peak)
    rests = tl.zeros([BLOCK_S, BLOCK_R], tl.float64)
    for start in range(0, S, BLOCK_S):
        below = _parts(peaks, start, r, R, S, -_INF, BLOCK_S).to(tl.float64) - peak.to(tl.float64)[None, :]
        rests += _parts(sums, start, r, R, S, 0.0, BLOCK_S).to(tl.float64) * tl.exp(below)
    rest = tl.sum(rests, axis=0)

    distance = logit.to(tl.float64) - peak.to(tl.float64)
    e = tl.exp(distance)
    near = rest < e
    q_near = -_log1p(tl.where(near, rest / tl.where(near, e, 1.0), 0.0))
    q = tl.where(near, q_near, distance - tl.log(tl.where(near, 1.0, e + rest)))
    tl.store(log_p + r, q, mask=inside)
    tl.store(total + r, e + rest, mask=inside)
    tl.store(largest + r, peak, mask=inside)


@triton.jit
def linear_marginal_loss_gradient_kernel(
    logits,  # [V, R] float32
    d_logits,  # the same memory, [V, R] of pitch PITCH * R
    bias,  # [V] float32 or None
    d_bias,  # [V] float32, added to, or None
    targets,  # [R] int64, in [0, V)
    log_p,  # [R] float64
    total,  # [R] float64
    largest,  # [R] float32
    factor,  # [R] float64, the upstream gradient times the posterior
    V,
    R,
    PITCH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """d_logits = factor (p - onehot(target)), over the logits; d_bias += its sum over rows.

    Half precision takes the first half of the bytes of each word's logits. A program owns its words whole and
    writes columns [r, r + BLOCK_R) where it read columns from r / 2 on: all of its threads have read by then.
    """
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    by_word = tl.zeros([BLOCK_V, BLOCK_R], tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = r < R
        x = _tile(logits, bias, v, r, V, R)
        weight = tl.load(factor + r, mask=inside, other=0.0).to(tl.float32)
        slope = weight / tl.load(total + r, mask=inside, other=1.0).to(tl.float32)
        peak = weight * _expm1(tl.load(log_p + r, mask=inside, other=0.0).to(tl.float32))
        target = tl.load(targets + r, mask=inside, other=-1).to(tl.int32)
        d = tl.exp(x - tl.load(largest + r, mask=inside, other=0.0)[None, :]) * slope[None, :]
        d = tl.where(v[:, None] == target[None, :], peak[None, :], d)
        # Selected, not multiplied: the logits of a row without a part may be infinite.
        d = tl.where((weight != 0)[None, :], d, 0.0)
        if d_bias is not None:
            by_word += d
        if PITCH > 1:
            tl.debug_barrier()
        place = v.to(tl.int64)[:, None] * (R * PITCH) + r[None, :]
        there = (v < V)[:, None] & inside[None, :]
        tl.store(d_logits + place, _narrow(d, d_logits.dtype.element_ty), mask=there)
    if d_bias is not None:
        sum_of_rows = tl.load(d_bias + v, mask=v < V, other=0.0) + tl.sum(by_word, axis=1)
        tl.store(d_bias + v, sum_of_rows, mask=v < V)
