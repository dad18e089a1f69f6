// What the threads of a search share: the blocks of rows they draw, and what they know of the k-th scores.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/mips_topk.h"

namespace realm_kernels {

// Rows drawn at a time: long enough for the hardware's prefetcher, short enough to share out evenly.
constexpr int64_t kMaxRowBlock = 1024;  // a multiple of every panel
constexpr int64_t kRowBlocksPerThread = 16;

struct RowBlock {
  const TableShard* shard;
  int64_t first_row;  // within the shard
  int64_t num_rows;
  int64_t first_id;  // of the shard, among all rows
};

// Every row block of the table, by number; visited in steps of a stride coprime to their count.
class RowBlocks {
 public:
  explicit RowBlocks(const MipsTopkParams& params) : params_(params) {
    int64_t num_rows = 0;
    for (int64_t s = 0; s < params.num_shards; ++s) {
      first_ids_.push_back(num_rows);
      num_rows += params.shards[s].num_rows;
    }
    const int64_t share = num_rows / (params.num_threads * kRowBlocksPerThread) / kCodeRows * kCodeRows;
    rows_per_block_ = std::clamp<int64_t>(share, kCodeRows, kMaxRowBlock);
    for (int64_t s = 0; s < params.num_shards; ++s) {
      first_blocks_.push_back(count_);
      count_ += (params.shards[s].num_rows + rows_per_block_ - 1) / rows_per_block_;
    }
    stride_ = static_cast<int64_t>(static_cast<double>(count_) * 0.6180339887) | 1;
    while (std::gcd(stride_, count_) > 1) {
      ++stride_;
    }
  }

  int64_t count() const { return count_; }

  const char* row(int64_t id) const {
    const int64_t s = std::upper_bound(first_ids_.begin(), first_ids_.end(), id) - first_ids_.begin() - 1;
    const TableShard& shard = params_.shards[s];
    return static_cast<const char*>(shard.rows) +
           (id - first_ids_[s]) * shard.row_stride * element_size(params_.table_type);
  }

  RowBlock at(int64_t turn) const {
    const int64_t number = static_cast<int64_t>(static_cast<__int128>(turn) * stride_ % count_);
    const auto above = std::upper_bound(first_blocks_.begin(), first_blocks_.end(), number);
    const int64_t s = above - first_blocks_.begin() - 1;
    const int64_t first = (number - first_blocks_[s]) * rows_per_block_;
    const TableShard& shard = params_.shards[s];
    return {&shard, first, std::min(rows_per_block_, shard.num_rows - first), first_ids_[s]};
  }

 private:
  const MipsTopkParams& params_;
  std::vector<int64_t> first_ids_, first_blocks_;
  int64_t rows_per_block_ = 0, count_ = 0, stride_ = 1;
};

// What threads tell each other of the k-th score, so that none admits what another has beaten. Two bounds
// hold at any time: the k-th score among the rows of any one thread; and, of T threads, the least of their
// scores of rank k / T rounded up, since together these are k rows at least.
class SharedBounds {
 public:
  SharedBounds(int64_t batch, int64_t k, int num_threads)
      : batch_(batch),
        rank_((k + num_threads - 1) / num_threads),
        num_threads_(num_threads),
        scores_((num_threads + 1) * batch) {
    for (auto& score : scores_) {
      score.store(-std::numeric_limits<float>::infinity(), std::memory_order_relaxed);
    }
  }

  int64_t rank() const { return rank_; }

  float bound(int64_t q) const {
    float least = std::numeric_limits<float>::infinity();
    for (int t = 1; t <= num_threads_; ++t) {
      least = std::min(least, scores_[t * batch_ + q].load(std::memory_order_relaxed));
    }
    return std::max(least, scores_[q].load(std::memory_order_relaxed));
  }

  // Of a thread, bounds of its k-th score and of that of rank() at most; -infinity: it has none.
  void publish(int thread, int64_t q, float kth, float ranked) {
    raise(scores_[(thread + 1) * batch_ + q], ranked);
    raise(scores_[q], kth);
  }

 private:
  static void raise(std::atomic<float>& bound, float to) {
    float seen = bound.load(std::memory_order_relaxed);
    while (seen < to && !bound.compare_exchange_weak(seen, to, std::memory_order_relaxed)) {
    }
  }

  int64_t batch_, rank_;
  int num_threads_;
  std::vector<std::atomic<float>> scores_;  // [1 + threads, batch]
};

}  // namespace realm_kernels
