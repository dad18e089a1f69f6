"""The Triton kernels of span_marginal_loss. triton.py launches them.

Legend: B examples, K documents, R = B K, C spans a document. Three launches: documents (each span read once),
examples (four float64 numbers a document), and backwards documents again (each span read and written once).
One launch forward would leave an example to one program: eight programs at B = 8, on a GPU of 132 processors.
Everything is float64, and the formulas are those of reference.py.
"""

import triton
import triton.language as tl

from ..marginal_loss.triton_kernels import (
    _INF,
    _centre,
    _change,
    _columns,
    _log1p,
    _log_prior,
    _normaliser,
    _relevance,
    _store,
    _wide,
)


@triton.jit
def _spans(span_scores, correct, valid, row, c, R, C):
    """Scores of spans c of documents row [BLOCK_R, BLOCK_C], whether they are correct, whether they exist."""
    offset = row[:, None] * C + c[None, :]
    exists = (row < R)[:, None] & (c < C)[None, :]
    if valid is not None:
        exists = exists & (tl.load(valid + offset, mask=exists, other=0) != 0)
    right = exists & (tl.load(correct + offset, mask=exists, other=0) != 0)
    return _wide(tl.load(span_scores + offset, mask=exists, other=0.0)), right, exists


@triton.jit
def _add(x, mask, top, total):
    """The running maximum and the sum of exponentials above it, [BLOCK_R], after a tile more."""
    x = tl.where(mask, x, -_INF)
    higher = tl.maximum(top, tl.max(x, axis=1))
    shift = tl.where(higher == -_INF, 0.0, higher)
    return higher, total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)


@triton.jit
def _log_sum(top, total):
    """-inf where there was nothing; infinity and NaN are in the sum."""
    empty = top == -_INF
    found = (total == total) & empty
    return tl.where(found, -_INF, tl.where(empty, 0.0, top) + tl.log(tl.where(found, 1.0, total)))


@triton.jit
def _softplus(x):
    return tl.where(x > 0, x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def span_evidence_kernel(
    scores,  # [R]
    log_weight,  # [R] or None
    doc_mask,  # [R] uint8 or None
    span_scores,  # [R, C]
    correct,  # [R, C] uint8
    valid,  # [R, C] uint8 or None
    kept,  # [4, R] float64, of which the first two are written: A and I
    relevance,  # [R] float64, s + log w, and in "global" N; -inf where there is no document
    log_likelihood,  # [R] float64, A - N
    has_correct,  # [R] int32
    R,
    C,
    GLOBAL: tl.constexpr,
    C_END: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What the spans say of BLOCK_R documents."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    u = _relevance((scores, log_weight, doc_mask, 0), row, R)
    top_right = tl.full([BLOCK_R], -_INF, tl.float64)
    top_wrong = tl.full([BLOCK_R], -_INF, tl.float64)
    sum_right = tl.zeros([BLOCK_R], tl.float64)
    sum_wrong = tl.zeros([BLOCK_R], tl.float64)
    found = tl.zeros([BLOCK_R], tl.int32)
    for start in range(0, C_END, BLOCK_C):
        x, right, exists = _spans(span_scores, correct, valid, row, start + tl.arange(0, BLOCK_C), R, C)
        exists = exists & (u != -_INF)[:, None]
        right = right & exists
        top_right, sum_right = _add(x, right, top_right, sum_right)
        top_wrong, sum_wrong = _add(x, exists & (right == 0), top_wrong, sum_wrong)
        found += tl.sum(right.to(tl.int32), axis=1)
    right = _log_sum(top_right, sum_right)
    wrong = _log_sum(top_wrong, sum_wrong)
    none_right = right == -_INF
    none_wrong = wrong == -_INF
    none = none_right | none_wrong
    gap = tl.where(none_wrong, 0.0, _softplus(tl.where(none, 0.0, wrong - right)))
    there = row < R
    tl.store(kept + row, right, mask=there)
    tl.store(kept + R + row, wrong, mask=there)
    tl.store(log_likelihood + row, tl.where(none_right, -_INF, -gap), mask=there)
    tl.store(has_correct + row, found, mask=there)
    if GLOBAL:
        normalizer = tl.where(none_right, wrong, right + gap)
        u = tl.where((u == -_INF) | (normalizer == -_INF), -_INF, u + normalizer)
    tl.store(relevance + row, u, mask=there)


@triton.jit
def span_marginal_loss_fwd_kernel(
    relevance,  # [B, K] float64
    log_likelihood,  # [B, K] float64
    has_correct,  # [B, K] int32
    kept,  # [4, B, K] float64, of which the last two are written: posterior and r
    loss,  # [B]
    count,  # [B] int64
    R,  # B K
    K,
    K_END: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The loss of one example, and the posterior and r of its documents: marginal_loss of one column."""
    b = tl.program_id(0).to(tl.int64)
    prior_inputs = (relevance, None, None, b * K)
    token_inputs = (log_likelihood + b * K, None, 0, 1, 1)
    top, log_total, _ = _normaliser(prior_inputs, K, K_END, BLOCK_K)
    normaliser = (top, log_total)
    centre, relative, impossible = _centre(
        prior_inputs, normaliser, token_inputs, None, K, 1, False, K_END, BLOCK_K, BLOCK_M
    )
    found = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, K_END, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        found += tl.load(has_correct + b * K + k, mask=k < K, other=0)
        log_prior = _log_prior(prior_inputs, normaliser, k, K)
        column = _columns(token_inputs, k, None, K, 1, False, BLOCK_M)
        d = tl.where(log_prior == -_INF, -_INF, (column - centre[None, :]) - relative[None, :])
        pulls = (impossible == 0)[None, :]
        residual = tl.where(pulls, _change(log_prior, tl.exp(log_prior), d), 0.0)
        posterior = tl.where(pulls, tl.exp(log_prior + d), 0.0)
        place = kept + 2 * R + b * K + k
        tl.store(place, tl.sum(posterior, axis=1), mask=k < K)  # of one column
        tl.store(place + R, tl.sum(residual, axis=1), mask=k < K)
    counts = tl.sum((found > 0).to(tl.int32), axis=0) > 0
    log_marginal = tl.sum(tl.where(impossible, -_INF, centre + relative), axis=0)
    _store(loss + b, tl.where(counts, -log_marginal, 0.0), True)
    tl.store(count + b, counts.to(tl.int64))


@triton.jit
def span_marginal_loss_bwd_kernel(
    span_scores,  # [R, C]
    correct,  # [R, C] uint8
    valid,  # [R, C] uint8 or None
    kept,  # [4, R] float64
    d_loss,  # [B], or one number
    divisor,  # int64, the divisor of reduction "mean", or None
    d_scores,  # [R] or None
    d_span_scores,  # [R, C] or None
    R,
    K,
    C,
    GLOBAL: tl.constexpr,
    REDUCED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_C spans of BLOCK_R documents; the first program of the documents writes their d_scores."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = row < R
    right = tl.load(kept + row, mask=there, other=-_INF)
    wrong = tl.load(kept + R + row, mask=there, other=-_INF)
    posterior = tl.load(kept + 2 * R + row, mask=there, other=0.0)
    residual = tl.load(kept + 3 * R + row, mask=there, other=0.0)
    g = _wide(tl.load(d_loss + tl.where(there, row // K, 0) * (0 if REDUCED else 1)))
    if divisor is not None:
        g = g / tl.maximum(tl.load(divisor), 1).to(tl.float64)
    # Selected, not multiplied: an infinite g times zero would be NaN.
    d_relevance = tl.where(residual != 0, -g * residual, 0.0)
    writes = tl.program_id(1) == 0
    if d_scores is not None and writes:
        _store(d_scores + row, d_relevance, there)
    if d_span_scores is not None:
        none_right = right == -_INF
        none_wrong = wrong == -_INF
        none = none_right | none_wrong
        odds = tl.where(none, 0.0, wrong - right)
        ratio = tl.exp(-tl.abs(odds))
        larger = 1.0 / (1.0 + ratio)
        smaller = ratio / (1.0 + ratio)
        p_right = tl.where(none_wrong, 1.0, tl.where(none_right, 0.0, tl.where(odds > 0, smaller, larger)))
        p_wrong = tl.where(none_right, 1.0, tl.where(none_wrong, 0.0, tl.where(odds > 0, larger, smaller)))
        # l = A - N is a constant where one side is empty.
        d_l = tl.where(none | (posterior == 0), 0.0, -g * posterior)
        d_right = tl.where(none_right, 0.0, d_l * p_wrong)
        d_wrong = tl.where(none_wrong, 0.0, -d_l * p_wrong)
        if GLOBAL:
            d_right += tl.where(none_right, 0.0, d_relevance * p_right)
            d_wrong += tl.where(none_wrong, 0.0, d_relevance * p_wrong)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        x, is_right, exists = _spans(span_scores, correct, valid, row, c, R, C)
        right = tl.where(none_right, 0.0, right)
        wrong = tl.where(none_wrong, 0.0, wrong)
        d = tl.where(exists, tl.where(is_right, d_right[:, None], d_wrong[:, None]), 0.0)
        e = tl.exp(x - tl.where(is_right, right[:, None], wrong[:, None]))
        inside = there[:, None] & (c < C)[None, :]
        _store(
            d_span_scores + row[:, None] * C + c[None, :], tl.where((d != 0) & (e != 0), d * e, 0.0), inside
        )
