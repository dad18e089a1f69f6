// The driver of mips_topk: who scans which rows, what a hit becomes, and how the threads' lists become one.
//
// Queries are taken in blocks; for each block the threads draw blocks of rows in a fixed pseudo-random order
// (so that a sorted table costs what a shuffled one does), pack a panel of rows, scan it against all queries
// of the block, and rescore canonically the rows that the scan could not exclude. Each thread keeps its own
// list of candidates for each query. What is returned does not depend on who scanned what: the order of
// results is total. A table with int8 codes is scanned by these instead; its rows are read to rescore only.
#include "cpu/mips_topk.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/float_mode.h"
#include "cpu/mips_topk_kernels.h"
#include "cpu/mips_topk_queries.h"
#include "cpu/mips_topk_threads.h"
#include "cpu/parallel.h"

namespace realm_kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Packed queries of one block stay in the last-level cache while every panel passes by.
constexpr int64_t kQueryBlockBytes = 1 << 20;
constexpr int64_t kMaxQueryBlock = 512;
// The fixed workspace that candidate lists of all threads share; query blocks are looped within it.
constexpr int64_t kWorkspaceBytes = int64_t{48} << 20;
// Of a row that is to be rescored: the rest comes by itself, line after line.
constexpr int64_t kPrefetchBytes = 1024;

struct Candidate {
  float score;
  int64_t row;
};

bool before(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.row < b.row);
}

float round_up(double value) {
  const float rounded = static_cast<float>(value);
  return rounded < value ? std::nextafter(rounded, kInfinity) : rounded;
}

// A score of the scan, once its error is added, that lies below this cannot round to `kth` or more.
// `vanishing` is what products and sums too small for a float32 may add up to.
float threshold_below(float kth, double vanishing) {
  if (kth == -kInfinity) {
    return -kInfinity;
  }
  const double highest = std::min<double>(kth, std::numeric_limits<float>::max());
  // Half an ulp of kth, and the rounding of the cutoff itself.
  const double below = highest - std::abs(highest) * 0x1p-22 - vanishing;
  return -round_up(-below);
}

// A row that a scan of codes could not exclude.
struct Waiting {
  int64_t query;
  const char* row;
  int64_t id;
};

// What one thread found for the queries of a block.
class Worker {
 public:
  Worker(const MipsTopkParams& params, const MipsTopkKernels& kernels, const QueryBlock& queries,
         int64_t capacity, int thread, SharedBounds& shared)
      : params_(params),
        kernels_(kernels),
        queries_(queries),
        capacity_(capacity),
        thread_(thread),
        shared_(shared),
        candidates_(queries.batch * capacity),
        counts_(queries.batch, 0),
        kth_(queries.batch, -kInfinity),
        thresholds_(queries.batch, -kInfinity),
        hits_(queries.batch) {
    const double gamma = accumulation_gamma(params.dim);
    bound_ = {round_up(gamma / 4), round_up(1.0 + gamma + 0x1p-18),
              round_up(std::ldexp(static_cast<double>(params.dim), -148))};
    packed_ = queries.packed(thresholds_.data());
    // Instructions for bfloat16 flush what is subnormal.
    vanishing_ = std::ldexp(static_cast<double>(params.dim + 8), packed_.pairs ? -124 : -148);
    if (params.mean != nullptr) {
      cutoffs_.resize(queries.batch);
      codes_ = queries.codes(thresholds_.data(), cutoffs_.data());
    } else if (queries.batch > kernels.direct_max) {
      panel_.resize(kernels.panel_rows * params.dim);
    }
  }

  Worker(Worker&&) = default;

  void scan(const RowBlock& block) {
    for (int64_t q = 0; q < queries_.batch; ++q) {
      raise_threshold(q, shared_.bound(q));
    }
    const int64_t panel_rows = params_.mean != nullptr ? kCodeRows : kernels_.panel_rows;
    for (int64_t r = 0; r < block.num_rows; r += panel_rows) {
      const int64_t first = block.first_row + r, n = std::min(panel_rows, block.num_rows - r);
      const uint32_t keep = unmasked(block.first_id + first, n);
      if (keep == 0) {
        continue;
      }
      const int64_t next = std::min(panel_rows, block.num_rows - r - n);
      if (params_.mean != nullptr) {
        scan_codes(*block.shard, first, keep, next, block.first_id);
      } else {
        scan_rows(*block.shard, first, n, keep, next, block.first_id);
      }
    }
    admit_waiting();
  }

  const Candidate* candidates(int64_t query) const { return candidates_.data() + query * capacity_; }
  int64_t count(int64_t query) const { return counts_[query]; }
  int64_t rescored() const { return rescored_; }

 private:
  // Which of n rows may be returned, a bit each.
  uint32_t unmasked(int64_t first_id, int64_t n) const {
    if (params_.row_mask == nullptr) {
      return ~uint32_t{0} >> (32 - n);
    }
    uint32_t bits = 0;
    for (int64_t r = 0; r < n; ++r) {
      bits |= static_cast<uint32_t>(params_.row_mask[first_id + r]) << r;
    }
    return bits;
  }

  int64_t element_size() const { return params_.table_type == ScalarType::kFloat32 ? 4 : 2; }

  const char* row(const TableShard& shard, int64_t number) const {
    return static_cast<const char*>(shard.rows) + number * shard.row_stride * element_size();
  }

  // The n rows of one panel, before `next` rows of the next, by the kernel that fits the batch.
  void scan_rows(const TableShard& shard, int64_t first, int64_t n, uint32_t keep, int64_t next,
                 int64_t first_id) {
    const char* rows = row(shard, first);
    int64_t num_hits;
    if (panel_.empty()) {
      num_hits = kernels_.scan_rows(rows, params_.table_type, shard.row_stride, n, keep, params_.dim, packed_,
                                    bound_, hits_.data());
    } else {
      const PanelRows packed =
          kernels_.pack_panel(rows, params_.table_type, shard.row_stride, n, params_.dim, panel_.data());
      const float norm = std::sqrt(packed.square * bound_.norm_growth + bound_.norm_floor);
      const char* behind = row(shard, first + n);
      const NextRows ask = {behind,
                            shard.row_stride == params_.dim ? row(shard, first + n + next) - behind : 0};
      num_hits =
          kernels_.scan_panel(panel_.data(), norm, keep & ~packed.nan, packed_, bound_, ask, hits_.data());
    }
    for_each_hit(num_hits,
                 [&](int64_t q, int64_t r) { admit(q, row(shard, first + r), first_id + first + r); });
  }

  // The same by codes; `first` is a multiple of kCodeRows. What must be rescored is asked for and waits until
  // the next panel is scanned: its row is far away.
  void scan_codes(const TableShard& shard, int64_t first, uint32_t keep, int64_t next, int64_t first_id) {
    const int64_t bytes = code_panel_bytes(params_.dim);
    const uint8_t* codes = shard.codes + first / kCodeRows * bytes;
    const CodeBounds& bounds = shard.bounds[first / kCodeRows];
    const int64_t num_hits =
        kernels_.scan_codes(codes, bounds, keep, params_.dim, codes_, next > 0 ? bytes : 0, hits_.data());
    admit_waiting();
    for_each_hit(num_hits, [&](int64_t q, int64_t r) {
      if (kernels_.refine(codes, bounds, params_.dim, codes_, q, r)) {
        const char* begin = row(shard, first + r);
        const char* end = begin + std::min<int64_t>(params_.dim * element_size(), kPrefetchBytes);
        for (const char* line = begin; line < end; line += 64) {
          __builtin_prefetch(line);
        }
        waiting_.push_back({q, begin, first_id + first + r});
      }
    });
  }

  void admit_waiting() {
    for (const Waiting& w : waiting_) {
      admit(w.query, w.row, w.id);
    }
    waiting_.clear();
  }

  template <class Visit>
  void for_each_hit(int64_t num_hits, const Visit& visit) {
    for (int64_t h = 0; h < num_hits; ++h) {
      for (uint32_t bits = hits_[h].rows; bits != 0; bits &= bits - 1) {
        visit(hits_[h].query, __builtin_ctz(bits));
      }
    }
  }

  void admit(int64_t q, const void* row, int64_t id) {
    if (excluded(queries_.first + q, id)) {
      return;
    }
    ++rescored_;
    const float score = kernels_.canonical_score(queries_.query(q), row, params_.table_type, params_.dim);
    if (!(score >= kth_[q])) {  // NaN too
      return;
    }
    Candidate* list = candidates_.data() + q * capacity_;
    list[counts_[q]++] = {score, id};
    if (counts_[q] == capacity_) {
      std::nth_element(list, list + params_.k - 1, list + capacity_, before);
      counts_[q] = params_.k;
      const float kth = list[params_.k - 1].score;
      std::nth_element(list, list + shared_.rank() - 1, list + params_.k, before);
      shared_.publish(thread_, q, kth, list[shared_.rank() - 1].score);
      raise_threshold(q, shared_.bound(q));
    }
  }

  bool excluded(int64_t query, int64_t id) const {
    const int64_t* list = params_.exclude + query * params_.num_exclude;
    return params_.num_exclude > 0 && std::binary_search(list, list + params_.num_exclude, id);
  }

  void raise_threshold(int64_t q, float kth) {
    if (kth > kth_[q]) {
      kth_[q] = kth;
      thresholds_[q] = threshold_below(kth, vanishing_);
    }
  }

  const MipsTopkParams& params_;
  const MipsTopkKernels& kernels_;
  const QueryBlock& queries_;
  int64_t capacity_;
  int thread_;
  SharedBounds& shared_;
  std::vector<Candidate> candidates_;    // [batch of the block, capacity]
  std::vector<int64_t> counts_;          // [batch of the block]
  std::vector<float> kth_, thresholds_;  // [batch of the block]
  std::vector<PanelHit> hits_;           // [batch of the block]
  std::vector<float> panel_;             // [D, panel_rows], where rows are packed
  std::vector<int32_t> cutoffs_;         // [batch of the block], where codes are scanned
  std::vector<Waiting> waiting_;         // of the last panel of codes
  double vanishing_;
  ScanBound bound_;
  PackedQueries packed_;
  QueryCodes codes_ = {};
  int64_t rescored_ = 0;
};

void write_topk(const MipsTopkParams& params, const QueryBlock& queries, const std::vector<Worker>& workers,
                int64_t q, std::vector<Candidate>& merged) {
  merged.clear();
  for (const Worker& worker : workers) {
    merged.insert(merged.end(), worker.candidates(q), worker.candidates(q) + worker.count(q));
  }
  const int64_t found = std::min<int64_t>(params.k, static_cast<int64_t>(merged.size()));
  std::partial_sort(merged.begin(), merged.begin() + found, merged.end(), before);
  float* scores = params.scores + (queries.first + q) * params.k;
  int64_t* indices = params.indices + (queries.first + q) * params.k;
  for (int64_t j = 0; j < params.k; ++j) {
    scores[j] = j < found ? merged[j].score : -kInfinity;
    indices[j] = j < found ? merged[j].row : -1;
  }
}

int64_t search_block(const MipsTopkParams& params, const MipsTopkKernels& kernels, const RowBlocks& blocks,
                     const QueryBlock& queries, int64_t capacity) {
  const int num_threads = static_cast<int>(std::clamp<int64_t>(blocks.count(), 1, params.num_threads));
  SharedBounds shared(queries.batch, params.k, num_threads);
  std::vector<Worker> workers;
  workers.reserve(num_threads);  // a worker points into itself
  for (int w = 0; w < num_threads; ++w) {
    workers.emplace_back(params, kernels, queries, capacity, w, shared);
  }
  std::atomic<int64_t> turn{0};
  parallel_for(num_threads, num_threads, [&](int64_t begin, int64_t end, int) {
    const IeeeFloatMode ieee;
    for (int64_t w = begin; w < end; ++w) {
      for (int64_t t = turn++; t < blocks.count(); t = turn++) {
        workers[w].scan(blocks.at(t));
      }
    }
  });
  parallel_for(queries.batch, num_threads, [&](int64_t begin, int64_t end, int) {
    std::vector<Candidate> merged;
    for (int64_t q = begin; q < end; ++q) {
      write_topk(params, queries, workers, q, merged);
    }
  });
  return std::accumulate(workers.begin(), workers.end(), int64_t{0},
                         [](int64_t sum, const Worker& worker) { return sum + worker.rescored(); });
}

}  // namespace

const MipsTopkKernels& mips_topk_kernels(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kAvx512Bf16:
      return mips_topk_kernels_avx512_bf16();
    case Isa::kAvx512Vnni:
      return mips_topk_kernels_avx512_vnni();
    case Isa::kAvx512:
      return mips_topk_kernels_avx512();
    case Isa::kAvx2:
      return mips_topk_kernels_avx2();
    case Isa::kPortable:
      break;
  }
#endif
  (void)isa;
  return mips_topk_kernels_portable();
}

int64_t code_panel_bytes(int64_t dim) { return (dim + 7) / 8 * 8 * kCodeRows; }

int64_t launch_mips_topk(const MipsTopkParams& params) {
  const MipsTopkKernels& kernels = mips_topk_kernels(params.isa);
  const RowBlocks blocks(params);
  // A list is pruned to k whenever it is full: room for as many again makes that a constant cost a candidate.
  const int64_t capacity = params.k + std::clamp<int64_t>(params.k, 16, 1024);
  const int64_t list_bytes = capacity * static_cast<int64_t>(sizeof(Candidate)) * params.num_threads;
  const int64_t block_size = std::max<int64_t>(
      1, std::min({kMaxQueryBlock, kQueryBlockBytes / (4 * params.dim), kWorkspaceBytes / list_bytes}));
  const IeeeFloatMode ieee;
  int64_t rescored = 0;
  for (int64_t first = 0; first < params.batch; first += block_size) {
    const QueryBlock queries(params, kernels, first, std::min(block_size, params.batch - first));
    rescored += search_block(params, kernels, blocks, queries, capacity);
  }
  return rescored;
}

void launch_encode(const EncodeParams& params) {
  const MipsTopkKernels& kernels = mips_topk_kernels(params.isa);
  const int64_t panels = (params.num_rows + kCodeRows - 1) / kCodeRows;
  const int64_t row_bytes = params.row_stride * (params.table_type == ScalarType::kFloat32 ? 4 : 2);
  parallel_for(panels, params.num_threads, [&](int64_t begin, int64_t end, int) {
    const IeeeFloatMode ieee;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * kCodeRows;
      params.bounds[p] =
          kernels.encode_panel(static_cast<const char*>(params.rows) + first * row_bytes, params.table_type,
                               params.row_stride, std::min<int64_t>(kCodeRows, params.num_rows - first),
                               params.dim, params.mean, params.codes + p * code_panel_bytes(params.dim));
    }
  });
}

}  // namespace realm_kernels
