// How the CUDA backend searches one piece of a table: shape of the scan, groups, slack, the workspace. A plan
// depends on shapes, dtypes and budgets only. Its constants are reasoned (docs/hopper_scan.md), not measured.
#pragma once

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
  int64_t scanned, bounds, coarse, group_max, quads, chosen, left_out, floor, candidates, kth, repaired,
      flagged, arrived;
  int64_t bytes;
};

struct SearchPlan {
  sm90::Shape shape;
  sm90::SharedPlan shared;
  int64_t batch;  // queries of a pass; the caller loops
  int query_blocks;
  int scan_blocks;
  int group, num_groups;
  int64_t pitch;
  int selected, parts, visit_step;
  int64_t scanned_pitch;
  double relative;
  Workspace at;
};

inline int bytes_of(Scanned scanned) { return scanned == Scanned::kInt8 ? 1 : 2; }

// Rows of a group: writing and reading a query's maxima, 8 N / G bytes, against reading m G rows to rescore;
// the nearest of 32, 64 and 128 to sqrt(8 N / m row bytes). Over codes it is these that are read again, and a
// group of codes is the largest that a bound is known for.
inline int group_rows(const SearchShape& s, int64_t selected) {
  const int64_t square = 8 * s.num_rows / (selected * s.dim * bytes_of(s.scanned));
  const int group = square < 32 * 64 ? 32 : square < 64 * 128 ? 64 : 128;
  return s.code_group > 0 && s.code_group < group ? s.code_group : group;
}

// k + E groups hold every row that may be returned, were U exact. Unrounded operands leave an error of a few
// ulp; a rounded query up to 2 % of a standard deviation; codes, at the tail of a normal distribution, this
// many.
inline int64_t selected_groups(const SearchShape& s) {
  double slack = s.is_exact ? 4 + s.k / 8 : 8 + s.k / 2;
  if (s.code_group > 0) {
    slack = std::round(s.k * (std::exp(4.5 * 0.01 * std::sqrt(static_cast<double>(s.dim)) * 1.8) - 1)) + 16;
  }
  const auto most = static_cast<int64_t>(most_kept(kSearchThreads, kGroupKeys) - 1);  // select keeps one more
  const auto wanted = s.k + s.num_excluded + static_cast<int64_t>(std::fmin(slack, 1e6));
  return wanted < most ? wanted : most;
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
  w.group_max = take(batch * p.pitch * 4);
  w.quads =
      take(ceil_div(p.num_groups, kQuad) * static_cast<int64_t>(s.code_group > 0 ? sizeof(CodeQuad) : 4));
  w.chosen = take(batch * p.selected * 4);
  w.left_out = take(batch * 8);
  w.floor = take(s.code_group > 0 ? batch * 4 : 0);
  w.candidates = take(batch * p.selected * p.group * 8);
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

// The scan of a pass of `batch` queries, at most p.batch: the last pass may have fewer.
inline void plan_scan(SearchPlan& p, const SearchShape& s, int64_t batch) {
  choose_shape(p, batch, static_cast<int>(p.scanned_pitch * bytes_of(s.scanned) / sm90::kPanelBytes));
  const int64_t tiles = ceil_div<int64_t>(s.num_rows, sm90::kTileRows);
  p.scan_blocks = scan_blocks(s.multiprocessors, p.query_blocks, sm90::cluster_blocks(p.shape), tiles);
}

// Groups of `group` rows, and as many queries a pass as then fit the workspace.
inline void plan_pass(SearchPlan& p, const SearchShape& s, int group) {
  const int64_t wanted = selected_groups(s);
  p.group = group;
  p.num_groups = static_cast<int>(ceil_div<int64_t>(s.num_rows, group));
  p.pitch = ceil_div(p.num_groups, kQuad) * kQuad;
  p.selected = static_cast<int>(wanted < p.num_groups ? wanted : p.num_groups);
  p.visit_step = scattered_step(ceil_div(p.num_groups, kOffersPerRound * kSearchThreads));
  // One flagged query should still spread over the device; their keys, over all queries, stay below 16 MiB.
  const int64_t room = (int64_t{16} << 20) / (8 * s.k * s.batch);
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
  plan_pass(p, s, group_rows(s, selected_groups(s)));
  // With fewer queries a pass would wait for memory, and larger groups cost less than more passes.
  constexpr int64_t kEnough = 256;
  const int largest = s.code_group > 0 && s.code_group < sm90::kTileRows ? s.code_group : sm90::kTileRows;
  while (p.batch < kEnough && p.batch < s.batch && p.group < largest) {
    plan_pass(p, s, 2 * p.group);
  }
  plan_scan(p, s, p.batch);
  return p;
}

inline SearchArguments search_arguments(const SearchPlan& p, const MipsTopkParams& params, unsigned char* w) {
  SearchArguments a{};
  static_cast<MipsTopkParams&>(a) = params;
  a.relative = p.relative;
  a.group = p.group;
  a.num_groups = p.num_groups;
  a.pitch = p.pitch;
  a.selected = p.selected;
  a.visit_step = p.visit_step;
  a.parts = p.parts;
  a.scanned_pitch = p.scanned_pitch;
  a.scanned = w + p.at.scanned;
  a.bounds = reinterpret_cast<QueryBound*>(w + p.at.bounds);
  a.coarse = reinterpret_cast<QuadBound*>(w + p.at.coarse);
  a.group_max = w + p.at.group_max;
  a.quad_norm = reinterpret_cast<float*>(w + p.at.quads);
  a.quad_codes = reinterpret_cast<CodeQuad*>(w + p.at.quads);
  a.chosen = reinterpret_cast<int32_t*>(w + p.at.chosen);
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
  scan.group_max = a.group_max;
  scan.quad_norm = a.quad_norm;
  scan.row_mask = a.row_mask;
  scan.pitch = a.pitch;
  scan.num_queries = a.batch;
  scan.num_rows = a.num_rows;
  scan.num_groups = a.num_groups;
  scan.group = a.group;
  scan.quad_shift = sm90::quad_shift(a.group);
  scan.query_blocks = p.query_blocks;
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
    return {a.codes, rows, a.dim, a.code_pitch, sm90::kTileRows};
  }
  return {a.rows, a.num_rows, a.dim, a.row_stride, sm90::kTileRows};
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
  return a.batch * ceil_div(a.selected * a.group, rows_of_block(threads, a.codes != nullptr));
}

}  // namespace cuda
}  // namespace realm_kernels
