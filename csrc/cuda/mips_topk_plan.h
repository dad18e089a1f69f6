// How the CUDA backend searches one piece of a table: shape of the scan, slack, the workspace. A plan
// depends on shapes, dtypes and budgets only. Its constants are reasoned (docs/hopper_scan.md), not measured.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "cuda/mips_topk_rescore.h"
#include "cuda/sm90/scan_parts.h"

namespace realm_kernels {
namespace cuda {

constexpr int kSearchThreads = 512;
constexpr int kPrepareThreads = 128;
constexpr int64_t kAlignment = 256;  // of each array of the workspace
constexpr int64_t kMaxDim = 8192;    // the query in float64 beside the keys in shared memory
constexpr int64_t kMaxRows = int64_t{1} << 30;
constexpr double kTensorCoreRoundoff = 0x1p-22;  // of an addition; it truncates. To be confirmed on a GPU.

// Offsets in the workspace, in the order of SearchArguments.
struct Workspace {
  int64_t scanned, bounds, coarse, words, quads, tiles, chosen, num_chosen, left_out, floor, candidates, kth,
      repaired, flagged, arrived;
  int64_t bytes;
};

struct SearchPlan {
  sm90::Shape shape;
  sm90::SharedPlan shared;
  int64_t batch;  // queries of a pass; the caller loops
  int query_blocks;
  int cluster;
  int scan_blocks;
  int num_tiles, num_groups;
  int64_t pitch;
  int kept, selected, parts, visit_step;
  int64_t scanned_pitch;
  double relative;
  Workspace at;
};

inline int bytes_of(Scanned scanned) { return scanned == Scanned::kInt8 ? 1 : 2; }

// k + E tiles hold every row that may be returned, were U exact. Unrounded operands leave an error of a few
// ulp and the rounding of words one of 2^-11, of a score that may have a mean; a rounded query up to 2 % of a
// standard deviation; codes, at the tail of a normal distribution, this many.
inline int64_t kept_tiles(const SearchShape& s) {
  double slack = s.is_exact ? 8 + s.k / 4 : 8 + s.k / 2;
  if (s.code_group > 0) {
    slack = std::round(s.k * (std::exp(4.5 * 0.01 * std::sqrt(static_cast<double>(s.dim)) * 1.8) - 1)) + 16;
  }
  return s.k + s.num_excluded + static_cast<int64_t>(std::fmin(slack, 1e6));
}

// Groups of them, one a tile and some: the others' maxima are known up to half of their distance. Of rows
// scanned as they are only what reaches the floor is rescored, so room for more costs nothing; over codes
// more reaches it than can matter, and the best by U are enough.
inline int64_t selected_groups(const SearchShape& s) {
  return s.code_group > 0 ? kept_tiles(s) * 5 / 4 : 2 * kept_tiles(s);
}

inline double relative_error(const SearchShape& s) {
  if (s.code_group > 0) {
    return static_cast<double>(s.dim + 64) * 0x1p-52;
  }
  const double terms = kTensorCoreRoundoff * static_cast<double>(s.dim + ceil_div<int64_t>(s.dim, 8) + 4);
  return terms / (1 - terms);  // D <= 8192: terms < 0.01
}

inline Workspace lay_out(const SearchPlan& p, const SearchShape& s, int64_t batch) {
  Workspace w{};
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t start = end;
    end = ceil_div(start + bytes, kAlignment) * kAlignment;
    return start;
  };
  w.scanned = take(batch * p.scanned_pitch * bytes_of(s.scanned));
  w.bounds = take(batch * static_cast<int64_t>(sizeof(QueryBound)));
  w.coarse = take(batch * static_cast<int64_t>(sizeof(QuadBound)));
  w.words = take(batch * p.pitch * 4);
  w.quads = take(p.pitch / kQuad * static_cast<int64_t>(s.code_group > 0 ? sizeof(CodeQuad) : 4));
  w.tiles = take(batch * p.kept * 4);
  w.chosen = take(batch * p.selected * 4);
  w.num_chosen = take(batch * 4);
  w.left_out = take(batch * 8);
  w.floor = take(batch * 4);
  w.candidates = take(batch * p.selected * kGroupRows * 8);
  w.kth = take(batch * 8);
  w.repaired = take(batch * p.parts * s.k * 8);
  w.flagged = take(batch * 4);
  w.arrived = take((batch + 1) * 4);
  w.bytes = end;
  return w;
}

// A shape of the scan for `batch` queries: queries stay in shared memory where they fit and few enough blocks
// read the table, else both operands stream.
inline void choose_shape(SearchPlan& p, int64_t batch, int panels) {
  using sm90::Shape;
  const auto blocks = static_cast<int>(ceil_div<int64_t>(batch, sm90::kBlockQueries));
  const auto use = [&](Shape shape, int most) {
    p.shape = shape;
    p.query_blocks = ceil_div(blocks, most);
    // Both consumer groups need queries on M.
    const int each = ceil_div(blocks, p.query_blocks);
    p.shared = sm90::shared_plan(shape, shape == Shape::kNarrow || each > 1 ? each : 2, panels);
  };
  if (blocks == 1 && sm90::fits(Shape::kNarrow, sm90::shared_plan(Shape::kNarrow, 1, panels))) {
    return use(Shape::kNarrow, 1);
  }
  int resident = sm90::kMaxWideBlocks;
  while (resident > 1 && !sm90::fits(Shape::kWide, sm90::shared_plan(Shape::kWide, resident, panels))) {
    --resident;
  }
  if (resident >= 4 || (resident >= 2 && resident >= blocks)) {
    return use(Shape::kWide, resident);
  }
  use(Shape::kDeep, sm90::kDeepBlocks);
}

inline int greatest_divisor(int a, int b) { return b == 0 ? a : greatest_divisor(b, a % b); }

// Near the golden section of the runs, and coprime to them: it visits each once, neighbours far apart.
inline int scattered_step(int runs) {
  int step = static_cast<int>(runs * 0.618) | 1;
  while (greatest_divisor(step, runs) != 1) {
    ++step;
  }
  return runs == 1 ? 0 : step % runs;
}

// Blocks of the scan: clusters of them for each block of queries, that share out the tiles. One wave of
// clusters fills the device, unless several waves of less work leave fewer multiprocessors idle: of ten
// blocks of queries and clusters of two, twelve of 132 in one wave, two in each of two. Below a
// thirty-second it is not worth a second start.
inline int scan_blocks(int multiprocessors, int query_blocks, int cluster, int64_t tiles) {
  constexpr int kMaxWaves = 8;
  const int each = query_blocks * cluster;
  const int64_t shares = ceil_div<int64_t>(tiles, cluster);
  int64_t clusters = 1, time = shares * ceil_div(each, multiprocessors);
  for (int waves = 1; waves <= kMaxWaves; ++waves) {
    const int64_t fit = waves * multiprocessors / each, used = fit < shares ? fit : shares;
    const int64_t taken = used < 1 ? time : waves * ceil_div(shares, used);
    if (taken * 33 < time * 32) {
      clusters = used;
      time = taken;
    }
  }
  return each * static_cast<int>(clusters);
}

// Blocks of a cluster. Larger ones ask L2 for less, but leave multiprocessors alone that no cluster covers:
// on a GPU of parts of 16 and 18 of them two of each 18. Up to a sixteenth that is worth it.
inline int cluster_blocks(const SearchShape& s, sm90::Shape shape) {
  const int covered = sm90::kLargeCluster * s.large_clusters;
  return shape != sm90::Shape::kDeep              ? 1
         : 16 * covered >= 15 * s.multiprocessors ? sm90::kLargeCluster
                                                  : sm90::kSmallCluster;
}

// The scan of a pass of `batch` queries, at most p.batch: the last pass may have fewer.
inline void plan_scan(SearchPlan& p, const SearchShape& s, int64_t batch) {
  choose_shape(p, batch, static_cast<int>(p.scanned_pitch * bytes_of(s.scanned) / sm90::kPanelBytes));
  p.cluster = cluster_blocks(s, p.shape);
  const bool large = p.cluster == sm90::kLargeCluster;
  const int processors = large ? p.cluster * s.large_clusters : s.multiprocessors;
  p.scan_blocks = scan_blocks(processors, p.query_blocks, p.cluster, p.num_tiles);
}

// As many queries a pass as fit the workspace.
inline void plan_pass(SearchPlan& p, const SearchShape& s) {
  const auto at_most = [](int64_t wanted, int there) {
    const int most = most_kept(kSearchThreads, kGroupKeys) - 1;  // select keeps one more
    return static_cast<int>(std::min<int64_t>(wanted, std::min(there, most)));
  };
  p.num_tiles = static_cast<int>(ceil_div<int64_t>(s.num_rows, kTileRows));
  p.num_groups = static_cast<int>(ceil_div<int64_t>(s.num_rows, kGroupRows));
  p.pitch = ceil_div(p.num_tiles, kQuad) * kQuad;
  p.kept = at_most(kept_tiles(s), p.num_tiles);
  p.selected = at_most(selected_groups(s), p.num_groups);
  p.visit_step = scattered_step(ceil_div(p.num_tiles, kQuad * kSearchThreads));
  // One flagged query should still spread over the device; their keys, over all queries, stay below 8 MiB.
  const int64_t room = (int64_t{8} << 20) / (8 * s.k * s.batch);
  p.parts = static_cast<int>(room < 1 ? 1 : room > 64 ? 64 : room);
  p.parts = p.parts < p.num_groups ? p.parts : p.num_groups;
  p.batch = s.batch;
  p.at = lay_out(p, s, p.batch);
  while (p.at.bytes > s.workspace && p.batch > 1) {
    const int64_t half = ceil_div<int64_t>(p.batch, 2), block = sm90::kBlockQueries;
    p.batch = half > block ? half / block * block : half;
    p.at = lay_out(p, s, p.batch);
  }
}

inline SearchPlan search_plan(const SearchShape& s) {
  SearchPlan p{};
  // Whole panels: what TMA loads beyond D is then zero whatever the memory holds.
  const int panel_columns = sm90::kPanelBytes / bytes_of(s.scanned);
  p.scanned_pitch = ceil_div<int64_t>(s.dim, panel_columns) * panel_columns;
  p.relative = relative_error(s);
  plan_pass(p, s);
  plan_scan(p, s, p.batch);
  return p;
}

inline SearchArguments search_arguments(const SearchPlan& p, const MipsTopkParams& params, unsigned char* w) {
  SearchArguments a{};
  static_cast<MipsTopkParams&>(a) = params;
  a.relative = p.relative;
  a.num_tiles = p.num_tiles;
  a.num_groups = p.num_groups;
  a.pitch = p.pitch;
  a.kept = p.kept;
  a.selected = p.selected;
  a.visit_step = p.visit_step;
  a.parts = p.parts;
  a.scanned_pitch = p.scanned_pitch;
  a.scanned = w + p.at.scanned;
  a.bounds = reinterpret_cast<QueryBound*>(w + p.at.bounds);
  a.coarse = reinterpret_cast<QuadBound*>(w + p.at.coarse);
  a.words = reinterpret_cast<uint32_t*>(w + p.at.words);
  a.quad_norm = reinterpret_cast<float*>(w + p.at.quads);
  a.quad_codes = reinterpret_cast<CodeQuad*>(w + p.at.quads);
  a.tiles = reinterpret_cast<int32_t*>(w + p.at.tiles);
  a.chosen = reinterpret_cast<int32_t*>(w + p.at.chosen);
  a.num_chosen = reinterpret_cast<int32_t*>(w + p.at.num_chosen);
  a.left_out = reinterpret_cast<int64_t*>(w + p.at.left_out);
  a.floor = reinterpret_cast<float*>(w + p.at.floor);
  a.candidates = reinterpret_cast<int64_t*>(w + p.at.candidates);
  a.kth = reinterpret_cast<int64_t*>(w + p.at.kth);
  a.repaired = reinterpret_cast<int64_t*>(w + p.at.repaired);
  a.flagged = reinterpret_cast<int32_t*>(w + p.at.flagged);
  a.arrived = reinterpret_cast<int32_t*>(w + p.at.arrived);
  return a;
}

inline sm90::ScanArguments scan_arguments(const SearchPlan& p, const SearchArguments& a) {
  sm90::ScanArguments scan{};
  scan.words = a.words;
  scan.quad_norm = a.quad_norm;
  scan.row_mask = a.row_mask;
  scan.pitch = a.pitch;
  scan.num_queries = a.batch;
  scan.num_rows = a.num_rows;
  scan.query_blocks = p.query_blocks;
  scan.cluster = p.cluster;
  scan.norm_scale = static_cast<float>(1 + (a.dim + 8) * 0x1p-23);
  scan.norm_hidden = static_cast<float>(a.dim * 0x1p-63);  // of squares below 2^-126; sqrt(D) <= D
  scan.plan = p.shared;
  return scan;
}

// What the scan's tensor maps describe: the rows, or their codes.
struct Matrix {
  const void* base;
  int64_t rows, columns, pitch;  // in elements
  int box_rows;
};
inline Matrix scanned_rows(const SearchArguments& a) {
  if (a.codes != nullptr) {
    const int64_t rows = ceil_div<int64_t>(a.num_rows, a.code_group) * a.code_group;
    return {a.codes, rows, a.dim, a.code_pitch, kTileRows};
  }
  return {a.rows, a.num_rows, a.dim, a.row_stride, kTileRows};
}
inline Matrix scanned_queries(const SearchArguments& a) {
  return {a.scanned, a.batch, a.scanned_pitch, a.scanned_pitch, sm90::kBlockQueries};
}

// Blocks of prepare: one a query, and enough to make the quads ready for few of them.
inline int prepare_blocks(const SearchArguments& a, int multiprocessors) {
  return a.batch > multiprocessors ? a.batch : multiprocessors;
}

// Blocks of rescore: every query's rows.
inline int rescore_blocks(const SearchArguments& a, int threads) {
  return a.batch * parts_of_rescore(a.kept, a.selected, threads, a.codes != nullptr);
}

}  // namespace cuda
}  // namespace realm_kernels
