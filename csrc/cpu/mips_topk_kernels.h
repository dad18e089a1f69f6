// The loops of mips_topk that are compiled once per instruction set, and the tables that name them.
#pragma once

#include <cstdint>

#include "cpu/mips_topk.h"

namespace realm_kernels {

// Queries that are scanned together, at most.
constexpr int kMaxQueryBlock = 512;

// A batch of queries in groups of one register block each: the first `larger` groups hold size + 1 queries,
// the others `size`.
// With lanes groups are of one size, and `split` dimensions of a query lie together (mips_topk_lanes.inl).
struct QueryGroups {
  int64_t count;
  int64_t size;
  int64_t larger;
  int64_t split = 1;
};

// How rows are scanned: as they lie, in tiles with a few queries or by queries in the lanes of vectors; or
// packed in panels.
enum class RowScan { kTiles, kLanes, kPanels };

// Queries as the scan of a batch reads them: row by row for tiles, else packed in groups.
struct PackedQueries {
  RowScan scan;
  const float* packed;  // each group [panel_dim / split][its size][split]
  int64_t panel_dim;    // D, or half of it where pairs
  bool pairs;           // of bfloat16, in the place of one float32
  QueryGroups groups;
  const float*
      padded;          // [B rounded up to a multiple of 4][padded_dim], zero-padded, in the order of load16()
  int64_t padded_dim;  // D rounded up to a multiple of 16
  const float* norms_x4;    // [B], 4 ||q||, rounded up
  const float* thresholds;  // [B], below the k-th score found so far by more than rounding can hide
  int64_t batch;
};

// A row may matter to a query when !(score < threshold - error), with error = gamma/4 * (4 ||q|| * ||x||);
// where the query was rounded, q = q^ + f, ||f|| / gamma is added to ||q||. The factor four makes the inner
// product overflow to infinity, and so admit the row, before any partial sum of the scan can.
struct ScanBound {
  float gamma_div4;
  float norm_growth;  // what rounding may have taken off a squared norm, as a factor ...
  float norm_floor;   // ... and as an absolute term (underflow)
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

// What is known of a canonical score: it lies between the two, ends included, or is NaN and `lower` is
// -infinity.
struct ScoreInterval {
  float lower;
  float upper;
};

// Queries as the scan of int8 codes reads them: q = t d + f with integers |d| <= query_code_max.
struct QueryCodes {
  const int32_t* packed;  // each group [D / 4 rounded up to even][its size], four codes to a number
  QueryGroups groups;
  const float* padded;          // [B][padded_dim], the queries themselves, zero-padded
  int64_t padded_dim;           // D rounded up to a multiple of 8
  const int32_t* code_sums;     // [B], 128 times the sum of d
  const float* inverse_scales;  // [B], 1 / t
  const float* offsets;         // [B], q . mean
  const float* norms;           // [B], at least ||q||; infinite where a product could overflow
  const float* residual_norms;  // [B], at least ||f||
  const float* thresholds;      // [B]
  int32_t* cutoffs;             // [B], scratch of the scan
  int64_t batch;
};

// Of the rows of a packed panel: the largest squared norm of those without NaN, and which have one, a bit
// each. A row with NaN scores NaN whatever the query, and is never returned.
struct PanelRows {
  float square;
  uint32_t nan;
};

struct MipsTopkKernels {
  int panel_rows;       // rows of one packed panel, at most 32
  int query_group;      // queries of one register block
  int direct_max;       // up to this many queries are scanned in tiles,
  int lanes_max;        // and in lanes
  int max_lanes;        // queries of a group of these: this many, half of it, ..., 4
  int code_group;       // queries of one register block of the scan of codes
  int query_code_max;   // so that no sum of products saturates
  bool bfloat16_pairs;  // panels of bfloat16 rows are packed in pairs

  // Packs n <= panel_rows rows into panel[panel_dim][panel_rows], zeros beyond n.
  PanelRows (*pack_panel)(const void* rows, ScalarType type, int64_t row_stride, int64_t n, int64_t dim,
                          float* panel);
  // Writes the hits of one panel among the rows `keep`, at most one for each query; returns how many.
  int64_t (*scan_panel)(const float* panel, float norm, uint32_t keep, const PackedQueries& queries,
                        const ScanBound& bound, NextRows next, PanelHit* hits);
  // The same for n <= panel_rows rows as they lie.
  int64_t (*scan_rows)(const void* rows, ScalarType type, int64_t row_stride, int64_t n, uint32_t keep,
                       int64_t dim, const PackedQueries& queries, const ScanBound& bound, PanelHit* hits);
  // The canonical score of a query [D] and a row [D]: the contract of the library (docs/design.md, section
  // 4).
  float (*canonical_score)(const float* query, const void* row, ScalarType type, int64_t dim);

  // Codes of n <= kCodeRows rows: one panel, and what bounds its error.
  CodeBounds (*encode_panel)(const void* rows, ScalarType type, int64_t row_stride, int64_t n, int64_t dim,
                             const float* mean, uint8_t* codes);
  // The hits of one panel of codes among the rows `keep`. `next` bytes behind it are fetched meanwhile.
  int64_t (*scan_codes)(const uint8_t* codes, const CodeBounds& bounds, uint32_t keep, int64_t dim,
                        const QueryCodes& queries, int64_t next, PanelHit* hits);
  // What the codes say of the score of a row and the query as it is, without the error of its own codes.
  ScoreInterval (*refine)(const uint8_t* codes, const CodeBounds& bounds, int64_t dim,
                          const QueryCodes& queries, int64_t query, int64_t row);
};

const MipsTopkKernels& mips_topk_kernels_portable();
#if defined(__x86_64__)
const MipsTopkKernels& mips_topk_kernels_avx2();
const MipsTopkKernels& mips_topk_kernels_avx512();
const MipsTopkKernels& mips_topk_kernels_avx512_vnni();
const MipsTopkKernels& mips_topk_kernels_avx512_bf16();
#endif

// Those of an instruction set.
const MipsTopkKernels& mips_topk_kernels(Isa isa);

}  // namespace realm_kernels
