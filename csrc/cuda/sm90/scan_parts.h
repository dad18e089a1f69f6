// What the three shapes of the Hopper scan share: arguments, barriers, the producer, the norms of the rows,
// the maxima of a fragment. docs/hopper_scan.md walks through the kernels.
#pragma once

#include "cuda/sm90/wgmma.h"

namespace realm_kernels {
namespace cuda {
namespace sm90 {

struct ScanArguments {
  uint32_t* words;       // [B, pitch] a word of maxima a tile, mips_topk_words.h
  float* quad_norm;      // [N / 512], raised to at least the norms of these rows; codes bring theirs
  const bool* row_mask;  // [N], or null: every row counts
  int64_t pitch;
  int num_queries, num_rows;
  int query_blocks;   // blocks of the grid that read the same tiles
  int cluster;        // blocks of a cluster; 1 but in kDeep
  float norm_scale;   // 1 + what the float32 sum of D squares may lose, relative to the norm
  float norm_hidden;  // the norm that squares below 2^-126 may hide
  SharedPlan plan;
};

// The barriers of the ring: a full one is ended by the bytes that land, an empty one by a warp each that
// reads, in a cluster also by those of the other blocks, whose shared memory the producer writes to.
struct Ring {
  uint64_t* full;
  uint64_t* empty;
  uint64_t* resident;  // ended by the queries that stay
  int stages;
};

RK_DEVICE unsigned char* aligned_memory() {
  unsigned char* memory = dynamic_shared_memory();
  return memory + (kAtomBytes - shared_address(memory) % kAtomBytes) % kAtomBytes;
}

RK_DEVICE Ring make_ring(const SharedPlan& plan, unsigned char* memory, int cluster, bool measures) {
  const int readers = cluster * kConsumerWarps + (measures ? kNormWarps : 0);
  auto* barriers = reinterpret_cast<uint64_t*>(memory + plan.barriers_at());
  const Ring ring{barriers, barriers + kMaxStages, barriers + 2 * kMaxStages, plan.stages};
  if (threadIdx.x == 0) {
    for (int s = 0; s < plan.stages; ++s) {
      barrier_init(ring.full + s, 1);
      barrier_init(ring.empty + s, static_cast<uint32_t>(readers));
    }
    barrier_init(ring.resident, 1);
    barrier_init_fence();
  }
  if (cluster > 1) {
    cluster_sync();  // before another block loads to here or arrives here
  } else {
    __syncthreads();
  }
  return ring;
}

RK_DEVICE void arrive_warp(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % kWarp == 0) {
    barrier_arrive(barrier);
  }
}

// At the barriers of all blocks that load to the memory which was read.
RK_DEVICE void arrive_warp_at_cluster(uint64_t* barrier, int cluster) {
  __syncwarp();
  if (const int lane = threadIdx.x % kWarp; lane < cluster) {
    barrier_arrive_at(barrier, static_cast<uint32_t>(lane));
  }
}

// One thread: the queries once, then panel after panel of this block's tiles, as stages become free.
template <class Element, Shape kShape>
RK_DEVICE void produce(const ScanArguments& a, const Share& share, const Ring& ring, unsigned char* memory,
                       const TensorMap* rows, const TensorMap* queries) {
  constexpr int kPanelColumns = kPanelBytes / Element::kBytes;
  const SharedPlan& plan = a.plan;
  const int first_query = share.query_block * plan.blocks * kBlockQueries;
  if (kShape != Shape::kDeep) {
    barrier_expect(ring.resident, static_cast<uint32_t>(plan.resident));
    for (int p = 0; p < plan.panels; ++p) {
      for (int b = 0; b < plan.blocks; ++b) {
        tma_load(queries, memory + (b * plan.panels + p) * kBlockBytes, ring.resident, p * kPanelColumns,
                 first_query + b * kBlockQueries);
      }
    }
  }
  RingPosition at;
  for (int tile = share.first_tile; tile < share.end_tile; tile += share.tile_step) {
    for (int p = 0; p < plan.panels; ++p) {
      barrier_wait(ring.empty + at.stage, at.empty_parity());
      // All that lands here, whoever loads it; another block may have done so already.
      barrier_expect(ring.full + at.stage, static_cast<uint32_t>(plan.stage_bytes));
      unsigned char* stage = memory + plan.stages_at() + at.stage * plan.stage_bytes;
      tma_load(rows, stage, ring.full + at.stage, p * kPanelColumns, tile * kTileRows);
      if (kShape == Shape::kDeep) {
        for (int b = share.rank; b < plan.blocks; b += a.cluster) {
          tma_load_multicast(queries, stage + kStageBytes + b * kBlockBytes, ring.full + at.stage,
                             p * kPanelColumns, first_query + b * kBlockQueries,
                             static_cast<uint16_t>((1 << a.cluster) - 1));
        }
      }
      at = at.plus(1, ring.stages);
    }
  }
}

// The float32 values of two halves in a word.
template <class Element>
RK_DEVICE void unpack(uint32_t word, float& low, float& high);
template <>
RK_DEVICE void unpack<BFloat16>(uint32_t word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xFFFF0000u);
}
template <>
RK_DEVICE void unpack<Float16>(uint32_t word, float& low, float& high) {
  low = half_to_float(word & 0xFFFFu);
  high = half_to_float(word >> 16);
}

RK_DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // the number, where one of them is NaN
RK_DEVICE int larger(int a, int b) { return a > b ? a : b; }
RK_DEVICE float lowest(float) { return __uint_as_float(0xFF800000u); }
RK_DEVICE int lowest(int) { return static_cast<int>(0x80000000u); }

struct Plus {
  RK_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  RK_DEVICE float operator()(float a, float b) const { return larger(a, b); }
  RK_DEVICE int operator()(int a, int b) const { return larger(a, b); }
};

// Of two lanes `distance` apart the upper one keeps the upper half of its values and the lower one the lower,
// each combined with the other's. Three such steps are 14 shuffles where a plain reduction of sixteen values
// over eight lanes takes 48.
template <int kCount, class T, class Combine>
RK_DEVICE void halve(T* v, int distance, Combine combine) {
  const bool upper = (threadIdx.x & static_cast<unsigned>(distance)) != 0;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const T sent = upper ? v[i] : v[i + kCount / 2], kept = upper ? v[i + kCount / 2] : v[i];
    v[i] = combine(kept, __shfl_xor_sync(0xFFFFFFFFu, sent, distance));
  }
}

// A norm warp owns 64 rows of every tile. A lane reads 16 bytes of rows lane / 8 and four below,
// atom by atom: the warp reads 512 bytes in a row, without bank conflicts, and as the swizzle only permutes
// 16-byte pieces within a row, it does not matter here. A row lies over eight lanes, which in the end share
// out their rows. Rows with a NaN score NaN whatever the query and are never returned: fmaxf drops their
// norm, as the maxima drop their scores.
template <class Element>
RK_DEVICE void measure(const ScanArguments& a, const Share& share, const Ring& ring, unsigned char* memory,
                       int warp) {
  constexpr int kRows = kNormRows / 4;  // that a lane has a part of
  const int lane = threadIdx.x % kWarp;
  const uint32_t base = shared_address(memory + a.plan.stages_at()) +
                        static_cast<uint32_t>(warp * kNormRows * kPanelBytes + lane * 16);
  RingPosition at;
  for (int tile = share.first_tile; tile < share.end_tile; tile += share.tile_step) {
    float squares[kRows] = {};
    for (int p = 0; p < a.plan.panels; ++p) {
      barrier_wait(ring.full + at.stage, at.parity);
      const uint32_t address = base + static_cast<uint32_t>(at.stage * a.plan.stage_bytes);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const Vector16 v = load_shared(address + static_cast<uint32_t>(i * 4 * kPanelBytes));
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          float low, high;
          unpack<Element>(v.words[w], low, high);
          squares[i] = fmaf(low, low, squares[i]);
          squares[i] = fmaf(high, high, squares[i]);
        }
      }
      arrive_warp(ring.empty + at.stage);
      at = at.plus(1, ring.stages);
    }
    halve<kRows>(squares, 4, Plus{});
    halve<kRows / 2>(squares, 2, Plus{});
    halve<kRows / 4>(squares, 1, Plus{});
    const int first_row = tile * kTileRows + warp * kNormRows;
    if (a.row_mask != nullptr) {
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
        const int row = first_row + 4 * (kRows / 8 * (lane % 8) + i) + lane / 8;
        squares[i] = row < a.num_rows && a.row_mask[row] ? squares[i] : 0.0f;
      }
    }
    static_assert(kRows / 8 == 2, "two rows are left to a lane");
    // Of numbers that are not negative the bits are in order too.
    const int mine = __float_as_int(fmaxf(fmaxf(squares[0], squares[1]), 0.0f));
    const float largest = __int_as_float(__reduce_max_sync(0xFFFFFFFFu, mine));
    if (lane == 0 && first_row < a.num_rows) {
      const float norm = sqrtf(largest) * a.norm_scale + a.norm_hidden;
      atomicMax(reinterpret_cast<int*>(a.quad_norm) + (first_row >> kQuadShift), __float_as_int(norm));
    }
  }
}

// The maximum of v[i] over the four lanes that share rows of a fragment, for i the lane's number in its four.
template <class T>
RK_DEVICE T quad_transposed_maximum(T (&v)[4]) {
  halve<4>(v, 2, Larger{});
  halve<2>(v, 1, Larger{});
  return v[0];
}

template <class T>
RK_DEVICE T quad_maximum(T v) {
  v = larger(v, __shfl_xor_sync(0xFFFFFFFFu, v, 1));
  return larger(v, __shfl_xor_sync(0xFFFFFFFFu, v, 2));
}

// The empty epilogue: products that nobody reads would not be made.
template <class T, int kCount>
RK_DEVICE void pretend_to_read(const ScanArguments& a, const T (&d)[kCount]) {
  if (d[0] == lowest(T{})) {
    *a.words = 0;
  }
}

constexpr uint32_t kAllColumns = 0xFFFFFFFFu;

// Whether the rows of this lane's 32 columns of a tile count: bit 2 j + e is column 8 j + 2 (lane % 4) + e.
RK_DEVICE uint32_t valid_columns(const ScanArguments& a, int tile) {
  uint32_t valid = 0;
  for (int c = 0; c < 32; ++c) {
    const int row = tile * kTileRows + fragment_column(threadIdx.x % kWarpGroup, c / 2 * 4 + c % 2);
    valid |= static_cast<uint32_t>(row < a.num_rows && a.row_mask[row]) << c;
  }
  return valid;
}

// A maximum as a float, no less; -inf where no row counted.
RK_DEVICE float as_float(float maximum) { return maximum; }
RK_DEVICE float as_float(int maximum) {
  return maximum == lowest(int{}) ? lowest(float{}) : to_float_up(maximum);
}

// What a thread knows of the maxima of a 64 x 128 fragment with rows of the table on N: of two queries eight
// rows apart and each group of the tile, over its own columns. 56 maxima.
template <class T>
struct Maxima {
  T of_group[2][kTileGroups];
  int tile, first_query;  // of the fragment

  // valid: which of the thread's columns count, as valid_columns() has them. To clear the others in d would
  // be to write to accumulators, and the product under way would wait for that.
  template <bool kAllValid>
  RK_DEVICE void take(const T (&d)[64], int of_tile, int of_query, uint32_t valid) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const bool counts = kAllValid || (valid >> (i / 4 * 2 + i % 2) & 1) != 0;
      T& m = of_group[i / 2 % 2][i / 16];
      m = larger(i % 16 < 4 && i % 2 == 0 ? lowest(T{}) : m, counts ? d[i] : lowest(T{}));
    }
    tile = of_tile;
    first_query = of_query;
  }
};

// Their words, by 12 shuffles of which four wait for others: of the four lanes that share a query each ends
// with the maximum of one group and that of the tile, and two of them write. Rows past the end are zeros:
// they can only raise the bounds of the last tile.
template <class T>
RK_DEVICE void store_words(const ScanArguments& a, Maxima<T> maxima) {
  const int lane = threadIdx.x % 4;
  uint32_t rounded[2], gaps = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T(&mine)[kTileGroups] = maxima.of_group[half];
    const float maximum = as_float(quad_maximum(larger(larger(mine[0], mine[1]), larger(mine[2], mine[3]))));
    const float of_group = as_float(quad_transposed_maximum(mine));
    rounded[half] = rounded_up(maximum);
    gaps |= gap_of(rounded[half], maximum, of_group, lane) << 16 * half;
  }
  gaps |= __shfl_xor_sync(0xFFFFFFFFu, gaps, 1);
  gaps |= __shfl_xor_sync(0xFFFFFFFFu, gaps, 2);
  const int row = maxima.first_query + fragment_row(threadIdx.x % kWarpGroup, 0) + 8 * lane;
  if (lane < 2 && row < a.num_queries && maxima.tile * kTileRows < a.num_rows) {
    a.words[row * a.pitch + maxima.tile] = lane == 0 ? rounded[0] | (gaps & kGaps) : rounded[1] | gaps >> 16;
  }
}

}  // namespace sm90
}  // namespace cuda
}  // namespace realm_kernels
