// Logits of a block of the vocabulary and their statistics. Part of linear_marginal_loss_body.inl.
#pragma once

#include <cstdint>

#include "cpu/linear_marginal_loss_pack.inl"

namespace realm_kernels {
namespace {

constexpr float kLowest = -0x1.fffffep127f;  // below every logit but -inf, whose exponential is then 0

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline TwoVecs plus(const TwoVecs& a, float b) { return {a.low + b, a.high + b}; }

// What is kept of the logits of n words and one panel of rows, [n][kLanes]: exponentials to `out` where it is
// not null, their sums, and what they are relative to. The target is taken out: its share is added last, in
// float64, so that log p keeps its digits where p is near 1.
template <class Step>
inline void finish_panel(const LinearMarginalLossParams& params, int64_t first_word, int64_t n,
                         int64_t first_row, float* logits, float* out, float* target_logits, float* largest,
                         float* sums) {
  for (int64_t lane = 0; lane < smaller(kLanes, params.rows - first_row); ++lane) {
    const int64_t word = params.targets[first_row + lane] - first_word;
    if (word >= 0 && word < n) {
      float& logit = logits[word * kLanes + lane];
      target_logits[first_row + lane] = logit + (params.bias ? params.bias[first_word + word] : 0.0f);
      logit = -__builtin_inff();
    }
  }
  // Adding the bias twice costs less than storing its sum.
  const auto logit = [&](int64_t i) {
    const TwoVecs at = load_two(logits + i * kLanes);
    return params.bias ? plus(at, params.bias[first_word + i]) : at;
  };
  TwoVecs most = {Vec{} + kLowest, Vec{} + kLowest}, sum = {{}, {}};
  for (int64_t i = 0; i < n; ++i) {
    const TwoVecs at = logit(i);
    most = {larger(at.low, most.low), larger(at.high, most.high)};
  }
  for (int64_t i = 0; i < n; ++i) {
    const TwoVecs at = logit(i);
    const TwoVecs e = {exponential(at.low - most.low), exponential(at.high - most.high)};
    sum = {sum.low + e.low, sum.high + e.high};
    if (out) {
      Step::keep(out + i * Step::kKept, e);
    }
  }
  store_two(largest + first_row, most);
  store_two(sums + first_row, sum);
}

// Of the block whose first word it is: [panels of rows][words][kKept].
template <class Step>
inline float* exponentials_of(const ChunkLayout& layout, int64_t first_word) {
  return layout.exponentials + first_word * layout.padded_rows * Step::kKept / kLanes;
}

template <class Step>
void forward_blocks(const LinearMarginalLossParams& params, const ChunkLayout& layout, const float* packed,
                    const RowStatistics& statistics, int64_t begin, int64_t end, float* scratch) {
  const int64_t depth = (params.width + Step::kEach - 1) / Step::kEach;
  float* logits = scratch;  // [kBlock][kLanes]
  float* stage = scratch + kBlock * kLanes;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = layout.first_word(block), n = layout.first_word(block + 1) - first;
    const WeightRows weight = weight_rows(params, first, n, stage);
    const Groups groups(n);
    float* out = layout.exponentials ? exponentials_of<Step>(layout, first) : nullptr;
    for (int64_t p = 0; p < panels_of(params.rows); ++p) {
      for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t row = groups.first(g), size = groups.size(g);
        Ask ask = kAskNothing;
        if (p == 0 && weight.in_place && first + row + size < params.vocabulary) {
          // The rows of the next group, which is also that of the next block.
          const int64_t lines = size * weight.pitch * 4 / kLineBytes;
          ask = {reinterpret_cast<const char*>(weight.units + (row + size) * weight.pitch), lines / 2,
                 2 * kLineBytes};
        }
        tile_of<Step, Broadcast::kRows>(size, packed + p * depth * kLanes, depth,
                                        weight.units + row * weight.pitch, weight.pitch, ask,
                                        [&](int q, Vec low, Vec high) {
                                          store(logits + (row + q) * kLanes, low);
                                          store(logits + (row + q) * kLanes + kWidth, high);
                                        });
      }
      finish_panel<Step>(params, first, n, p * kLanes, logits, out ? out + p * n * Step::kKept : nullptr,
                         statistics.target_logits, layout.largest + block * layout.padded_rows,
                         statistics.sums + block * layout.padded_rows);
    }
  }
}

void merge(const ChunkLayout& layout, const RowStatistics& statistics, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r += kWidth) {
    Vec largest = Vec{} + kLowest;
    for (int64_t b = 0; b < layout.blocks; ++b) {
      largest = larger(load<Vec>(layout.largest + b * layout.padded_rows + r), largest);
    }
    double totals[kWidth] = {};
    for (int64_t b = 0; b < layout.blocks; ++b) {
      const int64_t at = b * layout.padded_rows + r;
      const Vec share =
          load<Vec>(statistics.sums + at) * exponential(load<Vec>(layout.largest + at) - largest);
      for (int i = 0; i < kWidth; ++i) {
        totals[i] += static_cast<double>(share[i]);
      }
    }
    store(statistics.largest + r, largest);
    __builtin_memcpy(statistics.totals + r, totals, sizeof totals);
  }
}

}  // namespace
}  // namespace realm_kernels
