// The largest keys of a stream, kept by a block of threads in shared memory, and sums and sorts over a block.
#pragma once

#include "cuda/mips_topk_keys.h"

namespace realm_kernels {
namespace cuda {

// Keys a thread of the buffer, held in registers while it is cut: of rows, at most k; of groups, some more.
constexpr int kRowKeys = 8;
constexpr int kGroupKeys = 9;
constexpr int kOffersPerRound = 4;  // by a thread between two looks at how full the buffer is
constexpr int kMaxWarps = 32;

// Shared memory of TopKeys for a block of `threads`, and how many keys it may be asked to keep.
RK_BOTH constexpr int top_keys_bytes(int threads, int keys) { return 8 * (keys * threads + kMaxWarps) + 16; }
RK_BOTH constexpr int most_kept(int threads, int keys) { return (keys - kOffersPerRound) * threads; }

struct Largest {
  RK_DEVICE int64_t operator()(int64_t a, int64_t b) const { return a > b ? a : b; }
};
struct Smallest {
  RK_DEVICE int64_t operator()(int64_t a, int64_t b) const { return a < b ? a : b; }
};

// The `keep` largest of all keys offered by all threads. Keys above the `floor` enter a buffer; when it may
// overflow it is cut to the `keep` largest, whose least becomes the floor. Which keys those are depends on no
// order: keys are unique, and a key is dropped only for `keep` larger ones.
template <int kKeysPerThread>
class TopKeys {
 public:
  // memory: top_keys_bytes() of shared memory, 8-byte aligned. keep <= most_kept(blockDim.x).
  RK_DEVICE TopKeys(unsigned char* memory, int keep)
      : keys_(reinterpret_cast<int64_t*>(memory)),
        partial_(keys_ + kKeysPerThread * blockDim.x),
        count_(reinterpret_cast<int*>(partial_ + kMaxWarps)),
        keep_(keep) {
    clear();
  }

  RK_DEVICE void clear() {
    floor_ = kNothing;
    __syncthreads();
    if (threadIdx.x == 0) {
      *count_ = 0;
    }
    __syncthreads();
  }

  // By all threads of a warp together, at most kOffersPerRound times in a round; kNothing offers nothing.
  RK_DEVICE void offer(int64_t key) { push(key > floor_, key); }

  // No key of a smaller value can enter; -inf where every one can.
  RK_DEVICE float least_value() const { return value_of(floor_); }

  // By all threads of the block.
  RK_DEVICE void end_round() {
    const int count = settled_count();
    if (count > most_kept(static_cast<int>(blockDim.x), kKeysPerThread)) {
      cut(count);
    }
  }

  // After the last round: the keys kept are keys()[0 .. count), in no order.
  RK_DEVICE int finish() {
    int count = settled_count();
    if (count > keep_) {
      cut(count);
      count = keep_;
    }
    return count;
  }

  RK_DEVICE int64_t* keys() { return keys_; }

  RK_DEVICE int64_t smallest(int count) {
    int64_t least = INT64_MAX;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
      least = Smallest{}(least, keys_[i]);
    }
    return reduce(least, Smallest{});
  }

  // keys()[0 .. count) descending, by a bitonic network; what pads them to a power of two is kNothing.
  RK_DEVICE void sort(int count) {
    int padded = 1;
    while (padded < count) {
      padded *= 2;
    }
    for (int i = count + static_cast<int>(threadIdx.x); i < padded; i += static_cast<int>(blockDim.x)) {
      keys_[i] = kNothing;
    }
    __syncthreads();
    for (int run = 2; run <= padded; run *= 2) {
      for (int distance = run / 2; distance > 0; distance /= 2) {
        for (int i = static_cast<int>(threadIdx.x); i < padded / 2; i += static_cast<int>(blockDim.x)) {
          const int left = 2 * i - (i & (distance - 1)), right = left + distance;
          const bool descending = (left & run) == 0;
          const int64_t a = keys_[left], b = keys_[right];
          if ((a < b) == descending) {
            keys_[left] = b;
            keys_[right] = a;
          }
        }
        __syncthreads();
      }
    }
  }

 private:
  RK_DEVICE int settled_count() {
    __syncthreads();
    const int count = *count_;
    __syncthreads();  // nobody pushes before everybody has looked
    return count;
  }

  RK_DEVICE void push(bool enters, int64_t key) {
    const uint32_t entering = __ballot_sync(0xFFFFFFFFu, enters);
    if (entering == 0) {
      return;
    }
    const int lane = threadIdx.x % 32;
    int first = 0;
    if (lane == 0) {
      first = atomicAdd(count_, __popc(entering));
    }
    first = __shfl_sync(0xFFFFFFFFu, first, 0);
    if (enters) {
      keys_[first + __popc(entering & ((1u << lane) - 1))] = key;
    }
  }

  template <class Combine>
  RK_DEVICE int64_t reduce(int64_t x, Combine combine) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      x = combine(x, __shfl_xor_sync(0xFFFFFFFFu, x, distance));
    }
    if (threadIdx.x % 32 == 0) {
      partial_[threadIdx.x / 32] = x;
    }
    __syncthreads();
    x = partial_[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) {
      x = combine(x, partial_[warp]);
    }
    __syncthreads();
    return x;
  }

  // Over the block, with one barrier: two sums in a row use halves of the memory in turn.
  RK_DEVICE int sum(int x, int half) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    auto* partial = reinterpret_cast<int*>(partial_) + half * kMaxWarps;
    x = __reduce_add_sync(0xFFFFFFFFu, x);
    if (lane == 0) {
      partial[threadIdx.x / 32] = x;
    }
    __syncthreads();
    return __reduce_add_sync(0xFFFFFFFFu, lane < static_cast<int>(blockDim.x / 32) ? partial[lane] : 0);
  }

  // Bisects for the keep-th largest of the count > keep keys: some thirty looks at registers, no sort.
  RK_DEVICE void cut(int count) {
    int64_t mine[kKeysPerThread];
    int64_t least = INT64_MAX, most = kNothing;
#pragma unroll
    for (int i = 0; i < kKeysPerThread; ++i) {
      const int place = i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      mine[i] = place < count ? keys_[place] : kNothing;
      least = place < count ? Smallest{}(least, mine[i]) : least;
      most = Largest{}(most, mine[i]);
    }
    // At least keep keys reach `low`, fewer reach `high`.
    auto low = static_cast<uint64_t>(reduce(least, Smallest{})),
         high = static_cast<uint64_t>(reduce(most, Largest{})) + 1;
    int look = 0;
    while (high - low > 1) {
      const uint64_t middle = low + (high - low) / 2;
      int reach = 0;
#pragma unroll
      for (int i = 0; i < kKeysPerThread; ++i) {
        reach += mine[i] >= static_cast<int64_t>(middle);
      }
      reach = sum(reach, look++ % 2);
      if (reach >= keep_) {
        low = middle;
      } else {
        high = middle;
      }
      if (reach == keep_) {
        break;
      }
    }
    floor_ = static_cast<int64_t>(low);
    if (threadIdx.x == 0) {
      *count_ = 0;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kKeysPerThread; ++i) {
      push(mine[i] >= floor_, mine[i]);
    }
    __syncthreads();
  }

  int64_t* keys_;
  int64_t* partial_;
  int* count_;
  int keep_;
  int64_t floor_;  // the same in all threads
};

}  // namespace cuda
}  // namespace realm_kernels
