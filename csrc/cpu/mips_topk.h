// Exact top-k by inner product on the CPU: one pass over the rows in float32 or over their codes, canonical
// float64 scores for the few rows that the pass cannot exclude. Raw pointers and sizes; Python has validated
// them.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace realm_kernels {

enum class ScalarType { kFloat32, kBFloat16, kFloat16 };

inline int64_t element_size(ScalarType type) { return type == ScalarType::kFloat32 ? 4 : 2; }

// What bounds the error of a panel of codes (mips_topk_codes.inl).
struct CodeBounds {
  float scale;
  float residual_norm;
  float code_norm;
};

constexpr int kCodeRows = 32;             // of a panel of codes
constexpr int64_t kMaxCodeDim = 1 << 14;  // sums of products stay below 2^30

struct TableShard {
  const void* rows;  // [num_rows, D], the elements of one row contiguous
  int64_t num_rows;
  int64_t row_stride;        // elements from one row to the next
  const uint8_t* codes;      // [panels, code_panel_bytes(D)], or null
  const CodeBounds* bounds;  // [panels]
};

struct MipsTopkParams {
  const float* queries;      // [B, D], contiguous
  const TableShard* shards;  // [S]
  int64_t num_shards;
  const float* mean;  // [D], what the codes of all shards are relative to; null: the shards have no codes
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

int64_t code_panel_bytes(int64_t dim);

struct EncodeParams {
  const void* rows;  // [num_rows, D], as in TableShard
  int64_t num_rows;
  int64_t row_stride;
  const float* mean;
  ScalarType table_type;
  int64_t dim;         // at most kMaxCodeDim
  uint8_t* codes;      // [panels, code_panel_bytes(D)], written
  CodeBounds* bounds;  // [panels], written
  int num_threads;
  Isa isa;
};

// int8 codes of a shard. The last panel is filled with codes of zero.
void launch_encode(const EncodeParams& params);

}  // namespace realm_kernels
