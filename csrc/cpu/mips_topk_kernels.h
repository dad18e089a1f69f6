// The four loops of mips_topk that are compiled once per instruction set, and the tables that name them.
#pragma once

#include <cstdint>

#include "cpu/mips_topk.h"

namespace realm_kernels {

// Queries are kept twice: as given, and packed in groups for the register-blocked kernel.
struct PackedQueries {
  const float* packed;      // groups of `query_group` queries (the last may be smaller), each [D][group]
  const float* padded;      // [B][padded_dim], zero-padded, for the row-wise kernel
  int64_t padded_dim;       // D rounded up to a multiple of 8
  const float* norms_x4;    // [B], 4 ||q||, rounded up
  const float* thresholds;  // [B], below the k-th score found so far by more than rounding can hide
  int64_t batch;
};

// A row may matter to a query when !(score < threshold - error), with error = gamma/4 * (4 ||q|| * ||x||).
// The factor four makes the inner product overflow to infinity, and so admit the row, before any partial sum
// of the scan can.
struct ScanBound {
  float gamma_div4;
  double norm_growth;  // what rounding may have taken off a squared norm, as a factor ...
  double norm_floor;   // ... and as an absolute term (underflow)
};

// Memory to fetch while a panel is scanned: the rows of the next one, where they lie in one piece.
struct NextRows {
  const void* rows;
  int64_t bytes;
};

// One query and the rows of a panel that may matter to it, a bit each.
struct PanelHit {
  int32_t query;
  uint32_t rows;
};

struct MipsTopkKernels {
  int panel_rows;   // rows of one packed panel, at most 32
  int query_group;  // queries of one register block
  int direct_max;  // up to this many queries rows are read as they lie: packing would cost more than it saves

  // Packs n <= panel_rows rows into panel[D][panel_rows], zeros beyond n. Returns the largest squared norm,
  // or NaN.
  float (*pack_panel)(const void* rows, ScalarType type, int64_t row_stride, int64_t n, int64_t dim,
                      float* panel);
  // Writes the hits of one panel, at most one for each query; returns how many.
  int64_t (*scan_panel)(const float* panel, float norm, int64_t dim, const PackedQueries& queries,
                        const ScanBound& bound, NextRows next, PanelHit* hits);
  // The same for n <= panel_rows rows as they lie, for batch <= direct_max.
  int64_t (*scan_rows)(const void* rows, ScalarType type, int64_t row_stride, int64_t n, int64_t dim,
                       const PackedQueries& queries, const ScanBound& bound, PanelHit* hits);
  // The canonical score of a query [D] and a row [D]: the contract of the library (docs/design.md, section
  // 4).
  float (*canonical_score)(const float* query, const void* row, ScalarType type, int64_t dim);
};

const MipsTopkKernels& mips_topk_kernels_portable();
#if defined(__x86_64__)
const MipsTopkKernels& mips_topk_kernels_avx2();
const MipsTopkKernels& mips_topk_kernels_avx512();
#endif

}  // namespace realm_kernels
