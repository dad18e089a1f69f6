// Gradients of a block of the vocabulary. Part of linear_marginal_loss_body.inl.
#pragma once

#include <cstdint>

#include "cpu/linear_marginal_loss_forward.inl"

namespace realm_kernels {
namespace {

// Gradients of logits of one block, as the rows that the second and third product broadcast. Pairs differ: of
// rows of the chunk in one, of words in the other. A cache line more than the rows need keeps words that follow
// each other out of each other's cache sets.
struct BlockGradients {
  float* by_word;  // [n][pitch of units of R], for d_weight
  int64_t word_pitch;
  float* by_row;  // [units of n][pitch of R], for d_hidden; by_word itself where units are single
  int64_t row_pitch;
};

inline int64_t gradients_size(const LinearMarginalLossParams& params) {
  return kBlock * (round_up(params.rows, kRowMultiple) + 2 * kLineBytes / 4);
}

inline BlockGradients gradients_in(float* memory, const LinearMarginalLossParams& params) {
  const int64_t padded = round_up(params.rows, kRowMultiple), line = kLineBytes / 4;
  if (!in_pairs(params)) {
    return {memory, padded + line, memory, padded + line};
  }
  const int64_t word_pitch = padded / 2 + line;
  return {memory, word_pitch, memory + kBlock * word_pitch, padded + line};
}

// Adds to d_bias what the lanes of sum hold.
inline void add_bias_gradient(float* d_bias, Vec sum) {
  float total = 0.0f;
  for (int i = 0; i < kWidth; ++i) {
    total += sum[i];
  }
  *d_bias += total;
}

// Sums of lanes that are rows of the chunk: what padded lanes hold is dropped.
inline Vec of_rows(Vec values, int64_t first_row, int64_t rows) {
  if (first_row + kWidth > rows) {
    for (int i = 0; i < kWidth; ++i) {
      values[i] = first_row + i < rows ? values[i] : 0.0f;
    }
  }
  return values;
}

// A word's exponentials times the rows' scales. low and high of each panel go to put(panel, low, high).
template <class Put>
inline void scale_word(const LinearMarginalLossParams& params, const float* exponentials, int64_t n,
                       int64_t word, const float* scales, float* d_bias, Put&& put) {
  Vec sum = {};
  for (int64_t p = 0; p < panels_of(params.rows); ++p) {
    const float* at = exponentials + (p * n + word) * kLanes;
    const Vec low = load<Vec>(at) * load<Vec>(scales + p * kLanes);
    const Vec high = load<Vec>(at + kWidth) * load<Vec>(scales + p * kLanes + kWidth);
    put(p, low, high);
    if (d_bias) {
      sum += of_rows(low, p * kLanes, params.rows) + of_rows(high, p * kLanes + kWidth, params.rows);
    }
  }
  if (d_bias) {
    add_bias_gradient(d_bias, sum);
  }
}

inline void fill_singles(const LinearMarginalLossParams& params, const float* exponentials, int64_t first,
                         int64_t n, const float* scales, const float* at_target, const BlockGradients& out) {
  for (int64_t i = 0; i < n; ++i) {
    scale_word(params, exponentials, n, i, scales, params.d_bias ? params.d_bias + first + i : nullptr,
               [&](int64_t p, Vec low, Vec high) {
                 store(out.by_word + i * out.word_pitch + p * kLanes, low);
                 store(out.by_word + i * out.word_pitch + p * kLanes + kWidth, high);
               });
  }
  for (int64_t r = 0; r < params.rows; ++r) {
    const int64_t word = params.targets[r] - first;
    if (word >= 0 && word < n) {
      out.by_word[word * out.word_pitch + r] = at_target[r];
      if (params.d_bias) {
        params.d_bias[first + word] += at_target[r];
      }
    }
  }
}

#if defined(__AVX512BF16__)
inline UIntVec bfloat16_bits(Vec v) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
  return __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)v), UIntVec);
}

inline void fill_pairs(const LinearMarginalLossParams& params, const float* exponentials, int64_t first,
                       int64_t n, const float* scales, const float* at_target, const BlockGradients& out) {
  for (int64_t i = 0; i < n; ++i) {
    const bool second = i % 2 == 1;
    float* by_row = out.by_row + i / 2 * out.row_pitch;
    scale_word(params, exponentials, n, i, scales, params.d_bias ? params.d_bias + first + i : nullptr,
               [&](int64_t p, Vec low, Vec high) {
                 store(out.by_word + i * out.word_pitch + p * kWidth,
                       _mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
                 float* at = by_row + p * kLanes;
                 const UIntVec low_bits = bfloat16_bits(low), high_bits = bfloat16_bits(high);
                 if (second) {
                   store(at, load<UIntVec>(at) | low_bits << 16);
                   store(at + kWidth, load<UIntVec>(at + kWidth) | high_bits << 16);
                 } else {
                   store(at, low_bits);
                   store(at + kWidth, high_bits);
                 }
               });
  }
  for (int64_t r = 0; r < params.rows; ++r) {
    const int64_t word = params.targets[r] - first;
    if (word >= 0 && word < n) {
      const UIntVec bits = bfloat16_bits(Vec{} + at_target[r]);
      const auto value = static_cast<uint16_t>(bits[0]);
      __builtin_memcpy(reinterpret_cast<char*>(out.by_word + word * out.word_pitch) + 2 * r, &value, 2);
      __builtin_memcpy(reinterpret_cast<char*>(out.by_row + word / 2 * out.row_pitch + r) + word % 2 * 2,
                       &value, 2);
      if (params.d_bias) {
        params.d_bias[first + word] += at_target[r];
      }
    }
  }
  if (params.rows % 2 == 1) {  // the row behind the last has a place in its pair, and no part
    for (int64_t i = 0; i < n; ++i) {
      char* pair = reinterpret_cast<char*>(out.by_word + i * out.word_pitch + params.rows / 2);
      __builtin_memset(pair + 2, 0, 2);
    }
  }
}
#else
inline void fill_pairs(const LinearMarginalLossParams&, const float*, int64_t, int64_t, const float*,
                       const float*, const BlockGradients&) {}
#endif

// scales[r] = factor exp(largest of the block - log sum): what makes an exponential a gradient.
inline void scales_of(const LinearMarginalLossParams& params, const float* largest, float* scales) {
  for (int64_t r = 0; r < round_up(params.rows, kLanes); r += kWidth) {
    float distance[kWidth] = {}, factor[kWidth] = {};
    for (int64_t i = 0; i < smaller(kWidth, params.rows - r); ++i) {
      distance[i] = static_cast<float>(static_cast<double>(largest[r + i]) - params.log_sum[r + i]);
      factor[i] = static_cast<float>(params.factor[r + i]);
    }
    store(scales + r, exponential(load<Vec>(distance)) * load<Vec>(factor));
  }
}

// Third product: d_weight of n words += their gradients times hidden.
template <class Step>
inline void add_d_weight(const LinearMarginalLossParams& params, const float* packed, int64_t first, int64_t n,
                         const BlockGradients& gradients) {
  const int64_t depth = (params.rows + Step::kEach - 1) / Step::kEach, width = params.width;
  const Groups groups(n);
  for (int64_t g = 0; g < groups.count; ++g) {
    float* rows = params.d_weight + (first + groups.first(g)) * width;
    for (int64_t h = 0; h < width; h += kLanes) {
      const bool whole = h + kLanes <= width;
      const Ask ask = params.first || !whole
                          ? kAskNothing
                          : Ask{reinterpret_cast<const char*>(rows + h + kLanes), groups.size(g), width * 4};
      tile_of<Step, Broadcast::kRows>(
          groups.size(g), packed + h * depth, depth, gradients.by_word + groups.first(g) * gradients.word_pitch,
          gradients.word_pitch, ask, [&](int q, Vec low, Vec high) {
            float* at = rows + q * width + h;
            if (whole) {
              store(at, params.first ? low : load<Vec>(at) + low);
              store(at + kWidth, params.first ? high : load<Vec>(at + kWidth) + high);
              return;
            }
            float tail[kLanes];
            store(tail, low);
            store(tail + kWidth, high);
            for (int64_t i = 0; i < width - h; ++i) {
              at[i] = params.first ? tail[i] : at[i] + tail[i];
            }
          });
    }
  }
}

// Second product: partial [panels of H][R][kLanes] += gradients of n words times their weights.
template <class Step>
inline void add_d_hidden(const LinearMarginalLossParams& params, const WeightRows& weight, int64_t n,
                         const BlockGradients& gradients, float* panel, float* partial) {
  const bool pairs = Step::kEach == 2;
  const int64_t depth = units_of(n, pairs), width = params.width;
  const int64_t bytes = pairs ? 2 : 4;  // of an element
  const Groups groups(params.rows);
  for (int64_t h = 0; h < width; h += kLanes) {
    pack_weight_panel(weight, n, pairs, h, width, panel);
    for (int64_t g = 0; g < groups.count; ++g) {
      Ask ask = kAskNothing;
      if (weight.in_place && h + kLanes < width) {
        // Each group fetches its share of the next panel's rows.
        const int64_t row = n * g / groups.count, steps = n * (g + 1) / groups.count - row;
        ask = {reinterpret_cast<const char*>(weight.units + row * weight.pitch) + (h + kLanes) * bytes, steps,
               weight.pitch * 4};
      }
      const int64_t first = groups.first(g);
      float* sums = partial + (h / kLanes * params.rows + first) * kLanes;
      tile_of<Step, Broadcast::kColumns>(groups.size(g), panel, depth, gradients.by_row + first,
                                         gradients.row_pitch, ask, [&](int q, Vec low, Vec high) {
                                           float* at = sums + q * kLanes;
                                           store(at, load<Vec>(at) + low);
                                           store(at + kWidth, load<Vec>(at + kWidth) + high);
                                         });
    }
  }
}

template <class Step>
void backward_blocks(const LinearMarginalLossParams& params, const ChunkLayout& layout, const float* packed,
                     const float* at_target, int64_t begin, int64_t end, float* scratch, float* partial) {
  const bool pairs = Step::kEach == 2;
  float* scales = scratch;  // [padded rows]
  float* panel = scales + layout.padded_rows;
  float* memory = panel + kBlock * kLanes;
  float* stage = memory + gradients_size(params);
  const BlockGradients gradients = gradients_in(memory, params);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlock, n = smaller(kBlock, params.vocabulary - first);
    const float* exponentials = layout.exponentials + first * layout.padded_rows;
    scales_of(params, layout.largest + block * layout.padded_rows, scales);
    if (pairs) {
      fill_pairs(params, exponentials, first, n, scales, at_target, gradients);
    } else {
      fill_singles(params, exponentials, first, n, scales, at_target, gradients);
    }
    if (params.d_weight) {
      add_d_weight<Step>(params, packed, first, n, gradients);
    }
    if (params.d_hidden) {
      add_d_hidden<Step>(params, weight_rows(params, first, n, stage), n, gradients, panel, partial);
    }
  }
}

// The columns of a panel of pairs stand even ones first.
inline int64_t column_of(int64_t lane, bool pairs) {
  return pairs ? lane % kWidth * 2 + lane / kWidth : lane;
}

void reduce(const LinearMarginalLossParams& params, const float* partials, int64_t stride, int parts,
            int64_t begin, int64_t end) {
  const bool pairs = in_pairs(params);
  for (int64_t h = 0; h < params.width; h += kLanes) {
    for (int64_t r = begin; r < end; ++r) {
      const float* at = partials + (h / kLanes * params.rows + r) * kLanes;
      float sums[kLanes];
      for (int64_t half = 0; half < kLanes; half += kWidth) {
        Vec sum = load<Vec>(at + half);
        for (int part = 1; part < parts; ++part) {
          sum += load<Vec>(at + part * stride + half);
        }
        store(sums + half, sum);
      }
      float* out = params.d_hidden + r * params.width + h;
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t column = column_of(i, pairs);
        if (h + column < params.width) {
          out[column] = sums[i];
        }
      }
    }
  }
}

}  // namespace
}  // namespace realm_kernels
