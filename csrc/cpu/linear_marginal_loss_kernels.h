// What the driver of linear_marginal_loss calls, once for each instruction set.
#pragma once

#include "cpu/linear_marginal_loss.h"

namespace realm_kernels {

// Words of the vocabulary that a thread takes at a time. Long enough that a tile of d_hidden, read and
// written once a block, costs little beside the multiply-adds between; short enough that the block's
// gradients of logits stay in a second-level cache.
constexpr int64_t kBlock = 192;
// Blocks are whole tiles: 6 words of AVX2, 12 of AVX-512.
constexpr int64_t kTileWords = 12;
// Rows are padded to whole vectors of the widest instruction set, so that the workspace is the same for all.
constexpr int64_t kRowMultiple = 32;

namespace {  // a copy for each file: one that the linker chose could be of an instruction set not at hand
constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
}  // namespace

// What of a chunk does not depend on the instruction set: where the workspace keeps what.
struct ChunkLayout {
  int64_t padded_rows, blocks, vocabulary;
  float* largest;  // [blocks, padded_rows]: of a block's logits without the target's
  // [blocks, of panels of rows, of words, of lanes]: exp(logit - largest), 0 at the target; floats, or, for
  // the backward in bfloat16, 16 bits each
  float* exponentials;

  // The tiles are dealt out evenly, as a short last block would leave its thread waiting for the others.
  int64_t first_word(int64_t block) const {
    const int64_t tiles = (vocabulary + kTileWords - 1) / kTileWords;
    const int64_t first = tiles * block / blocks * kTileWords;
    return first < vocabulary ? first : vocabulary;
  }
};

struct RowStatistics {
  float* target_logits;  // [padded_rows]
  float* sums;           // [blocks, padded_rows], of the exponentials of a block
  float* largest;        // [padded_rows], over all blocks
  double* totals;        // [padded_rows], sum over V without the target of exp(logit - largest)
};

struct LinearMarginalLossKernels {
  int64_t lanes;  // rows or columns of a panel
  // Floats of memory. Shared: exponentials, and hidden packed for the first product, or for the third.
  int64_t (*exponentials_size)(const LinearMarginalLossParams& params);
  int64_t (*packed_rows_size)(const LinearMarginalLossParams& params);
  int64_t (*packed_columns_size)(const LinearMarginalLossParams& params);
  // Of one thread: scratch of the forward and of the backward, and its part of d_hidden.
  int64_t (*forward_scratch)(const LinearMarginalLossParams& params);
  int64_t (*backward_scratch)(const LinearMarginalLossParams& params);
  int64_t (*partial_size)(const LinearMarginalLossParams& params);

  // Panels [begin, end) of rows, for the first product; of columns, for the third.
  void (*pack_rows)(const LinearMarginalLossParams& params, int64_t begin, int64_t end, float* packed);
  void (*pack_columns)(const LinearMarginalLossParams& params, int64_t begin, int64_t end, float* packed);

  // Blocks [begin, end) of the vocabulary: logits, their exponentials, statistics of each block.
  void (*forward)(const LinearMarginalLossParams& params, const ChunkLayout& layout, const float* packed,
                  const RowStatistics& statistics, int64_t begin, int64_t end, float* scratch);
  // Of the blocks' statistics, those of rows [begin, end), which begin at a multiple of kRowMultiple.
  void (*merge)(const ChunkLayout& layout, const RowStatistics& statistics, int64_t begin, int64_t end);
  // Blocks [begin, end): gradients of logits, d_weight, d_bias, and a thread's part of d_hidden. at_target
  // [R]: the gradients there.
  void (*backward)(const LinearMarginalLossParams& params, const ChunkLayout& layout, const float* packed,
                   const float* at_target, int64_t begin, int64_t end, float* scratch, float* partial);
  // d_hidden of rows [begin, end): the sum of the threads' parts, which lie `stride` floats apart.
  void (*reduce)(const LinearMarginalLossParams& params, const float* partials, int64_t stride, int parts,
                 int64_t begin, int64_t end);
  void (*scale)(const ScaledArray& array, float scale, int64_t begin, int64_t end);
};

const LinearMarginalLossKernels& linear_marginal_loss_kernels_portable();
#if defined(__x86_64__)
const LinearMarginalLossKernels& linear_marginal_loss_kernels_avx2();
const LinearMarginalLossKernels& linear_marginal_loss_kernels_avx512();
const LinearMarginalLossKernels& linear_marginal_loss_kernels_avx512_bf16();
#endif

}  // namespace realm_kernels
