// The Hopper scan: group maxima of the inner products of B queries with N rows, the scores only in registers.
//
// One block a multiprocessor, persistent. Of three warp groups the first loads (one thread) and measures the
// rows (two warps), the others multiply. Tiles of 128 rows come as panels of 128 bytes through a ring of
// stages; a full barrier says that a panel has landed, an empty one that every warp is done with it. Reads
// N D once from memory for each block of queries, writes a word a tile
// and query. docs/hopper_scan.md has the numbers.
#pragma once

#include "cuda/sm90/scan_parts.h"

namespace realm_kernels {
namespace cuda {
namespace sm90 {

// kWide. Of the m64 blocks of queries a consumer group owns every second one, and multiplies them with a tile
// one after the other. While the maxima of one product are taken, the next one is already under way in other
// accumulators; whichever group pauses, the other keeps the tensor cores busy. What is done between two
// products counts: over codes they follow each other every 512 clocks in a group. So the words of a product
// are made one product later, their shuffles beside maxima that do not wait for them.
template <class Element, bool kWithMaxima>
struct WideConsumer {
  using T = typename Element::Accumulator;

  // A product of this group. The panels of a block of queries are neighbours, and so are those of a tile.
  struct Item {
    int tile;
    int block;               // of 64 queries
    RingPosition at;         // of the tile's first panel
    uint64_t queries, rows;  // descriptors of the first panels
  };

  const ScanArguments& a;
  const Ring& ring;
  Share share;
  int group;
  int blocks;              // of queries; kept, as to look it up between two products takes 30 clocks
  uint64_t queries, rows;  // descriptors: of the group's first block, of the first stage
  int valid_tile = -1;
  uint32_t valid = kAllColumns;
  Maxima<T> before{};

  // The item after `item`; false where there is none. Every group has a block of queries: blocks >= 2.
  template <int kPanels>
  RK_DEVICE bool next(Item& item) const {
    item.block += kConsumerGroups;
    item.queries += encoded(kConsumerGroups * kPanels * kBlockBytes);
    if (item.block >= blocks) {
      item.block = group;
      item.queries = queries;
      item.tile += share.tile_step;
      item.at.stage += kPanels;
      item.rows += encoded(kPanels * kStageBytes);
      if (item.at.stage == ring.stages) {  // whole tiles
        item.at = {0, item.at.parity ^ 1};
        item.rows = rows;
      }
    }
    return item.tile < share.end_tile;
  }

  // All waits come first: a series of wgmma in one block of instructions is committed by the last of them.
  // Were the panels a loop, the compiler would end a series with each panel, and a wait for one series would
  // wait for more.
  template <int kPanels>
  RK_DEVICE void multiply(T (&d)[64], const Item& item) const {
    if (item.block == group) {  // the first product with this tile
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
        barrier_wait(ring.full + item.at.stage + p, item.at.parity);
      }
    }
    wgmma_fence();
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      const uint64_t q = item.queries + encoded(p * kBlockBytes), x = item.rows + encoded(p * kStageBytes);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        wgmma<Element>(d, descriptor_step(q, step), descriptor_step(x, step), p + step > 0);
      }
    }
    wgmma_commit();
  }

  // The product is complete: free the tile if it was the last one with it, and take the maxima.
  template <int kPanels>
  RK_DEVICE void finish(const T (&d)[64], const Item& item) {
    if (item.block + kConsumerGroups >= blocks) {
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
        arrive_warp(ring.empty + item.at.stage + p);
      }
    }
    if constexpr (kWithMaxima) {
      if (a.row_mask != nullptr && item.tile != valid_tile) {
        valid_tile = item.tile;
        valid = valid_columns(a, item.tile);
      }
      const int first_query = (share.query_block * blocks + item.block) * kBlockQueries;
      // The same for the whole warp, as either way it shuffles.
      if (__any_sync(0xFFFFFFFFu, valid != kAllColumns)) {
        step<false>(d, item.tile, first_query);
      } else {
        step<true>(d, item.tile, first_query);
      }
    } else {
      pretend_to_read(a, d);
    }
  }

  template <bool kAllValid>
  RK_DEVICE void step(const T (&d)[64], int tile, int first_query) {
    Maxima<T> maxima;
    maxima.template take<kAllValid>(d, tile, first_query, valid);
    store_words(a, before);
    before = maxima;
  }

  RK_DEVICE void run() {
    static_assert(kMaxWidePanels == 4, "a case each");
    before.first_query = a.num_queries;  // nothing to write yet
    switch (a.plan.panels) {
      case 1:
        run_panels<1>();
        break;
      case 2:
        run_panels<2>();
        break;
      case 3:
        run_panels<3>();
        break;
      default:
        run_panels<4>();
    }
    if constexpr (kWithMaxima) {
      store_words(a, before);
    }
  }

  template <int kPanels>
  RK_DEVICE void run_panels() {
    T even[64], odd[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      even[i] = odd[i] = T{};
    }
    Item item{share.first_tile, group, {}, queries, rows}, other = item;
    if (item.tile >= share.end_tile) {
      return;
    }
    barrier_wait(ring.resident, 0);
    bool is_first = true;
    while (true) {
      multiply<kPanels>(even, item);
      if (!is_first) {
        wgmma_wait<1>(odd);
        finish<kPanels>(odd, other);
      }
      is_first = false;
      other = item;
      if (!next<kPanels>(other)) {
        wgmma_wait<0>(even);
        finish<kPanels>(even, item);
        return;
      }
      multiply<kPanels>(odd, other);
      wgmma_wait<1>(even);
      finish<kPanels>(even, item);
      item = other;
      if (!next<kPanels>(item)) {
        wgmma_wait<0>(odd);
        finish<kPanels>(odd, other);
        return;
      }
    }
  }
};

// kDeep. Both operands stream: a stage is a panel of 128 rows and the same panel of up to 256 queries, of
// which a consumer group owns two blocks, every second one. A stage is free one stage later, when its
// products are; that is told to every block of the cluster, for each loads a part of the queries.
template <class Element, bool kWithMaxima>
struct DeepConsumer {
  using T = typename Element::Accumulator;

  const ScanArguments& a;
  const Ring& ring;
  Share share;
  int group;
  uint32_t stages;

  RK_DEVICE void run() {
    if (group + kConsumerGroups < a.plan.blocks) {
      run_blocks<true>();
    } else {
      run_blocks<false>();
    }
  }

  template <bool kTwo>
  RK_DEVICE void run_blocks() {
    T upper[64], lower[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      upper[i] = lower[i] = T{};
    }
    RingPosition at;
    for (int tile = share.first_tile; tile < share.end_tile; tile += share.tile_step) {
      int previous = at.stage;
#pragma unroll 1
      for (int p = 0; p < a.plan.panels; ++p) {
        barrier_wait(ring.full + at.stage, at.parity);
        const uint32_t stage = stages + static_cast<uint32_t>(at.stage * a.plan.stage_bytes);
        const uint64_t x = descriptor(stage);
        const uint64_t q = descriptor(stage + kStageBytes + static_cast<uint32_t>(group * kBlockBytes));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          wgmma<Element>(upper, descriptor_step(q, step), descriptor_step(x, step), p + step > 0);
        }
        if constexpr (kTwo) {
          const uint64_t q2 = q + encoded(kConsumerGroups * kBlockBytes);
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            wgmma<Element>(lower, descriptor_step(q2, step), descriptor_step(x, step), p + step > 0);
          }
        }
        wgmma_commit();
        if (p > 0) {
          wgmma_wait<1>();
          arrive_warp_at_cluster(ring.empty + previous, a.cluster);
        }
        previous = at.stage;
        at = at.plus(1, ring.stages);
      }
      wgmma_wait<0>(upper);
      if constexpr (kTwo) {
        wgmma_wait<0>(lower);
      }
      arrive_warp_at_cluster(ring.empty + previous, a.cluster);
      if constexpr (kWithMaxima) {
        const uint32_t valid = a.row_mask == nullptr ? kAllColumns : valid_columns(a, tile);
        const int first_query = (share.query_block * a.plan.blocks + group) * kBlockQueries;
        store(upper, tile, first_query, valid);
        if constexpr (kTwo) {
          store(lower, tile, first_query + kConsumerGroups * kBlockQueries, valid);
        }
      } else {
        pretend_to_read(a, upper);
        pretend_to_read(a, lower);
      }
    }
  }

  RK_DEVICE void store(const T (&d)[64], int tile, int first_query, uint32_t valid) const {
    Maxima<T> maxima;
    if (valid == kAllColumns) {
      maxima.template take<true>(d, tile, first_query, valid);
    } else {
      maxima.template take<false>(d, tile, first_query, valid);
    }
    store_words(a, maxima);
  }
};

// kNarrow. Up to 64 queries on N, rows on M: a consumer group multiplies every second tile, both halves of
// it, and only sees the others go by. The maxima go over the eight lanes and four warps that share a query,
// the latter through shared memory.
template <class Element, bool kWithMaxima>
struct NarrowConsumer {
  using T = typename Element::Accumulator;

  const ScanArguments& a;
  const Ring& ring;
  Share share;
  int group;
  uint32_t queries, stages;
  T* exchange;  // [2 halves, 4 warps, 64 queries]

  RK_DEVICE void run() {
    T upper[32], lower[32];  // rows 0..63 and 64..127
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      upper[i] = lower[i] = T{};
    }
    RingPosition at;
    barrier_wait(ring.resident, 0);
    int turn = group;
    for (int tile = share.first_tile; tile < share.end_tile; tile += share.tile_step) {
      turn ^= 1;
      if (turn == 0) {
        pass(at);
        continue;
      }
      int previous = at.stage;
#pragma unroll 1
      for (int p = 0; p < a.plan.panels; ++p) {
        barrier_wait(ring.full + at.stage, at.parity);
        const uint64_t x = descriptor(stages + static_cast<uint32_t>(at.stage * kStageBytes));
        const uint64_t q = descriptor(queries + static_cast<uint32_t>(p * kBlockBytes));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          wgmma<Element>(upper, descriptor_step(x, step), descriptor_step(q, step), p + step > 0);
          wgmma<Element>(lower, descriptor_step(x + encoded(kBlockBytes), step), descriptor_step(q, step),
                         p + step > 0);
        }
        wgmma_commit();
        if (p > 0) {
          wgmma_wait<1>();
          arrive_warp(ring.empty + previous);
        }
        previous = at.stage;
        at = at.plus(1, ring.stages);
      }
      wgmma_wait<0>(upper);
      wgmma_wait<0>(lower);
      arrive_warp(ring.empty + previous);
      if constexpr (kWithMaxima) {
        exchange_maxima(upper, tile, 0);
        exchange_maxima(lower, tile, 1);
        warp_group_sync(group);
        store(tile);
        warp_group_sync(group);
      } else {
        pretend_to_read(a, upper);
        pretend_to_read(a, lower);
      }
    }
  }

  // The tile of the other group.
  RK_DEVICE void pass(RingPosition& at) const {
#pragma unroll 1
    for (int p = 0; p < a.plan.panels; ++p) {
      barrier_wait(ring.full + at.stage, at.parity);
      arrive_warp(ring.empty + at.stage);
      at = at.plus(1, ring.stages);
    }
  }

  // The 16 rows of this warp, for each of 64 queries.
  RK_DEVICE void exchange_maxima(const T (&d)[32], int tile, int half) const {
    const int thread = threadIdx.x % kWarpGroup, warp = thread / kWarp;
    T best[16];  // of columns 8 (i / 2) + 2 (lane % 4) + i % 2
    if (a.row_mask == nullptr) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int first = i / 2 * 4 + i % 2;
        best[i] = larger(larger(d[first], d[first + 2]), lowest(T{}));
      }
    } else {
      bool counts[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = tile * kTileRows + half * kBlockQueries + fragment_row(thread, 2 * i);
        counts[i] = row < a.num_rows && a.row_mask[row];
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int first = i / 2 * 4 + i % 2;
        const T above = counts[0] ? d[first] : lowest(T{}), below = counts[1] ? d[first + 2] : lowest(T{});
        best[i] = larger(larger(above, below), lowest(T{}));
      }
    }
    halve<16>(best, 16, Larger{});
    halve<8>(best, 8, Larger{});
    halve<4>(best, 4, Larger{});
    // What is left has i / 2 = lane / 4.
    T* out = exchange + (half * 4 + warp) * kBlockQueries + 2 * (thread % kWarp);
    out[0] = best[0];
    out[1] = best[1];
  }

  // A group is two of the eight pieces of 16 rows; a thread makes the word of a query.
  RK_DEVICE void store(int tile) const {
    const int query = threadIdx.x % kWarpGroup, row = share.query_block * kBlockQueries + query;
    if (query >= kBlockQueries || row >= a.num_queries) {
      return;
    }
    float of_group[kTileGroups];
#pragma unroll
    for (int g = 0; g < kTileGroups; ++g) {
      const T* pieces = exchange + 2 * g * kBlockQueries + query;
      of_group[g] = as_float(larger(pieces[0], pieces[kBlockQueries]));
    }
    const float maximum = larger(larger(of_group[0], of_group[1]), larger(of_group[2], of_group[3]));
    uint32_t word = rounded_up(maximum);
    const uint32_t rounded = word;
#pragma unroll
    for (int g = 0; g < kTileGroups; ++g) {
      word |= gap_of(rounded, maximum, of_group[g], g);
    }
    a.words[row * a.pitch + tile] = word;
  }
};

// The kernel. Its arguments are the same in every thread; roles differ by warp group, norms are told once.
template <class Element, Shape kShape, bool kWithMaxima>
RK_DEVICE void scan(const ScanArguments& a, const TensorMap* rows, const TensorMap* queries) {
  const int cluster = kShape == Shape::kDeep ? a.cluster : 1;
  const SharedPlan& plan = a.plan;
  unsigned char* memory = aligned_memory();
  const Share share = share_of(blockIdx.x, gridDim.x, a.query_blocks, cluster, a.num_rows);
  const bool measures = Element::kBytes == 2 && share.query_block == 0;
  const Ring ring = make_ring(plan, memory, cluster, measures);
  const int warp = uniform(threadIdx.x / kWarp), warp_group = warp / (kWarpGroup / kWarp);
  if (warp_group == 0) {
    give_registers<kProducerRegisters>();
    if (warp == 0) {
      if (threadIdx.x == 0) {
        tma_prefetch(rows);
        tma_prefetch(queries);
        produce<Element, kShape>(a, share, ring, memory, rows, queries);
      }
    } else if (measures && warp <= kNormWarps) {
      if constexpr (Element::kBytes == 2) {
        measure<Element>(a, share, ring, memory, warp - 1);
      }
    }
  } else {
    take_registers<kConsumerRegisters>();
    const int group = warp_group - 1;
    const uint32_t resident = shared_address(memory), stages = shared_address(memory + plan.stages_at());
    if constexpr (kShape == Shape::kWide) {
      const uint32_t first = resident + static_cast<uint32_t>(group * plan.panels * kBlockBytes);
      const int blocks = uniform(plan.blocks);
      WideConsumer<Element, kWithMaxima>{a, ring, share, group, blocks, descriptor(first), descriptor(stages)}
          .run();
    } else if constexpr (kShape == Shape::kDeep) {
      DeepConsumer<Element, kWithMaxima>{a, ring, share, group, stages}.run();
    } else {
      using T = typename Element::Accumulator;
      T* exchange = reinterpret_cast<T*>(memory + plan.exchange_at() + group * kExchangeBytes);
      NarrowConsumer<Element, kWithMaxima>{a, ring, share, group, resident, stages, exchange}.run();
    }
  }
  if (cluster > 1) {
    cluster_sync();  // the others may still arrive at barriers of this block
  }
}

}  // namespace sm90
}  // namespace cuda
}  // namespace realm_kernels
