"""The total order as 64-bit keys, and the largest keys of a block: what select, rescore and repair share."""

import triton
import triton.language as tl

# A key holds the value in its high half, so mapped that integers compare as the floats do, and the complement
# of the index in its low half: descending keys are value descending, then index ascending, and no two rows
# share a key.
NOTHING = tl.constexpr(-(2**63))  # below every key: its high half is no float's image
_LAST = tl.constexpr(0x7FFFFFFF)  # largest index a key can hold


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def key_of(value, index):
    """int64 key of (value float32, not NaN and not -0; index int32 >= 0)."""
    bits = value.to(tl.int32, bitcast=True)
    high = tl.where(bits < 0, bits ^ _LAST, bits)
    return (high.to(tl.int64) << 32) | (index ^ _LAST).to(tl.int64)


@triton.jit
def value_of(key):
    """The float32 value of a key; -inf for NOTHING."""
    high = (key >> 32).to(tl.int32)
    value = tl.where(high < 0, high ^ _LAST, high).to(tl.float32, bitcast=True)
    return tl.where(key == NOTHING, float("-inf"), value)


@triton.jit
def index_of(key):
    """The int32 index of a key; of NOTHING, which has none, the largest int32."""
    return (key & _LAST).to(tl.int32) ^ _LAST


@triton.jit
def _merge(x, size: tl.constexpr, ASCENDING: tl.constexpr):
    """Sort bitonic runs of 2**size elements: every second one ascending, a single one as told.

    x is a hypercube, [2] * log2(n): elements whose places differ in one bit are neighbours along one axis.
    """
    rank: tl.constexpr = len(x.shape)
    if size == rank:
        ascending = ASCENDING
    else:
        ascending = tl.reshape(tl.arange(0, 2), [1] * (rank - size - 1) + [2] + [1] * size)
    for axis in tl.static_range(rank - size, rank):
        partner = tl.sum(x, axis=axis, keep_dims=True) - x  # wraps around, and back
        is_right = tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (rank - axis - 1))
        x = tl.where((x > partner) == (ascending != is_right), partner, x)
    return x


@triton.jit
def largest(keys, COUNT: tl.constexpr, ASCENDING: tl.constexpr = 0):
    """The COUNT largest of keys [n], descending unless told; COUNT and n are powers of two, 1 < COUNT <= n.

    A bitonic network (Shanbhag et al. 2018, "Efficient top-k query processing on GPUs"): runs of COUNT are
    sorted, then pairs of runs shrink to one by an element-wise maximum. tl.topk does the same with an
    exclusive-or reduction, which Triton's interpreter runs element by element, a thousand times slower.
    """
    log_n: tl.constexpr = _log2(keys.numel)
    log_count: tl.constexpr = _log2(COUNT)
    x = tl.reshape(keys, [2] * log_n)
    for size in tl.static_range(1, log_count + 1):
        x = _merge(x, size, ASCENDING)
    for left in tl.static_range(log_count + 1, log_n + 1):
        x = tl.max(x, axis=log_n - left)
        x = _merge(x, log_count, ASCENDING)
    return tl.reshape(x, [COUNT])


@triton.jit
def merge_largest(best, keys):
    """The T largest of best [T], descending, and keys [n] in any order; T, n > 1 are powers of two."""
    T: tl.constexpr = best.shape[0]
    n: tl.constexpr = keys.shape[0]
    if n >= T:
        keys = largest(keys, T, ASCENDING=1)
    else:
        # Ascending behind nothing: what is set against the end of best are the largest of keys.
        is_last = tl.arange(0, T // n) == T // n - 1
        keys = tl.reshape(tl.where(is_last[:, None], largest(keys, n, ASCENDING=1)[None, :], NOTHING), [T])
    both = tl.reshape(tl.maximum(best, keys), [2] * _log2(T))  # bitonic, and no larger key is left behind
    return tl.reshape(_merge(both, _log2(T), 0), [T])
