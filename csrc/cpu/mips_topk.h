// Exact top-k by inner product on the CPU: one pass over the rows in float32, canonical float64 scores for
// the few rows that the pass cannot exclude. Raw pointers and sizes; Python has validated them.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace realm_kernels {

enum class ScalarType { kFloat32, kBFloat16, kFloat16 };

struct TableShard {
  const void* rows;  // [num_rows, D], the elements of one row contiguous
  int64_t num_rows;
  int64_t row_stride;  // elements from one row to the next
};

struct MipsTopkParams {
  const float* queries;      // [B, D], contiguous
  const TableShard* shards;  // [S]
  int64_t num_shards;
  ScalarType table_type;
  int64_t batch;           // B
  int64_t dim;             // D
  int64_t k;               // 1 <= k <= N
  const int64_t* exclude;  // [B, E], each list ascending; null: nothing is excluded
  int64_t num_exclude;     // E
  const bool* row_mask;    // [N], false: never returned; null: every row may be
  float* scores;           // [B, k], written
  int64_t* indices;        // [B, k], written
  int num_threads;
  Isa isa;
};

// How many rows were rescored in float64, over all queries: what the scan could not exclude.
int64_t launch_mips_topk(const MipsTopkParams& params);

}  // namespace realm_kernels
