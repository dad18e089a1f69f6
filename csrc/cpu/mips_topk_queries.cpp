#include "cpu/mips_topk_queries.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace realm_kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Of the scale of a query: as small as that of a panel of rows (mips_topk_codes.inl).
constexpr float kLeastScale = 0x1p-60f;
// Beyond this norm a product with codes might overflow, and is not looked at.
constexpr double kGreatestNorm = 0x1p100;

// Above the value by more than its rounding.
float at_least(double value) {
  const float rounded = static_cast<float>(value * (1.0 + 0x1p-20));
  return std::isnan(rounded) ? kInfinity : std::nextafter(rounded, kInfinity);
}

// Rounded to nearest, ties to even; zero for what is subnormal or NaN.
float as_bfloat16(float value) {
  if (!(std::abs(value) >= std::numeric_limits<float>::min())) {
    return 0.0f;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
  float rounded;
  std::memcpy(&rounded, &bits, sizeof rounded);
  return rounded;
}

QueryGroups groups_of(int64_t batch, int64_t most) {
  // Of nearly equal size: a small last group would leave multiply-add units waiting for each other.
  const int64_t count = (batch + most - 1) / most;
  return {count, batch / count, batch % count, 1};
}

// Of one size, the smallest that holds the batch, or the one of the two largest that leaves fewer lanes
// empty. Two vectors hold the largest.
QueryGroups lanes_of(int64_t batch, int64_t most) {
  int64_t best = most;
  for (int64_t size = most / 2; size >= 4 && (size == most / 2 || size >= batch); size /= 2) {
    if ((batch + size - 1) / size * size < (batch + best - 1) / best * best) {
      best = size;
    }
  }
  return {(batch + best - 1) / best, best, 0, std::max<int64_t>(1, most / 2 / best)};
}

RowScan row_scan(const MipsTopkParams& params, const MipsTopkKernels& kernels, bool pairs, int64_t batch) {
  // The rows of a tile that lie a multiple of 2 KiB apart would share too few lines of the first cache.
  const bool apart = params.dim * element_size(params.table_type) % 2048 != 0;
  const bool few = batch <= (pairs ? 1 : kernels.direct_max);
  if ((pairs || params.table_type == ScalarType::kFloat32) && apart && !few && batch <= kernels.lanes_max) {
    return RowScan::kLanes;
  }
  return batch <= kernels.direct_max ? RowScan::kTiles : RowScan::kPanels;
}

// Calls visit(q, group, size, place) for every query: the first query of its group, the group's size, and its
// place in the group.
template <class Visit>
void for_each_query(const QueryGroups& groups, const Visit& visit) {
  int64_t first = 0;
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t size = groups.size + (g < groups.larger ? 1 : 0);
    for (int64_t place = 0; place < size; ++place) {
      visit(first + place, first, size, place);
    }
    first += size;
  }
}

}  // namespace

double accumulation_gamma(int64_t dim) {
  const double nu = std::ldexp(static_cast<double>(dim + 8), -24);
  return nu < 1.0 ? nu / (1.0 - nu) * (1.0 + 0x1p-10) : std::numeric_limits<double>::infinity();
}

QueryBlock::QueryBlock(const MipsTopkParams& params, const MipsTopkKernels& kernels, int64_t first_query,
                       int64_t count)
    : first(first_query),
      batch(count),
      queries_(params.queries + first_query * params.dim),
      dim_(params.dim) {
  if (params.mean != nullptr) {
    pad(batch, 8, false);
    encode(kernels, params.mean);
    return;
  }
  norms_x4_.resize(batch);
  for (int64_t q = 0; q < batch; ++q) {
    double square = 0.0;
    for (int64_t d = 0; d < dim_; ++d) {
      square += static_cast<double>(query(q)[d]) * query(q)[d];
    }
    norms_x4_[q] = at_least(4.0 * std::sqrt(square));
  }
  pairs_ = kernels.bfloat16_pairs && params.table_type == ScalarType::kBFloat16;
  scan_ = row_scan(params, kernels, pairs_, batch);
  if (scan_ == RowScan::kTiles) {
    pairs_ = false;
    pad((batch + 3) / 4 * 4, 16, params.table_type == ScalarType::kBFloat16);
  } else {
    groups_ =
        scan_ == RowScan::kLanes ? lanes_of(batch, kernels.max_lanes) : groups_of(batch, kernels.query_group);
    pack();
  }
}

// The query rounded to bfloat16; what that took off it joins its norm, as the bound of the scan has it.
template <class At>
void QueryBlock::pack_pairs(int64_t q, const At& at) {
  double residual = 0.0;
  for (int64_t d = 0; d < dim_; ++d) {
    const float value = query(q)[d], rounded = as_bfloat16(value);
    residual += (static_cast<double>(value) - rounded) * (static_cast<double>(value) - rounded);
    uint32_t bits, pair;
    std::memcpy(&bits, &rounded, sizeof bits);
    std::memcpy(&pair, at(d / 2), sizeof pair);
    pair |= d % 2 == 0 ? bits >> 16 : bits;
    std::memcpy(at(d / 2), &pair, sizeof pair);
  }
  norms_x4_[q] = at_least(norms_x4_[q] + 4.0 * std::sqrt(residual) * (1.0 + 1.0 / accumulation_gamma(dim_)));
}

void QueryBlock::pack() {
  const int64_t split = groups_.split;
  panel_dim_ = ((pairs_ ? (dim_ + 1) / 2 : dim_) + split - 1) / split * split;
  packed_.assign((groups_.count * groups_.size + groups_.larger) * panel_dim_, 0.0f);
  for_each_query(groups_, [&](int64_t q, int64_t group, int64_t size, int64_t place) {
    if (q >= batch) {  // a lane without a query
      return;
    }
    float* const to = packed_.data() + group * panel_dim_ + place * split;
    const auto at = [&](int64_t d) { return to + d / split * size * split + d % split; };
    if (pairs_) {
      pack_pairs(q, at);
    } else {
      for (int64_t d = 0; d < dim_; ++d) {
        *at(d) = query(q)[d];
      }
    }
  });
}

void QueryBlock::pad(int64_t rows, int64_t multiple, bool even_first) {
  padded_dim_ = (dim_ + multiple - 1) / multiple * multiple;
  padded_.assign(rows * padded_dim_, 0.0f);
  for (int64_t q = 0; q < batch; ++q) {
    for (int64_t d = 0; d < dim_; ++d) {
      const int64_t place = even_first ? d / 16 * 16 + d % 2 * 8 + d % 16 / 2 : d;
      padded_[q * padded_dim_ + place] = query(q)[d];
    }
  }
}

void QueryBlock::encode(const MipsTopkKernels& kernels, const float* mean) {
  const int64_t quads = (dim_ + 7) / 8 * 2;
  groups_ = groups_of(batch, kernels.code_group);
  codes_.assign(batch * quads, 0);
  code_sums_.resize(batch);
  for (auto* values : {&inverse_scales_, &offsets_, &norms_, &residual_norms_}) {
    values->resize(batch);
  }
  for_each_query(groups_, [&](int64_t q, int64_t group, int64_t size, int64_t place) {
    const float* values = query(q);
    float largest = 0.0f;
    double square = 0.0, offset = 0.0;
    for (int64_t d = 0; d < dim_; ++d) {
      const float magnitude = std::abs(values[d]);
      largest = magnitude > largest && magnitude < kInfinity ? magnitude : largest;
      square += static_cast<double>(values[d]) * values[d];
      offset += static_cast<double>(values[d]) * mean[d];
    }
    const float most = static_cast<float>(kernels.query_code_max);
    const float scale = std::max(largest / most, kLeastScale);
    double residual = 0.0;
    int32_t sum = 0;
    for (int64_t d = 0; d < dim_; ++d) {
      const float ratio = values[d] / scale;
      const int32_t code =
          std::isfinite(ratio) ? static_cast<int32_t>(std::clamp(std::nearbyint(ratio), -most, most)) : 0;
      const double left = static_cast<double>(values[d]) - static_cast<double>(scale) * code;
      residual += left * left;
      sum += code;
      int32_t& quad = codes_[group * quads + d / 4 * size + place];
      quad |= static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint8_t>(code)) << (8 * (d % 4)));
    }
    code_sums_[q] = 128 * sum;
    inverse_scales_[q] = 1.0f / scale;
    offsets_[q] = static_cast<float>(offset);
    const double norm = std::sqrt(square);
    norms_[q] = norm < kGreatestNorm ? at_least(norm) : kInfinity;
    residual_norms_[q] = at_least(std::sqrt(residual));
  });
}

PackedQueries QueryBlock::packed(const float* thresholds) const {
  return {scan_,          packed_.data(), panel_dim_,       pairs_,     groups_,
          padded_.data(), padded_dim_,    norms_x4_.data(), thresholds, batch};
}

QueryCodes QueryBlock::codes(const float* thresholds, int32_t* cutoffs) const {
  return {codes_.data(),   groups_,           padded_.data(),
          padded_dim_,     code_sums_.data(), inverse_scales_.data(),
          offsets_.data(), norms_.data(),     residual_norms_.data(),
          thresholds,      cutoffs,           batch};
}

}  // namespace realm_kernels
