// A block of queries as the kernels read it: as it is, packed in groups, or as int8 codes.
#pragma once

#include <vector>

#include "cpu/mips_topk_kernels.h"

namespace realm_kernels {

// A float32 sum of D products in any order is off by at most gamma times the sum of their magnitudes, gamma =
// n u / (1 - n u), u = 2^-24 (Higham, Accuracy and Stability, section 3.1); n leaves room for the last few
// additions.
double accumulation_gamma(int64_t dim);

class QueryBlock {
 public:
  QueryBlock(const MipsTopkParams& params, const MipsTopkKernels& kernels, int64_t first, int64_t batch);

  const float* query(int64_t q) const { return queries_ + q * dim_; }
  // Views; the arrays that change during a search are the caller's.
  PackedQueries packed(const float* thresholds) const;
  QueryCodes codes(const float* thresholds, int32_t* cutoffs) const;

  const int64_t first;  // query of the call
  const int64_t batch;

 private:
  void pack();
  template <class At>
  void pack_pairs(int64_t q, const At& at);
  void pad(int64_t rows, int64_t multiple, bool even_first);
  void encode(const MipsTopkKernels& kernels, const float* mean);

  const float* queries_;
  int64_t dim_;
  int64_t padded_dim_ = 0, panel_dim_ = 0;
  bool pairs_ = false;
  RowScan scan_ = RowScan::kTiles;
  QueryGroups groups_ = {};
  std::vector<float> packed_, padded_, norms_x4_;
  std::vector<int32_t> codes_, code_sums_;
  std::vector<float> inverse_scales_, offsets_, norms_, residual_norms_;
};

}  // namespace realm_kernels
