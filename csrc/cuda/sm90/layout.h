// The index arithmetic of the Hopper scan: tiles, who owns which accumulator, where a byte lies in swizzled
// shared memory, what a matrix descriptor says, when a barrier's phase is over. Plain constexpr functions, so
// that the kernels (nvcc) and their model on a CPU (g++, tests/cuda_model) use the same ones.
#pragma once

#include "cuda/mips_topk_words.h"

namespace realm_kernels {
namespace cuda {
namespace sm90 {

// A *panel* is 128 bytes of columns: 64 of a half type, 128 of int8. That is the widest row the 128-byte
// swizzle knows, and both TMA and wgmma then work on atoms of 8 rows x 128 bytes. A tile is 128 rows of the
// table; one panel of a tile is a stage of the ring.
constexpr int kPanelBytes = 128;
constexpr int kAtomRows = 8;
constexpr int kAtomBytes = kAtomRows * kPanelBytes;   // 1 KiB; every operand starts on a multiple of it
constexpr int kStageBytes = kTileRows * kPanelBytes;  // 16 KiB
constexpr int kBlockQueries = 64;                     // M of wgmma, or N where rows are on M
constexpr int kBlockBytes = kBlockQueries * kPanelBytes;
constexpr int kStepBytes = 32;  // K of one wgmma: 16 halves or 32 int8
constexpr int kSteps = kPanelBytes / kStepBytes;
constexpr int kNormRows = 64;  // of a tile, for each norm warp

// One warp group loads and measures, two multiply. 2 * 128 * 224 + 128 * 56 = 64,512 of 65,536 registers.
constexpr int kWarp = 32;
constexpr int kWarpGroup = 128;
constexpr int kConsumerGroups = 2;
constexpr int kConsumerWarps = kConsumerGroups * kWarpGroup / kWarp;
constexpr int kThreads = kWarpGroup * (1 + kConsumerGroups);
constexpr int kNormWarps = 2;
constexpr int kProducerRegisters = 56;   // sixteen sums and eight vectors of a norm warp
constexpr int kConsumerRegisters = 224;  // 128 accumulators
static_assert(kWarpGroup * (kProducerRegisters + kConsumerGroups * kConsumerRegisters) <= 65536, "registers");
static_assert(kProducerRegisters % 8 == 0 && kConsumerRegisters % 8 == 0, "setmaxnreg counts in eights");
static_assert(kNormWarps * kNormRows == kTileRows, "norm warps share a tile");

constexpr int kSharedBytes = 227 * 1024;  // of a block on sm_90
constexpr int kMaxStages = 12;
constexpr int kBarrierBytes = (2 * kMaxStages + 1) * 8;
constexpr int kExchangeBytes = 2 * 4 * kBlockQueries * 4;  // per consumer group of the narrow scan

// Accumulator i of a thread of the warp group, m64nN: PTX ISA, "Register Fragments for
// wgmma.mma_async.m64nNk16" (matrix D). A warp owns 16 rows, four lanes a row, each lane two neighbouring
// columns of every eight, and the same again eight rows below.
RK_BOTH constexpr int fragment_row(int thread, int i) {
  return 16 * (thread / kWarp) + thread % kWarp / 4 + 8 * (i / 2 % 2);
}
RK_BOTH constexpr int fragment_column(int thread, int i) { return 8 * (i / 4) + 2 * (thread % 4) + i % 2; }

// CU_TENSOR_MAP_SWIZZLE_128B and the descriptor's mode 1: bits 4..6 of the shared address, which 16 bytes of
// the row, are xored with bits 7..9, which row of the atom. An involution within each row of 128 bytes.
RK_BOTH constexpr uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// Matrix descriptor of a K-major operand in the 128-byte swizzle (PTX ISA, "Matrix Descriptor Format" of
// wgmma; x is encoded as (x & 0x3FFFF) >> 4):
//   bits  0..13  start address
//   bits 16..29  leading dimension byte offset: not used by swizzled K-major layouts, "assumed to be 1"
//   bits 32..45  stride dimension byte offset: from one group of 8 rows to the next, here 1024
//   bits 49..51  base offset: 0, as every atom starts on a multiple of 1024
//   bits 62..63  swizzle mode, 1 = 128 bytes
// A step of 32 bytes along K only adds to the start address: the swizzle is a function of the final address.
RK_BOTH constexpr uint64_t encoded(uint32_t x) { return (x & 0x3FFFF) >> 4; }
RK_BOTH constexpr uint64_t descriptor(uint32_t address) {
  return encoded(address) | (uint64_t{1} << 16) | (encoded(kAtomBytes) << 32) | (uint64_t{1} << 62);
}
RK_BOTH constexpr uint64_t descriptor_step(uint64_t operand, int step) {
  return operand + encoded(kStepBytes) * static_cast<uint64_t>(step);
}
static_assert(encoded(kAtomBytes) == 64, "eight rows of 128 bytes, in units of 16");

// A position in the ring of stages. The consumer of a stage waits for the phase `parity` of its full barrier,
// the producer for the phase before that of its empty one: at the start a fresh barrier lets it pass, for
// "the phase of parity 1" of a barrier that is in its phase 0 counts as over.
//
// A parity tells a phase from the one before it and no more: who waits for a phase must have seen the one
// before. So all who read the ring wait for every stage of it, and free every one, those that others work on
// too. Taking only every second tile, a group could take a stage for loaded that still waits for the tile
// between.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  RK_BOTH constexpr uint32_t empty_parity() const { return parity ^ 1; }
  RK_BOTH constexpr RingPosition plus(int steps, int stages) const {  // steps <= stages
    const int next = stage + steps;
    return next >= stages ? RingPosition{next - stages, parity ^ 1} : RingPosition{next, parity};
  }
};

// Shapes of the scan. kWide: queries on M, all panels of up to 512 of them stay in shared memory. kDeep:
// queries on M, both operands stream, for rows too wide for kWide. kNarrow: rows on M, up to 64 queries stay.
enum class Shape { kWide, kDeep, kNarrow };

// The blocks of a cluster take neighbouring tiles and the same queries. Where queries stream, each loads a
// part of every panel of them for the whole cluster, and L2 is asked for the panel once. Two blocks fit any
// pair of multiprocessors; how many clusters of four do, a device tells.
constexpr int kSmallCluster = 2, kLargeCluster = 4;

// Which tiles and queries a persistent block owns. Clusters of different query blocks that read the same
// tiles have neighbouring numbers, read them at about the same time, and share them in L2. All blocks of a
// cluster take as many tiles, for each waits for the others' loads: the last ones may hold no rows, only
// zeros.
struct Share {
  int query_block;
  int rank;  // in the cluster
  int first_tile, tile_step, end_tile;
};
RK_BOTH constexpr Share share_of(int block, int num_blocks, int query_blocks, int cluster, int num_rows) {
  const int index = block / cluster, rank = block % cluster;
  return {index % query_blocks, rank, index / query_blocks * cluster + rank, num_blocks / query_blocks,
          ceil_div(num_rows, cluster * kTileRows) * cluster};
}

constexpr int kDeepBlocks = 4;  // of queries: two a consumer group, 2 x 64 accumulators
constexpr int kMaxWideBlocks = 8;
constexpr int kMaxWidePanels = 4;  // two tiles of more leave no room for two blocks of queries

// Shared memory of a block: [aligning][resident queries][stages][exchange of kNarrow][barriers].
struct SharedPlan {
  int blocks;       // of 64 queries
  int panels;       // of a row
  int resident;     // bytes of queries that stay
  int stage_bytes;  // of a stage: a panel of a tile, and in kDeep of the queries
  int stages;
  int exchange;

  RK_BOTH constexpr int stages_at() const { return resident; }
  RK_BOTH constexpr int exchange_at() const { return resident + stages * stage_bytes; }
  RK_BOTH constexpr int barriers_at() const { return exchange_at() + exchange; }
  RK_BOTH constexpr int bytes() const { return kAtomBytes + barriers_at() + kBarrierBytes; }
};

RK_BOTH constexpr SharedPlan shared_plan(Shape shape, int blocks, int panels) {
  SharedPlan plan{};
  plan.blocks = blocks;
  plan.panels = panels;
  plan.resident = shape == Shape::kDeep ? 0 : blocks * panels * kBlockBytes;
  plan.stage_bytes = kStageBytes + (shape == Shape::kDeep ? blocks * kBlockBytes : 0);
  plan.exchange = shape == Shape::kNarrow ? kConsumerGroups * kExchangeBytes : 0;
  const int left = kSharedBytes - kAtomBytes - kBarrierBytes - plan.exchange - plan.resident;
  plan.stages = left < 0 ? 0 : left / plan.stage_bytes;
  plan.stages = plan.stages > kMaxStages ? kMaxStages : plan.stages;
  if (shape == Shape::kWide) {  // whole tiles: their panels are neighbours
    plan.stages -= plan.stages % panels;
  }
  return plan;
}

// kWide keeps a tile until all its products are done, while the next one is already being multiplied: two
// tiles must fit, or a consumer waits for a stage that only it can free.
RK_BOTH constexpr bool fits(Shape shape, const SharedPlan& plan) {
  return shape == Shape::kWide     ? plan.stages >= 2 * plan.panels && plan.panels <= kMaxWidePanels
         : shape == Shape::kNarrow ? plan.stages >= 4
                                   : plan.stages >= 3;
}
static_assert(shared_plan(Shape::kWide, 2, kMaxWidePanels + 1).stages < 2 * (kMaxWidePanels + 1),
              "no more fit");

// REALM's shapes, in panels of 128 bytes: D = 128 and 768 in a half type, 512 queries at once.
static_assert(shared_plan(Shape::kWide, 8, 2).stages == 6, "three tiles beside 512 queries of 128 halves");
static_assert(fits(Shape::kWide, shared_plan(Shape::kWide, 8, 1)), "512 queries of 128 int8");
static_assert(shared_plan(Shape::kDeep, 4, 12).stages == 4, "256 queries x 128 rows, any width");
static_assert(shared_plan(Shape::kNarrow, 1, 12).stages == 7, "64 queries of 768 halves");

}  // namespace sm90
}  // namespace cuda
}  // namespace realm_kernels
