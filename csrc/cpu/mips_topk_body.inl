// The body of mips_topk's CPU kernels, included once by each mips_topk_<isa>.cpp, which sets kWidth,
// kQueryGroup and kCodeGroup.
//
// Written in GCC's vector extension, which GCC and clang lower to any width and architecture. Nothing here
// may instantiate a template or inline function of another header: the linker could keep a copy built for
// AVX-512.
#include <cstdint>

#include "cpu/mips_topk_codes.inl"
#include "cpu/mips_topk_kernels.h"
#include "cpu/mips_topk_lanes.inl"
#include "cpu/mips_topk_panels.inl"
#include "cpu/mips_topk_rows.inl"

namespace realm_kernels {
namespace {

// The one switch over the table's dtype.
template <class Function>
inline auto with_rows(const void* rows, ScalarType type, Function&& function) {
  switch (type) {
    case ScalarType::kBFloat16:
      return function(static_cast<const BFloat16*>(rows));
    case ScalarType::kFloat16:
      return function(static_cast<const Float16*>(rows));
    default:
      return function(static_cast<const float*>(rows));
  }
}

PanelRows pack_panel(const void* rows, ScalarType type, int64_t row_stride, int64_t n, int64_t dim,
                     float* panel) {
  if (kBFloat16Pairs && type == ScalarType::kBFloat16) {
    return pack_pairs(static_cast<const BFloat16*>(rows), row_stride, n, dim, panel);
  }
  return with_rows(rows, type, [&](auto* typed) { return pack_panel_of(typed, row_stride, n, dim, panel); });
}

int64_t scan_panel(const float* panel, float norm, uint32_t keep, const PackedQueries& queries,
                   const ScanBound& bound, NextRows next, PanelHit* hits) {
  return queries.pairs
             ? scan_panel_by<TwoDimensions>(panel, norm, keep, queries.panel_dim, queries, bound, next, hits)
             : scan_panel_by<OneDimension>(panel, norm, keep, queries.panel_dim, queries, bound, next, hits);
}

int64_t scan_rows(const void* rows, ScalarType type, int64_t row_stride, int64_t n, uint32_t keep,
                  int64_t dim, const PackedQueries& queries, const ScanBound& bound, PanelHit* hits) {
  if constexpr (kLanesMax > 0) {
    if (queries.scan == RowScan::kLanes) {
      return scan_lanes(rows, type, row_stride, n, keep, dim, queries, bound, hits);
    }
  }
  return with_rows(rows, type, [&](auto* typed) {
    return scan_any_rows_of(typed, row_stride, n, keep, dim, queries, bound, hits);
  });
}

float canonical_score(const float* query, const void* row, ScalarType type, int64_t dim) {
  return with_rows(row, type, [&](auto* typed) { return canonical_score_of(query, typed, dim); });
}

CodeBounds encode_panel(const void* rows, ScalarType type, int64_t row_stride, int64_t n, int64_t dim,
                        const float* mean, uint8_t* codes) {
  return with_rows(rows, type,
                   [&](auto* typed) { return encode_panel_of(typed, row_stride, n, dim, mean, codes); });
}

constexpr MipsTopkKernels kKernels = {kPanelRows, kQueryGroup,     kDirectMax,     kLanesMax,  kMaxLanes,
                                      kCodeGroup, kQueryCodeMax,   kBFloat16Pairs, pack_panel, scan_panel,
                                      scan_rows,  canonical_score, encode_panel,   scan_codes, refine};

}  // namespace
}  // namespace realm_kernels
