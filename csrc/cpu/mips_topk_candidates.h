// What a search keeps of the rows that may matter to a query, and how candidates become the k first rows.
//
// A candidate is an interval that holds the canonical score of a row; it is a point once the row was
// rescored. The k-th largest lower end of any candidates is at most the k-th score, and a row whose upper end
// lies below that never matters. So few rows need be read: those that intervals alone cannot order.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/mips_topk_kernels.h"
#include "cpu/mips_topk_threads.h"

namespace realm_kernels {

struct Candidate {
  ScoreInterval score;
  int64_t row;  // id
};

// The order of results, of points only.
constexpr auto before = [](const Candidate& a, const Candidate& b) {
  return a.score.lower > b.score.lower || (a.score.lower == b.score.lower && a.row < b.row);
};

constexpr auto higher = [](const Candidate& a, const Candidate& b) { return a.score.lower > b.score.lower; };

class Rescorer {
 public:
  Rescorer(const MipsTopkParams& params, const MipsTopkKernels& kernels, const RowBlocks& blocks)
      : params_(params), kernels_(kernels), blocks_(blocks) {}

  float score(const float* query, const void* row) {
    ++count_;
    return kernels_.canonical_score(query, row, params_.table_type, params_.dim);
  }

  // Leaves the k first of n candidates, or all where there are fewer, as points; returns how many.
  int64_t settle(const float* query, Candidate* list, int64_t n) {
    const int64_t k = params_.k;
    Candidate* const end = list + n;
    Candidate* rest = list + std::min(n, k);
    if (n > k) {  // the most promising first: their scores hold back many of the others
      std::nth_element(list, rest - 1, end, higher);
    }
    Candidate* settled = rescore(query, list, rest, list);
    if (settled - list == k) {
      const float kth = std::min_element(list, settled, [](const Candidate& a, const Candidate& b) {
                          return a.score.lower < b.score.lower;
                        })->score.lower;
      const auto left = std::remove_if(rest, end, [kth](const Candidate& c) { return c.score.upper < kth; });
      settled = rescore(query, rest, left, settled);
    } else {
      settled = rescore(query, rest, end, settled);
    }
    if (settled - list > k) {
      std::nth_element(list, list + k - 1, settled, before);
      settled = list + k;
    }
    return settled - list;
  }

  int64_t count() const { return count_; }

 private:
  // Makes points of [begin, end), without those that are NaN, and writes them from `to` <= begin on; returns
  // their end.
  Candidate* rescore(const float* query, const Candidate* begin, const Candidate* end, Candidate* to) {
    const Candidate* asked = begin;
    for (const Candidate* c = begin; c < end; ++c) {
      for (; asked < std::min(c + kAhead, end); ++asked) {
        if (!is_point(*asked)) {
          prefetch(blocks_.row(asked->row));
        }
      }
      if (is_point(*c)) {
        *to++ = *c;
        continue;
      }
      const float s = score(query, blocks_.row(c->row));
      if (!std::isnan(s)) {
        *to++ = {{s, s}, c->row};
      }
    }
    return to;
  }

  // Rows lie far apart, and memory answers late.
  static constexpr int64_t kAhead = 8;
  // Of a row: the rest comes by itself, line after line.
  static constexpr int64_t kPrefetchBytes = 1024;

  static bool is_point(const Candidate& c) { return c.score.lower == c.score.upper; }

  void prefetch(const char* row) const {
    const int64_t bytes = params_.dim * element_size(params_.table_type);
    for (int64_t b = 0; b < std::min(bytes, kPrefetchBytes); b += 64) {
      __builtin_prefetch(row + b);
    }
  }

  const MipsTopkParams& params_;
  const MipsTopkKernels& kernels_;
  const RowBlocks& blocks_;
  int64_t count_ = 0;
};

}  // namespace realm_kernels
