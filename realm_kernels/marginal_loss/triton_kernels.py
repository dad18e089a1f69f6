"""The Triton kernels of marginal_loss: one program an example, forward and backward. triton.py launches them.

Legend: B examples, K documents, M tokens. A column is what one document is drawn for: a token in mode
"token", the whole sequence otherwise. A program walks its example in tiles [BLOCK_K, BLOCK_M] of float64:
over the documents for their best, for the sum about it, and in the backward for the result. Where all
documents fit one tile, as with any K that is trained with, K_END = BLOCK_K folds these loops and a tile is
read once. The formulas are those of `marginal` in reference.py, where they are explained.

The inputs of the prior travel as (scores, log_weight, doc_mask, where the example's row begins), those of
the likelihood as (log_likelihood at the example, token_mask, where the example's row of it begins,
stride_k, stride_m); the normaliser of the prior is (largest relevance, log of the sum above it).
"""

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # set by TRITON_INTERPRET=1 before this module is imported

_INF = tl.constexpr(float("inf"))


@triton.jit
def _wide(x):
    """Any float to float64. Via float32: the interpreter takes bfloat16 for an integer elsewhere."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32).to(tl.float64)


@triton.jit
def _store(pointer, x, mask):
    """float64 to what the pointer holds: half precision by way of float32, to nearest, as torch does."""
    if pointer.dtype.element_ty != tl.float64:
        x = x.to(tl.float32)
    if pointer.dtype.element_ty == tl.bfloat16:
        # Rounded in integers, ties to even: the interpreter's own conversion truncates.
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, rounded, bits | 0x400000).to(tl.float32, bitcast=True)
    tl.store(pointer, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _expm1(x):
    """exp(x) - 1 for |x| < 1: the Taylor series, whose term x^19 / 19! is below 2^-56 of x."""
    q = 1.0 / 6402373705728000.0 * x + 1.0 / 355687428096000.0
    q = q * x + 1.0 / 20922789888000.0
    q = q * x + 1.0 / 1307674368000.0
    q = q * x + 1.0 / 87178291200.0
    q = q * x + 1.0 / 6227020800.0
    q = q * x + 1.0 / 479001600.0
    q = q * x + 1.0 / 39916800.0
    q = q * x + 1.0 / 3628800.0
    q = q * x + 1.0 / 362880.0
    q = q * x + 1.0 / 40320.0
    q = q * x + 1.0 / 5040.0
    q = q * x + 1.0 / 720.0
    q = q * x + 1.0 / 120.0
    q = q * x + 1.0 / 24.0
    q = q * x + 1.0 / 6.0
    q = q * x + 0.5
    return x + q * (x * x)


@triton.jit
def _log1p(x):
    """log(1 + x) for x > -1. What rounding 1 + x loses, the quotient x / ((1 + x) - 1) gives back (Kahan)."""
    y = 1.0 + x
    exact = y == 1.0
    return tl.where(exact, x, tl.log(y) * (x / tl.where(exact, 1.0, y - 1.0)))


@triton.jit
def _change(log_prior, prior, d):
    """prior x (exp(d) - 1): no cancellation where d is small, no 0 x inf where prior underflows."""
    near = tl.abs(d) < 1.0
    return tl.where(near, prior * _expm1(tl.where(near, d, 0.0)), tl.exp(log_prior + d) - prior)


@triton.jit
def _relevance(prior_inputs, k, K):
    """s_k + log w_k [BLOCK_K], -inf beyond K and where masked."""
    scores, log_weight, doc_mask, row = prior_inputs
    there = k < K
    u = _wide(tl.load(scores + row + k, mask=there, other=0.0))
    if log_weight is not None:
        u += _wide(tl.load(log_weight + row + k, mask=there, other=0.0))
    if doc_mask is not None:
        there = there & (tl.load(doc_mask + row + k, mask=there, other=0) != 0)
    return tl.where(there, u, -_INF)


@triton.jit
def _normaliser(prior_inputs, K, K_END: tl.constexpr, BLOCK_K: tl.constexpr):
    """The largest relevance and the log of the sum of exponentials above it; whether there is a document."""
    top = tl.full([], -_INF, tl.float64)
    total = tl.zeros([], tl.float64)
    documents = tl.zeros([], tl.int32)
    for start in range(0, K_END, BLOCK_K):
        u = _relevance(prior_inputs, start + tl.arange(0, BLOCK_K), K)
        documents += tl.sum((u != -_INF).to(tl.int32), axis=0)
        higher = tl.maximum(top, tl.max(u, axis=0))
        shift = tl.where(higher == -_INF, 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(u - shift), axis=0)  # NaN stays in the sum
        top = higher
    any_document = documents > 0
    return tl.where(any_document, top, 0.0), tl.log(tl.where(any_document, total, 1.0)), any_document


@triton.jit
def _log_prior(prior_inputs, normaliser, k, K):
    """log p(z|x) [BLOCK_K, 1], -inf where masked."""
    top, log_total = normaliser
    u = _relevance(prior_inputs, k, K)
    return tl.where(u == -_INF, -_INF, (u - top) - log_total)[:, None]


@triton.jit
def _scored(token_mask, row, m, M):
    """Which of the tokens m are scored [BLOCK_M]."""
    inside = m < M
    if token_mask is not None:
        inside = inside & (tl.load(token_mask + row + m, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _columns(token_inputs, k, m, K, M, PER_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr):
    """What is marginalised: tokens m [BLOCK_K, BLOCK_M], or the sum of all [BLOCK_K, 1] for a sequence."""
    log_likelihood, token_mask, row, stride_k, stride_m = token_inputs
    rows = log_likelihood + k.to(tl.int64)[:, None] * stride_k
    there = (k < K)[:, None]
    if PER_TOKEN:
        inside = there & (m < M)[None, :]
        return _wide(tl.load(rows + m.to(tl.int64)[None, :] * stride_m, mask=inside, other=0.0))
    else:
        total = tl.zeros(k.shape, tl.float64)
        for start in range(0, M, BLOCK_M):
            n = start + tl.arange(0, BLOCK_M)
            inside = there & _scored(token_mask, row, n, M)[None, :]
            tile = _wide(tl.load(rows + n.to(tl.int64)[None, :] * stride_m, mask=inside, other=0.0))
            total += tl.sum(tile, axis=1)
        return total[:, None]


@triton.jit
def _centre(
    prior_inputs,
    normaliser,
    token_inputs,
    m,
    K,
    M,
    PER_TOKEN: tl.constexpr,
    K_END: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Of each column: the l of its best document, log p(y|x) relative to that, whether p(y|x) is zero."""
    COLUMNS: tl.constexpr = BLOCK_M if PER_TOKEN else 1
    best = tl.full([COLUMNS], -_INF, tl.float64)
    centre = tl.zeros([COLUMNS], tl.float64)
    top = tl.zeros([COLUMNS], tl.float64)  # log_prior of the best document
    for start in range(0, K_END, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        log_prior = _log_prior(prior_inputs, normaliser, k, K)
        column = _columns(token_inputs, k, m, K, M, PER_TOKEN, BLOCK_M)
        joint = tl.where(log_prior == -_INF, -_INF, log_prior + column)
        joint = tl.where(joint == joint, joint, _INF)  # NaN wins; the sums below find it again
        block_best = tl.max(joint, axis=0)
        # Of documents that tie, any serves.
        is_best = joint == block_best[None, :]
        better = block_best > best
        centre = tl.where(better, tl.max(tl.where(is_best, column, -_INF), axis=0), centre)
        top = tl.where(better, tl.min(tl.where(is_best, log_prior, 0.0), axis=0), top)
        best = tl.where(better, block_best, best)
    change = tl.zeros([COLUMNS], tl.float64)
    total = tl.zeros([COLUMNS], tl.float64)
    for start in range(0, K_END, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        log_prior = _log_prior(prior_inputs, normaliser, k, K)
        column = _columns(token_inputs, k, m, K, M, PER_TOKEN, BLOCK_M)
        d = tl.where(log_prior == -_INF, -_INF, column - centre[None, :])
        change += tl.sum(_change(log_prior, tl.exp(log_prior), d), axis=0)
        total += tl.sum(tl.exp((log_prior - top[None, :]) + d), axis=0)
    impossible = best == -_INF
    near = change > -0.5
    far = top + tl.log(tl.where(near | impossible, 1.0, total))
    relative = tl.where(near, _log1p(tl.where(near, change, 0.0)), far)
    relative = tl.where(change == change, relative, change)
    return centre, tl.where(impossible, 0.0, relative), impossible


@triton.jit
def marginal_loss_fwd_kernel(
    scores,  # [B, K]
    log_likelihood,  # [B, K, M], with the strides below
    log_weight,  # [B, K] or None
    token_mask,  # [B, M] uint8 or None
    doc_mask,  # [B, K] uint8 or None
    loss,  # [B]
    count,  # [B] int64
    K,
    M,
    stride_b,
    stride_k,
    stride_m,
    PER_TOKEN: tl.constexpr,
    K_END: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The loss of one example and how many columns it sums."""
    b = tl.program_id(0).to(tl.int64)
    prior_inputs = (scores, log_weight, doc_mask, b * K)
    token_inputs = (log_likelihood + b * stride_b, token_mask, b * M, stride_k, stride_m)
    top, log_total, any_document = _normaliser(prior_inputs, K, K_END, BLOCK_K)
    normaliser = (top, log_total)
    result = tl.zeros([BLOCK_M], tl.float64)
    counted = tl.zeros([BLOCK_M], tl.int64)
    for start in range(0, M, BLOCK_M):
        scored = _scored(token_mask, b * M, start + tl.arange(0, BLOCK_M), M) & any_document
        counted += scored.to(tl.int64)
        if PER_TOKEN:
            m = start + tl.arange(0, BLOCK_M)
            centre, relative, impossible = _centre(
                prior_inputs, normaliser, token_inputs, m, K, M, PER_TOKEN, K_END, BLOCK_K, BLOCK_M
            )
            result += tl.where(scored, -tl.where(impossible, -_INF, centre + relative), 0.0)
    columns = tl.sum(counted, axis=0)
    total = tl.sum(result, axis=0)
    if not PER_TOKEN:
        centre, relative, impossible = _centre(
            prior_inputs, normaliser, token_inputs, None, K, M, PER_TOKEN, K_END, BLOCK_K, BLOCK_M
        )
        log_marginal = tl.sum(tl.where(impossible, -_INF, centre + relative), axis=0)  # one column
        columns = (columns > 0).to(tl.int64)
        total = tl.where(columns > 0, -log_marginal, 0.0)
    _store(loss + b, total, True)
    tl.store(count + b, columns)


@triton.jit
def _gradient(
    g,
    counts,
    prior_inputs,
    normaliser,
    token_inputs,
    k,
    m,
    K,
    M,
    PER_TOKEN: tl.constexpr,
    K_END: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """-g r and -g posterior of documents k, 0 where a column does not count."""
    centre, relative, impossible = _centre(
        prior_inputs, normaliser, token_inputs, m, K, M, PER_TOKEN, K_END, BLOCK_K, BLOCK_M
    )
    log_prior = _log_prior(prior_inputs, normaliser, k, K)
    column = _columns(token_inputs, k, m, K, M, PER_TOKEN, BLOCK_M)
    d = tl.where(log_prior == -_INF, -_INF, (column - centre[None, :]) - relative[None, :])
    residual = _change(log_prior, tl.exp(log_prior), d)
    posterior = tl.exp(log_prior + d)
    # Selected, not multiplied: an infinite g times zero would be NaN.
    counts = (counts & (impossible == 0))[None, :]
    d_prior = tl.where(counts & (residual != 0), -g * residual, 0.0)
    return d_prior, tl.where(counts & (posterior != 0), -g * posterior, 0.0)


@triton.jit
def marginal_loss_bwd_kernel(
    scores,  # [B, K]
    log_likelihood,  # [B, K, M], with the strides below
    log_weight,  # [B, K] or None
    token_mask,  # [B, M] uint8 or None
    doc_mask,  # [B, K] uint8 or None
    d_loss,  # [B], or one number
    divisor,  # int64, the divisor of reduction "mean", or None
    d_scores,  # [B, K] or None
    d_log_likelihood,  # [B, K, M] contiguous, or None
    K,
    M,
    stride_b,
    stride_k,
    stride_m,
    REDUCED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    K_END: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """d_scores = -g sum_m r and d_log_likelihood = -g posterior of one example, BLOCK_K documents a program.

    Every program finds the columns' centres over all documents again: no second launch, nothing saved."""
    b = tl.program_id(0).to(tl.int64)
    prior_inputs = (scores, log_weight, doc_mask, b * K)
    token_inputs = (log_likelihood + b * stride_b, token_mask, b * M, stride_k, stride_m)
    top, log_total, any_document = _normaliser(prior_inputs, K, K_END, BLOCK_K)
    normaliser = (top, log_total)
    g = _wide(tl.load(d_loss if REDUCED else d_loss + b))
    if divisor is not None:
        g = g / tl.maximum(tl.load(divisor), 1).to(tl.float64)
    k = tl.arange(0, BLOCK_K)
    if K_END > BLOCK_K:
        k += tl.program_id(1) * BLOCK_K
    d_relevance = tl.zeros([BLOCK_K], tl.float64)
    if not PER_TOKEN:
        any_scored = tl.zeros([BLOCK_M], tl.int32)
        for start in range(0, M, BLOCK_M):
            scored = _scored(token_mask, b * M, start + tl.arange(0, BLOCK_M), M)
            any_scored = tl.maximum(any_scored, scored.to(tl.int32))
        counts = any_document & (tl.max(any_scored, axis=0) > 0)
        d_prior, d_column = _gradient(
            g,
            counts,
            prior_inputs,
            normaliser,
            token_inputs,
            k,
            None,
            K,
            M,
            PER_TOKEN,
            K_END,
            BLOCK_K,
            BLOCK_M,
        )
        d_relevance += tl.sum(d_prior, axis=1)
    if PER_TOKEN or d_log_likelihood is not None:
        for start in range(0, M, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            scored = _scored(token_mask, b * M, m, M)
            if PER_TOKEN:
                counts = any_document & scored
                d_prior, d_tile = _gradient(
                    g,
                    counts,
                    prior_inputs,
                    normaliser,
                    token_inputs,
                    k,
                    m,
                    K,
                    M,
                    PER_TOKEN,
                    K_END,
                    BLOCK_K,
                    BLOCK_M,
                )
                d_relevance += tl.sum(d_prior, axis=1)
            else:
                d_tile = tl.where(scored[None, :], d_column, 0.0)
            if d_log_likelihood is not None:
                rows = d_log_likelihood + (b * K + k.to(tl.int64))[:, None] * M
                _store(rows + m[None, :], d_tile, (k < K)[:, None] & (m < M)[None, :])
    if d_scores is not None:
        _store(d_scores + b * K + k, d_relevance, k < K)


@triton.jit
def marginal_loss_reduce_kernel(
    losses,  # [B] float64
    counts,  # [B] int64
    loss,  # one number
    count,  # int64
    B,
    MEAN: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The sum or mean over examples, in a fixed order. One program; moves 16 B bytes."""
    total = tl.zeros([BLOCK_B], tl.float64)
    counted = tl.zeros([BLOCK_B], tl.int64)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        total += tl.load(losses + b, mask=b < B, other=0.0)
        counted += tl.load(counts + b, mask=b < B, other=0)
    columns = tl.sum(counted, axis=0)
    result = tl.sum(total, axis=0)
    if MEAN:
        result = result / tl.maximum(columns, 1).to(tl.float64)
    _store(loss, result, True)
    tl.store(count, columns)
