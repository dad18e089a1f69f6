"""The Triton kernels of score_spans. triton.py launches them.

Legend: N joins, T wordpieces, S width of a representation, C spans: those of one wordpiece by their start,
then those of two, ... A program holds BLOCK_T wordpieces of a join in registers, PARTS x PART numbers each,
and meets, one width of spans after the other, the wordpieces that end (or begin) their spans: a row comes
from memory once and, for each further width, from the first-level cache. No representation leaves the
registers.

Forward: the wordpieces are starts. A number of a representation is an addition, a maximum and a term of the
mean; then, centred, a term of the variance and one of the product with v: 10 instructions with all that goes
with it. Mean first, then the variance about it, as the representation is still at hand.

Backward: mean, deviation and score of a span are known, so that a column needs no other, and nothing is
reduced but d_v. One program gathers for its wordpieces as starts, another as ends: each makes the gradient of
a representation anew, 17 instructions a number for the two, and writes every row once, in a fixed order.
"""

import triton
import triton.language as tl

from ..marginal_loss.triton_kernels import _store


@triton.jit
def _places(first, stride_t, T, BLOCK_T: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
    """Where rows first, first + 1, ... of a half lie, and their columns: [PARTS BLOCK_T, PART], part by part.

    Of rows that are none, the nearest. Two axes, so that every Triton gives the threads of a warp to rows."""
    row = tl.arange(0, PARTS * BLOCK_T)
    t = tl.minimum(tl.maximum(first + row % BLOCK_T, 0), T - 1)
    s = (row // BLOCK_T * PART)[:, None] + tl.arange(0, PART)[None, :]
    return t.to(tl.int64)[:, None] * stride_t + s, s


@triton.jit
def _rows(
    half, first, stride_t, T, S: tl.constexpr, BLOCK_T: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr
):
    """Rows first, first + 1, ... of a half, float32 [PARTS, BLOCK_T, PART]."""
    place, s = _places(first, stride_t, T, BLOCK_T, PARTS, PART)
    if S == PARTS * PART:
        x = tl.load(half + place)
    else:
        x = tl.load(half + place, mask=s < S, other=0.0)
    return tl.reshape(x.to(tl.float32), [PARTS, BLOCK_T, PART])


@triton.jit
def _sum(x):
    """Of each row: over the parts, which one thread has, then across the few threads of a part."""
    return tl.sum(tl.sum(x, axis=0), axis=1)


@triton.jit
def _relu(x):
    """NaN stays NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tile(T, BLOCK_T: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
    """The join of this program, its first wordpiece, all columns [PARTS, PART], how many joins there are."""
    tiles = tl.cdiv(T, BLOCK_T)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    s = tl.arange(0, PARTS)[:, None] * PART + tl.arange(0, PART)[None, :]
    return n, tl.program_id(0) % tiles * BLOCK_T, s, (tl.num_programs(0) // tiles).to(tl.int64)


@triton.jit
def score_spans_fwd_kernel(
    start,  # [N, T, S], with the strides below, contiguous along S
    end,  # [N, T, S]
    v,  # [S], of sum 0
    scores,  # [N, C]
    moments,  # [2, N, C], mean and reciprocal deviation
    T,
    C,
    max_width,
    start_stride_n,
    start_stride_t,
    end_stride_n,
    end_stride_t,
    eps,
    S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """The spans that begin at BLOCK_T wordpieces of one join."""
    n, first, s, N = _tile(T, BLOCK_T, PARTS, PART)
    t = first + tl.arange(0, BLOCK_T)
    weight = tl.load(v + s, mask=s < S, other=0.0)[:, None, :]
    ends = end + n * end_stride_n
    begins = _rows(start + n * start_stride_n, first, start_stride_t, T, S, BLOCK_T, PARTS, PART)
    spans = n * C  # the first of width w
    for w in range(0, max_width):
        x = _relu(begins + _rows(ends, first + w, end_stride_t, T, S, BLOCK_T, PARTS, PART))
        mean = _sum(x) * (1.0 / S)
        x -= mean[None, :, None]
        if S != PARTS * PART:
            x = tl.where((s < S)[:, None, :], x, 0.0)
        rstd = 1.0 / tl.sqrt_rn(_sum(x * x) * (1.0 / S) + eps)
        place, there = spans + t, t + w < T
        tl.store(scores + place, _sum(x * weight) * rstd, mask=there)
        tl.store(moments + place, mean, mask=there)
        tl.store(moments + N * C + place, rstd, mask=there)
        spans += T - w


@triton.jit
def _gather(
    own,  # a join's half whose rows the program gathers for
    other,  # its other half
    v,
    d_scores,  # where the join's spans begin; the next three as well
    scores,
    means,
    rstds,
    first,
    s,
    T,
    max_width,
    own_stride,
    other_stride,
    STEP: tl.constexpr,
    S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """The gradients of rows first, first + 1, ... and that of v by their spans: [PARTS, BLOCK_T, PART] each.

    STEP: 1 where the rows are starts, -1 where they are ends, which leave d_v alone. What the caller drops
    the compiler does not make."""
    weight = tl.load(v + s, mask=s < S, other=0.0)[:, None, :]
    t = first + tl.arange(0, BLOCK_T)
    rows = _rows(own, first, own_stride, T, S, BLOCK_T, PARTS, PART)
    d_rows = tl.zeros(rows.shape, tl.float32)
    d_v = tl.zeros(rows.shape, tl.float32)
    spans = 0  # the first of width w
    for w in range(0, max_width):
        met = t + STEP * w
        place = spans + tl.minimum(t, met)  # a span's place is that of its start
        there = (t < T) & (met >= 0) & (met < T)
        g = tl.load(d_scores + place, mask=there, other=0.0)
        # What a span without upstream holds is not looked at, NaN included.
        live = g != 0
        mean = tl.load(means + place, mask=live, other=0.0)[None, :, None]
        rstd = tl.load(rstds + place, mask=live, other=0.0)
        score = tl.load(scores + place, mask=live, other=0.0)
        scale = (g * rstd)[None, :, None]
        pull = (g * rstd * rstd * (score * (-1.0 / S)))[None, :, None]
        live = live[None, :, None]
        x = rows + _rows(other, first + STEP * w, other_stride, T, S, BLOCK_T, PARTS, PART)
        passes = live & ((x <= 0) == 0)  # ReLU, and NaN
        if STEP == 1:
            x = _relu(x)  # only what passes matters to d_rows
        centred = x - mean
        pulled = tl.fma(pull, centred, tl.fma(scale, weight, d_rows))
        d_rows = tl.where(passes, pulled, d_rows)
        if STEP == 1:
            d_v = tl.where(live, tl.fma(scale, centred, d_v), d_v)
        spans += T - w
    return d_rows, d_v


@triton.jit
def score_spans_bwd_kernel(
    start,  # [N, T, S], with the strides below, contiguous along S
    end,  # [N, T, S]
    v,  # [S], of sum 0
    d_scores,  # [N, C]
    scores,  # [N, C]
    moments,  # [2, N, C]
    d_start,  # [N, T, S], contiguous, or None
    d_end,  # [N, T, S], contiguous, or None
    d_v,  # [programs along axis 0, S], to be summed, or None
    T,
    C,
    max_width,
    start_stride_n,
    start_stride_t,
    end_stride_n,
    end_stride_t,
    S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """Rows of d_start and their spans' share of d_v; on the second axis of the grid, rows of d_end.

    The axis has one place where one of these is not wanted."""
    STARTS: tl.constexpr = d_start is not None or d_v is not None
    ENDS: tl.constexpr = d_end is not None
    n, first, s, N = _tile(T, BLOCK_T, PARTS, PART)
    starts, ends = start + n * start_stride_n, end + n * end_stride_n
    d_scores, scores, means = d_scores + n * C, scores + n * C, moments + n * C
    rstds = means + N * C
    place, column = _places(first, S, T, BLOCK_T, PARTS, PART)
    place += n * T * S
    there = first + tl.arange(0, PARTS * BLOCK_T) % BLOCK_T < T
    mask = there[:, None] & (column < S)
    if STARTS:  # noqa: SIM102, decided when the kernel is compiled
        if tl.program_id(1) == 0:
            d_rows, d_weight = _gather(
                starts, ends, v, d_scores, scores, means, rstds, first, s, T, max_width,
                start_stride_t, end_stride_t, 1, S, BLOCK_T, PARTS, PART,
            )  # fmt: skip
            if d_start is not None:
                _store(d_start + place, tl.reshape(d_rows, place.shape), mask)
            if d_v is not None:
                own = d_v + tl.program_id(0).to(tl.int64) * S
                tl.store(own + s, tl.sum(d_weight, axis=1), mask=s < S)
    if ENDS:  # noqa: SIM102
        if tl.program_id(1) == tl.num_programs(1) - 1:
            d_rows, _ = _gather(
                ends, starts, v, d_scores, scores, means, rstds, first, s, T, max_width,
                end_stride_t, start_stride_t, -1, S, BLOCK_T, PARTS, PART,
            )  # fmt: skip
            _store(d_end + place, tl.reshape(d_rows, place.shape), mask)
