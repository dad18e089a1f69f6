"""Triton kernels of mips_topk that choose: the groups to rescore, the rows to return, the certificate.

The legend is in triton_scan.py.
"""

import triton
import triton.language as tl

from .triton_keys import NOTHING, index_of, key_of, largest, value_of

# An error bound from here on says nothing, as the sums may have overflowed. Below it |q| |x| < 2^121, since
# the bound is at least 2^-21 of that: no partial sum reaches 2^128.
OVERFLOW = tl.constexpr(2.0**100)
# A bound is three float32 operations, each off by at most 2^-24 of its result.
ROUND_UP = tl.constexpr(1 + 2.0**-21)
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def upper_bound(group_max, group_norm, slope, offset):
    """U, float32: no canonical score in the group is larger. +inf: nothing is known, -inf: no row."""
    error = (group_norm * slope + offset) * ROUND_UP
    bound = tl.where(error < OVERFLOW, group_max + error, float("inf"))  # NaN compares false
    # The slope of a NaN query is NaN, and nothing is returned for it.
    return tl.where(slope == slope, bound, float("-inf"))


@triton.jit
def load_bounds(group_max, group_norm, slope, offset, query, group, inside, num_groups):
    """U of groups, -inf outside. Where there are no norms group_max holds U itself."""
    bound = tl.load(group_max + query * num_groups + group, mask=inside, other=float("-inf"))
    if group_norm is not None:
        norm = tl.load(group_norm + group, mask=inside, other=0.0)
        bound = upper_bound(bound, norm, tl.load(slope + query), tl.load(offset + query))
    return tl.where(inside, bound, float("-inf"))


@triton.jit
def may_return(
    row,  # [R] int32
    is_row,  # [R] bool: which of them to look at
    row_mask,  # pointer, [N] bool, or None
    exclude,  # pointer, [E] int64 of one query
    first_row,
    num_excluded,
    stride_mask,
    stride_exclude,
    HAS_MASK: tl.constexpr,
):
    """Which rows [R] the caller has not barred."""
    if HAS_MASK:
        is_row = is_row & (tl.load(row_mask + row.to(tl.int64) * stride_mask, mask=is_row, other=0) != 0)
    row_id = row.to(tl.int64) + first_row
    for e in range(num_excluded):
        is_row = is_row & (row_id != tl.load(exclude + e * stride_exclude))
    return is_row


@triton.jit
def _first_row_key(key, GROUP: tl.constexpr):
    """The key of (U, group) as one of (U, the group's first row), which keys of rows compare with."""
    return tl.where(key == NOTHING, key, key_of(value_of(key), index_of(key) * GROUP))


@triton.jit
def _keep_largest(keys, best, left_out, TOP: tl.constexpr, NOTE: tl.constexpr, GROUP: tl.constexpr):
    """Store the TOP largest of keys, descending; with NOTE, tell left_out the largest of the others."""
    top = largest(keys, TOP)
    tl.store(best + tl.arange(0, TOP), top)
    if NOTE:
        left = tl.max(tl.where(keys < tl.min(top, axis=0), keys, NOTHING), axis=0)
        # The maximum of integers: the order in which programs arrive changes nothing.
        tl.atomic_max(left_out, _first_row_key(left, GROUP))


@triton.jit(do_not_specialize=["num_groups"])
def bound_kernel(
    group_max,  # [B, N / G] float32: largest s~, then U
    group_norm,  # [N / G] float32
    slope,  # [B] float32
    offset,  # [B] float32
    num_groups,
    PART: tl.constexpr,
):
    """U in the place of the maxima, to be lowered between passes. Reads and writes 4 bytes a group."""
    query = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * PART + tl.arange(0, PART)
    inside = group < num_groups
    bound = load_bounds(group_max, group_norm, slope, offset, query, group, inside, num_groups)
    tl.store(group_max + query * num_groups + group, bound, mask=inside)


@triton.jit(do_not_specialize=["num_groups", "num_slots"])
def lower_kernel(
    keys,  # [B, m, G] int64 keys of (canonical score, row) of the selected groups
    selected,  # [B, m] int64 keys of (U, group)
    ceiling,  # [B] int64 key of the last row returned: no row from there on counts
    group_max,  # [B, N / G] float32: U, of the selected groups lowered
    num_groups,
    num_slots,  # m
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What was scored is known: U becomes the largest canonical score of the group's rows yet to return.

    A program owns one query and SLOTS of its groups. Reads 8 bytes a row.
    """
    query = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    chosen = tl.load(selected + query * num_slots + slot, mask=slot < num_slots, other=NOTHING)
    inside = chosen != NOTHING
    place = (query * num_slots + slot)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    key = tl.load(keys + place, mask=inside[:, None], other=NOTHING)
    best = tl.max(tl.where(key < tl.load(ceiling + query), key, NOTHING), axis=1)
    # U = -inf says that there is no row; one that scores -inf is one.
    bound = tl.where(best == NOTHING, float("-inf"), tl.maximum(value_of(best), _LOWEST))
    tl.store(group_max + query * num_groups + index_of(chosen), bound, mask=inside)


@triton.jit(do_not_specialize=["num_groups"])
def select_kernel(
    group_max,  # [B, N / G] float32
    group_norm,  # [N / G] float32, or None
    slope,  # [B] float32, or None
    offset,  # [B] float32, or None
    ceiling,  # [B] int64 key of the last row returned by an earlier pass; None: there was none
    best,  # [B, parts, TOP] int64, keys of (U, group), descending in each part
    left_out,  # [B] int64, raised to the best key (U, first row) of the groups not kept
    num_groups,
    PART: tl.constexpr,
    TOP: tl.constexpr,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
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
    bound = load_bounds(group_max, group_norm, slope, offset, query, group, inside, num_groups)
    if ceiling is not None:  # an earlier pass found that no row is left
        bound = tl.where(tl.load(ceiling + query) == NOTHING, float("-inf"), bound)
    keys = tl.where(bound > float("-inf"), key_of(bound, group), NOTHING)
    best += (query * tl.num_programs(1) + part) * KEEP
    if KEEP == TOP:
        _keep_largest(keys, best, left_out + query, TOP, True, GROUP)
    else:
        bins = tl.max(tl.reshape(bound, [PART // (2 * KEEP), 2 * KEEP]), axis=0)
        floor = value_of(tl.min(largest(key_of(bins, tl.arange(0, 2 * KEEP)), TOP), axis=0))
        reaches = (bound >= floor) & (bound > float("-inf"))
        place = tl.cumsum(reaches.to(tl.int32), axis=0) - 1
        kept = reaches & (place < KEEP)
        tl.store(best + place, keys, mask=kept)
        rest = tl.arange(0, KEEP)
        tl.store(best + rest, NOTHING, mask=rest > tl.max(place, axis=0))
        left = tl.max(tl.where(kept, NOTHING, keys), axis=0)
        tl.atomic_max(left_out + query, _first_row_key(left, GROUP))


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
    GROUP: tl.constexpr,  # of the indices of the keys: 1 where these are rows
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
    _keep_largest(block, best + (query * tl.num_programs(1) + part) * TOP, left_out + query, TOP, NOTE, GROUP)


@triton.jit(do_not_specialize=["num_keys", "first_row", "k", "stride_out"])
def finish_kernel(
    keys,  # [B, num_keys] int64 keys of (canonical score, row)
    left_out,  # [B] int64 key of (U, first row) of the best group or row left out
    flags,  # [B] int32: the certificate failed
    kth,  # [B] int64 key of the k-th row
    repairs,  # [1] int64, how many certificates failed
    scores,  # [B, k] float32
    indices,  # [B, k] int64
    num_keys,
    first_row,
    k,
    stride_out,  # from query to query, of scores and indices
    PART: tl.constexpr,
    TOP: tl.constexpr,
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
    tl.store(scores + query * stride_out + rank, value_of(top), mask=rank < k)
    index = tl.where(top == NOTHING, -1, first_row + index_of(top).to(tl.int64))
    tl.store(indices + query * stride_out + rank, index, mask=rank < k)
    last = tl.max(tl.where(rank == k - 1, top, NOTHING), axis=0)
    tl.store(kth + query, last)
    if not REPAIRED:
        left = tl.load(left_out + query)
        # A group cannot matter if U < tau, or if U = tau and all its ids are larger. High halves compare as
        # values, and that of NOTHING is below every value: too few rows, and any group left out may hold one.
        above = (left >> 32) > (last >> 32)
        before = index_of(left) < index_of(last)
        failed = (left != NOTHING) & (above | (((left >> 32) == (last >> 32)) & before))
        tl.store(flags + query, failed.to(tl.int32))
        tl.atomic_add(repairs, failed.to(tl.int64))
