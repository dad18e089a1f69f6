// The arguments of a search, as the caller gives them: no CUDA in here.
#pragma once

#include <cstdint>

namespace realm_kernels {
namespace cuda {

enum class Number { kFloat32, kBFloat16, kFloat16 };
enum class Scanned { kBFloat16, kFloat16, kInt8 };  // what the scan multiplies

// What a plan depends on.
struct SearchShape {
  int64_t batch, num_rows, dim, k, num_excluded;
  Scanned scanned;
  bool is_exact;        // queries are not rounded for the scan
  int code_group;       // rows of a group of codes; 0: rows are scanned as they are
  int multiprocessors;  // of the device
  int large_clusters;   // of kLargeCluster blocks of the scan that run at once on it
  int64_t workspace;    // bytes at most
};

// One block of queries over one piece of a table. B queries, N rows, D columns, E excluded ids.
struct MipsTopkParams {
  const void* queries;  // [B, D], with the strides below
  Number query_type;
  int64_t query_stride, query_stride_d;
  const void* rows;  // [N, D]; elements of a row contiguous
  Number row_type;
  int64_t row_stride;
  bool aligned;  // rows start on multiples of 16 bytes
  int batch, num_rows, dim, k;
  int64_t first_row;       // its id
  const bool* row_mask;    // [N], or null
  const int64_t* exclude;  // [B, E] ids, with the strides below; those that no row has exclude nothing
  int num_excluded;
  int64_t exclude_stride, exclude_stride_e;

  const int8_t* codes;  // [N / code_group * code_group, code_pitch], or null: rows are scanned as they are
  int64_t code_pitch;   // a multiple of 16
  const float* mean;    // [D] what codes are relative to
  const float* code_bounds;  // [N / code_group, 3]: step, residual norm, code norm
  int code_group;            // 32, 64, 128 or a multiple

  float* scores;                // [B, k], written
  int64_t* indices;             // [B, k], written
  unsigned long long* repairs;  // how many certificates failed, counted on
};

}  // namespace cuda
}  // namespace realm_kernels
