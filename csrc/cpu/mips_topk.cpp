// The driver of mips_topk: who scans which rows, what a hit becomes, and how the threads' lists become one.
//
// Queries are taken in blocks; for each block the threads draw blocks of rows in a fixed pseudo-random order
// (so that a sorted table costs what a shuffled one does) and scan a panel of rows at a time against all
// queries of the block. Rows that the scan could not exclude are candidates: scored canonically at once, or,
// where int8 codes are scanned and the row is far away, kept as an interval (mips_topk_candidates.h). Each
// thread keeps its own list of them for each query. What is returned does not depend on who scanned what: the
// order of results is total.
#include "cpu/mips_topk.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/float_mode.h"
#include "cpu/mips_topk_candidates.h"
#include "cpu/mips_topk_kernels.h"
#include "cpu/mips_topk_queries.h"
#include "cpu/mips_topk_threads.h"
#include "cpu/parallel.h"

namespace realm_kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Packed queries of one block stay in the second cache while all rows pass by, a few at a time.
constexpr int64_t kQueryBlockBytes = 1 << 19;
// The fixed workspace that candidate lists of all threads share; query blocks are looped within it.
constexpr int64_t kWorkspaceBytes = int64_t{48} << 20;

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

// Of the candidates of a query.
struct ListSizes {
  int64_t first;  // so many are pruned for the first time
  int64_t step;   // so many more are pruned again
  int64_t capacity;
};

ListSizes list_sizes(const MipsTopkParams& params) {
  // Pruning costs what its candidates are: a step of as many as are kept makes that a constant a candidate.
  const int64_t step = std::clamp<int64_t>(params.k, 16, 1024);
  // Of codes several times k rows stay undecided, and wait.
  const int64_t kept = params.mean == nullptr ? params.k : std::max<int64_t>(4 * params.k, 128);
  return {params.k + step, step, kept + step};
}

// What one thread found for the queries of a block.
class Worker {
 public:
  Worker(const MipsTopkParams& params, const MipsTopkKernels& kernels, const RowBlocks& blocks,
         const QueryBlock& queries, ListSizes sizes, int thread, SharedBounds& shared)
      : params_(params),
        kernels_(kernels),
        queries_(queries),
        sizes_(sizes),
        thread_(thread),
        shared_(shared),
        rescorer_(params, kernels, blocks),
        candidates_(queries.batch * sizes.capacity),
        counts_(queries.batch, 0),
        full_(queries.batch, sizes.first),
        kth_(queries.batch, -kInfinity),
        thresholds_(queries.batch, -kInfinity),
        hits_(queries.batch) {
    const double gamma = accumulation_gamma(params.dim);
    packed_ = queries.packed(thresholds_.data());
    // Instructions for bfloat16 flush what is subnormal.
    const double vanishing = std::ldexp(static_cast<double>(params.dim), packed_.pairs ? -124 : -148);
    bound_ = {round_up(gamma / 4), round_up(1.0 + gamma + 0x1p-18), round_up(vanishing)};
    vanishing_ = vanishing + std::ldexp(8.0, packed_.pairs ? -124 : -148);
    if (params.mean != nullptr) {
      cutoffs_.resize(queries.batch);
      codes_ = queries.codes(thresholds_.data(), cutoffs_.data());
    } else if (packed_.scan == RowScan::kPanels) {
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
  }

  const Candidate* candidates(int64_t query) const { return candidates_.data() + query * sizes_.capacity; }
  int64_t count(int64_t query) const { return counts_[query]; }
  int64_t rescored() const { return rescorer_.count(); }

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

  const char* row(const TableShard& shard, int64_t number) const {
    return static_cast<const char*>(shard.rows) +
           number * shard.row_stride * element_size(params_.table_type);
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
    // The row is near: what is left of its interval would cost more than its score.
    for_each_hit(num_hits, [&](int64_t q, int64_t r) {
      const int64_t id = first_id + first + r;
      if (!excluded(queries_.first + q, id)) {
        const float score = rescorer_.score(queries_.query(q), row(shard, first + r));
        if (!std::isnan(score)) {
          admit(q, {{score, score}, id});
        }
      }
    });
  }

  // The same by codes; `first` is a multiple of kCodeRows. The row is far, and need not be read at once.
  void scan_codes(const TableShard& shard, int64_t first, uint32_t keep, int64_t next, int64_t first_id) {
    const int64_t bytes = code_panel_bytes(params_.dim);
    const uint8_t* codes = shard.codes + first / kCodeRows * bytes;
    const CodeBounds& bounds = shard.bounds[first / kCodeRows];
    const int64_t num_hits =
        kernels_.scan_codes(codes, bounds, keep, params_.dim, codes_, next > 0 ? bytes : 0, hits_.data());
    for_each_hit(num_hits, [&](int64_t q, int64_t r) {
      const ScoreInterval score = kernels_.refine(codes, bounds, params_.dim, codes_, q, r);
      const int64_t id = first_id + first + r;
      if (score.upper >= kth_[q] && !excluded(queries_.first + q, id)) {
        admit(q, {score, id});
      }
    });
  }

  template <class Visit>
  void for_each_hit(int64_t num_hits, const Visit& visit) {
    for (int64_t h = 0; h < num_hits; ++h) {
      for (uint32_t bits = hits_[h].rows; bits != 0; bits &= bits - 1) {
        visit(hits_[h].query, __builtin_ctz(bits));
      }
    }
  }

  void admit(int64_t q, const Candidate& candidate) {
    if (candidate.score.upper >= kth_[q]) {
      candidates_[q * sizes_.capacity + counts_[q]++] = candidate;
      if (counts_[q] == full_[q]) {
        prune(q);
      }
    }
  }

  // Raises the threshold of a query and drops the candidates below it; only where too many are left over are
  // these rescored.
  void prune(int64_t q) {
    Candidate* const list = candidates_.data() + q * sizes_.capacity;
    raise_from(q);
    const float kth = kth_[q];
    counts_[q] =
        std::remove_if(list, list + counts_[q], [kth](const Candidate& c) { return c.score.upper < kth; }) -
        list;
    if (counts_[q] + sizes_.step > sizes_.capacity) {
      counts_[q] = rescorer_.settle(queries_.query(q), list, counts_[q]);
      raise_from(q);
    }
    full_[q] = std::min(counts_[q] + sizes_.step, sizes_.capacity);
  }

  // What the candidates of a query and the other threads know of its k-th score.
  void raise_from(int64_t q) {
    Candidate* const list = candidates_.data() + q * sizes_.capacity;
    Candidate* end = list + counts_[q];
    const auto ranked = [&](int64_t rank) {
      if (end - list < rank) {
        return -kInfinity;
      }
      std::nth_element(list, list + rank - 1, end, higher);
      end = list + rank;
      return list[rank - 1].score.lower;
    };
    const float kth = ranked(params_.k);
    shared_.publish(thread_, q, kth, shared_.rank() < params_.k ? ranked(shared_.rank()) : kth);
    raise_threshold(q, shared_.bound(q));
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
  ListSizes sizes_;
  int thread_;
  SharedBounds& shared_;
  Rescorer rescorer_;
  std::vector<Candidate> candidates_;    // [batch of the block, capacity]
  std::vector<int64_t> counts_, full_;   // [batch of the block], of candidates; how many are pruned next
  std::vector<float> kth_, thresholds_;  // [batch of the block]
  std::vector<PanelHit> hits_;           // [batch of the block]
  std::vector<float> panel_;             // [D, panel_rows], where rows are packed
  std::vector<int32_t> cutoffs_;         // [batch of the block], where codes are scanned
  double vanishing_;
  ScanBound bound_;
  PackedQueries packed_;
  QueryCodes codes_ = {};
};

void write_topk(const MipsTopkParams& params, const QueryBlock& queries, const std::vector<Worker>& workers,
                int64_t q, Rescorer& rescorer, std::vector<Candidate>& merged) {
  merged.clear();
  for (const Worker& worker : workers) {
    merged.insert(merged.end(), worker.candidates(q), worker.candidates(q) + worker.count(q));
  }
  const int64_t found = rescorer.settle(queries.query(q), merged.data(), merged.size());
  std::sort(merged.data(), merged.data() + found, before);
  float* scores = params.scores + (queries.first + q) * params.k;
  int64_t* indices = params.indices + (queries.first + q) * params.k;
  for (int64_t j = 0; j < params.k; ++j) {
    scores[j] = j < found ? merged[j].score.lower : -kInfinity;
    indices[j] = j < found ? merged[j].row : -1;
  }
}

int64_t search_block(const MipsTopkParams& params, const MipsTopkKernels& kernels, const RowBlocks& blocks,
                     const QueryBlock& queries, ListSizes sizes) {
  const int num_threads = static_cast<int>(std::clamp<int64_t>(blocks.count(), 1, params.num_threads));
  SharedBounds shared(queries.batch, params.k, num_threads);
  std::vector<Worker> workers;
  workers.reserve(num_threads);  // a worker points into itself
  for (int w = 0; w < num_threads; ++w) {
    workers.emplace_back(params, kernels, blocks, queries, sizes, w, shared);
  }
  std::atomic<int64_t> turn{0}, rescored{0};
  parallel_for(num_threads, num_threads, [&](int64_t begin, int64_t end, int) {
    const IeeeFloatMode ieee;
    for (int64_t w = begin; w < end; ++w) {
      for (int64_t t = turn++; t < blocks.count(); t = turn++) {
        workers[w].scan(blocks.at(t));
      }
      rescored += workers[w].rescored();
    }
  });
  parallel_for(queries.batch, num_threads, [&](int64_t begin, int64_t end, int) {
    const IeeeFloatMode ieee;
    Rescorer rescorer(params, kernels, blocks);
    std::vector<Candidate> merged;
    for (int64_t q = begin; q < end; ++q) {
      write_topk(params, queries, workers, q, rescorer, merged);
    }
    rescored += rescorer.count();
  });
  return rescored;
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
  const ListSizes sizes = list_sizes(params);
  const int64_t list_bytes = sizes.capacity * static_cast<int64_t>(sizeof(Candidate)) * params.num_threads;
  const int64_t most = std::max<int64_t>(
      1,
      std::min<int64_t>({kMaxQueryBlock, kQueryBlockBytes / (4 * params.dim), kWorkspaceBytes / list_bytes}));
  const int64_t num_blocks = (params.batch + most - 1) / most;
  const IeeeFloatMode ieee;
  int64_t rescored = 0;
  for (int64_t b = 0; b < num_blocks; ++b) {
    const int64_t first = params.batch * b / num_blocks, end = params.batch * (b + 1) / num_blocks;
    const QueryBlock queries(params, kernels, first, end - first);
    rescored += search_block(params, kernels, blocks, queries, sizes);
  }
  return rescored;
}

void launch_encode(const EncodeParams& params) {
  const MipsTopkKernels& kernels = mips_topk_kernels(params.isa);
  const int64_t panels = (params.num_rows + kCodeRows - 1) / kCodeRows;
  const int64_t row_bytes = params.row_stride * element_size(params.table_type);
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
