"""Triton kernels of mips_topk that choose: the groups to rescore, the rows to return, the certificate.

The legend is in triton_scan.py.
"""

import triton
import triton.language as tl

from .triton_keys import NOTHING, index_of, key_of, largest, value_of

# An error bound from here on says nothing, as the sums may have overflowed. Below it |q| |x| < 2^121, since
# the bound is at least 2^-21 of that: no partial sum reaches 2^128.
_OVERFLOW = tl.constexpr(2.0**100)
# A bound is three float32 operations, each off by at most 2^-24 of its result.
_ROUND_UP = tl.constexpr(1 + 2.0**-21)


@triton.jit
def upper_bound(group_max, group_norm, slope, offset):
    """U, float32: no canonical score in the group is larger. +inf: nothing is known, -inf: no row."""
    error = (group_norm * slope + offset) * _ROUND_UP
    bound = tl.where(error < _OVERFLOW, group_max + error, float("inf"))  # NaN compares false
    # The slope of a NaN query is NaN, and nothing is returned for it.
    return tl.where(slope == slope, bound, float("-inf"))


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
    bound = upper_bound(maxima, norms, tl.load(slope + query), tl.load(offset + query))
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
    """The TOP largest of each part of PART keys: one round of a tournament.

    A program owns one query and one part. Reads 8 bytes a key, writes 8 * TOP / PART. Limit: sorting.
    """
    query, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if ONLY_FLAGGED:  # noqa: SIM102, decided when the kernel is compiled
        if tl.load(flags + query) == 0:
            return
    place = part * PART + tl.arange(0, PART)
    block = tl.load(keys + query * num_keys + place, mask=place < num_keys, other=NOTHING)
    _keep_largest(block, best + (query * tl.num_programs(1) + part) * TOP, left_out + query, TOP, NOTE)


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
    of the flagged queries anew, and certifies nothing. Reads 8 bytes a key, writes 12 bytes a row returned.
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
