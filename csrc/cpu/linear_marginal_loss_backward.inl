// Gradients of a block of the vocabulary. Part of linear_marginal_loss_body.inl.
#pragma once

#include <cstdint>

#include "cpu/linear_marginal_loss_forward.inl"

namespace realm_kernels {
namespace {

typedef uint16_t HalfVec __attribute__((vector_size(2 * kWidth)));

// Gradients of logits of one block, as the rows that the second and third product broadcast. Pairs differ: of
// rows of the chunk in one, of words in the other. A cache line more than the rows need keeps words that
// follow each other out of each other's cache sets.
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

inline TwoVecs times(const TwoVecs& a, const TwoVecs& b) { return {a.low * b.low, a.high * b.high}; }

// A word's gradients of one panel of rows added to its sums over rows; what lanes beyond the last row hold is
// dropped.
inline void add_to_bias(float* sums, const TwoVecs& gradients, int64_t first_row, int64_t rows) {
  TwoVecs of_rows = gradients;
  if (first_row + kLanes > rows) {
    for (int64_t i = 0; i < kWidth; ++i) {
      of_rows.low[i] = first_row + i < rows ? of_rows.low[i] : 0.0f;
      of_rows.high[i] = first_row + kWidth + i < rows ? of_rows.high[i] : 0.0f;
    }
  }
  store(sums, load<Vec>(sums) + (of_rows.low + of_rows.high));
}

// d_bias of n words, whose sums [n][kWidth] are spoiled.
inline void finish_bias(float* sums, int64_t n, float* d_bias) {
  for (int64_t i = 0; i < n; ++i) {
    float* lanes = sums + i * kWidth;
    for (int64_t half = kWidth / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) {
        lanes[lane] += lanes[lane + half];
      }
    }
    d_bias[i] += lanes[0];
  }
}

// The gradients of a block: exponentials times the rows' scales, panel after panel as they lie in memory.
// bias_sums [kBlock][kWidth], zeros, where there is a d_bias.
inline void fill_singles(const LinearMarginalLossParams& params, const float* exponentials, int64_t n,
                         const float* scales, float* bias_sums, const BlockGradients& out) {
  for (int64_t p = 0; p < panels_of(params.rows); ++p) {
    const TwoVecs scale = load_two(scales + p * kLanes);
    for (int64_t i = 0; i < n; ++i) {
      const TwoVecs word = times(Singles::kept(exponentials + (p * n + i) * Singles::kKept), scale);
      store_two(out.by_word + i * out.word_pitch + p * kLanes, word);
      if (params.d_bias) {
        add_to_bias(bias_sums + i * kWidth, word, p * kLanes, params.rows);
      }
    }
  }
}

inline void put_target(const BlockGradients& out, int64_t word, int64_t row, float value) {
  out.by_word[word * out.word_pitch + row] = value;
}

#if defined(__AVX512BF16__)
inline __m512i rounded(const TwoVecs& v) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)v.high, (__m512)v.low);
}

// Two words at a time: a panel of each, rounded, is 16 pairs of rows; of both, interleaved, 32 pairs of
// words.
inline void fill_pairs(const LinearMarginalLossParams& params, const float* exponentials, int64_t n,
                       const float* scales, float* bias_sums, const BlockGradients& out) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  Halves pairs_low, pairs_high;
  for (int i = 0; i < kLanes; ++i) {
    pairs_low[i] = static_cast<uint16_t>(i / 2 + i % 2 * kLanes);
    pairs_high[i] = static_cast<uint16_t>(pairs_low[i] + kWidth);
  }
  for (int64_t p = 0; p < panels_of(params.rows); ++p) {
    const TwoVecs scale = load_two(scales + p * kLanes);
    const auto put_word = [&](int64_t i) {
      const TwoVecs word = times(Pairs::kept(exponentials + (p * n + i) * Pairs::kKept), scale);
      const __m512i bits = rounded(word);
      store(out.by_word + i * out.word_pitch + p * kWidth, bits);
      if (params.d_bias) {
        add_to_bias(bias_sums + i * kWidth, word, p * kLanes, params.rows);
      }
      return bits;
    };
    for (int64_t i = 0; i < n; i += 2) {
      const __m512i even = put_word(i), odd = i + 1 < n ? put_word(i + 1) : __m512i{};
      float* by_row = out.by_row + i / 2 * out.row_pitch + p * kLanes;
      store(by_row, _mm512_permutex2var_epi16(even, (__m512i)pairs_low, odd));
      store(by_row + kWidth, _mm512_permutex2var_epi16(even, (__m512i)pairs_high, odd));
    }
  }
  if (params.rows % 2 == 1) {  // the row behind the last has a place in its pair, and no part
    for (int64_t i = 0; i < n; ++i) {
      char* pair = reinterpret_cast<char*>(out.by_word + i * out.word_pitch + params.rows / 2);
      __builtin_memset(pair + 2, 0, 2);
    }
  }
}

inline void put_target_pair(const BlockGradients& out, int64_t word, int64_t row, float value) {
  const __m512i bits = rounded({Vec{} + value, Vec{}});
  __builtin_memcpy(reinterpret_cast<char*>(out.by_word + word * out.word_pitch) + 2 * row, &bits, 2);
  __builtin_memcpy(reinterpret_cast<char*>(out.by_row + word / 2 * out.row_pitch + row) + word % 2 * 2, &bits,
                   2);
}
#else
inline void fill_pairs(const LinearMarginalLossParams&, const float*, int64_t, const float*, float*,
                       const BlockGradients&) {}
inline void put_target_pair(const BlockGradients&, int64_t, int64_t, float) {}
#endif

inline void put_targets(const LinearMarginalLossParams& params, int64_t first, int64_t n,
                        const float* at_target, const BlockGradients& out) {
  for (int64_t r = 0; r < params.rows; ++r) {
    const int64_t word = params.targets[r] - first;
    if (word < 0 || word >= n) {
      continue;
    }
    if (in_pairs(params)) {
      put_target_pair(out, word, r, at_target[r]);
    } else {
      put_target(out, word, r, at_target[r]);
    }
    if (params.d_bias) {
      params.d_bias[first + word] += at_target[r];
    }
  }
}

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
inline void add_d_weight(const LinearMarginalLossParams& params, const float* packed, int64_t first,
                         int64_t n, const BlockGradients& gradients) {
  const int64_t depth = (params.rows + Step::kEach - 1) / Step::kEach, width = params.width;
  const Groups groups(n);
  for (int64_t g = 0; g < groups.count; ++g) {
    float* rows = params.d_weight + (first + groups.first(g)) * width;
    for (int64_t h = 0; h < width; h += kLanes) {
      const bool whole = h + kLanes <= width;
      const Ask ask = params.first || !whole
                          ? kAskNothing
                          : Ask{reinterpret_cast<const char*>(rows + h + kLanes), groups.size(g), width * 4};
      tile_of<Step, Broadcast::kRows>(groups.size(g), packed + h * depth, depth,
                                      gradients.by_word + groups.first(g) * gradients.word_pitch,
                                      gradients.word_pitch, ask, [&](int q, Vec low, Vec high) {
                                        float* at = rows + q * width + h;
                                        if (whole) {
                                          store(at, params.first ? low : load<Vec>(at) + low);
                                          store(at + kWidth,
                                                params.first ? high : load<Vec>(at + kWidth) + high);
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
    const int64_t first = layout.first_word(block), n = layout.first_word(block + 1) - first;
    const float* exponentials = exponentials_of<Step>(layout, first);
    scales_of(params, layout.largest + block * layout.padded_rows, scales);
    float* bias_sums = panel;  // not in use yet
    if (params.d_bias) {
      __builtin_memset(bias_sums, 0, kBlock * kWidth * sizeof(float));
    }
    if (pairs) {
      fill_pairs(params, exponentials, n, scales, bias_sums, gradients);
    } else {
      fill_singles(params, exponentials, n, scales, bias_sums, gradients);
    }
    if (params.d_bias) {
      finish_bias(bias_sums, n, params.d_bias + first);
    }
    put_targets(params, first, n, at_target, gradients);
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

// To nearest, ties to even, as torch rounds; subnormal numbers too, which vcvtneps2bf16 flushes.
inline HalfVec rounded_to_bfloat16(Vec v) {
  const UIntVec bits = (UIntVec)v, nearest = bits + (0x7fffu + (bits >> 16 & 1u));
  return __builtin_convertvector((v == v ? nearest : UIntVec{} + 0x7fc00000u) >> 16, HalfVec);
}

inline Vec load_wide(const float* from) { return load<Vec>(from); }
inline Vec load_wide(const uint16_t* from) {
  return (Vec)(__builtin_convertvector(load<HalfVec>(from), UIntVec) << 16);
}
inline void store_rounded(float* to, Vec v) { store(to, v); }
inline void store_rounded(uint16_t* to, Vec v) { store(to, rounded_to_bfloat16(v)); }

// Float32 or bfloat16, whose bits the types of the pointers stand for.
template <class From, class To>
inline void scale_elements(const From* values, float scale, To* out, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    store_rounded(out + i, load_wide(values + i) * scale);
  }
  From last[kWidth] = {};
  To rounded[kWidth];
  __builtin_memcpy(last, values + i, static_cast<size_t>(count - i) * sizeof(From));
  store_rounded(rounded, load_wide(last) * scale);
  __builtin_memcpy(out + i, rounded, static_cast<size_t>(count - i) * sizeof(To));
}

void scale(const ScaledArray& array, float scale, int64_t begin, int64_t end) {
  const auto into = [&](auto* out) {
    if (array.values.type == FloatType::kBFloat16) {
      scale_elements(static_cast<const uint16_t*>(array.values.data) + begin, scale, out + begin,
                     end - begin);
    } else {
      scale_elements(static_cast<const float*>(array.values.data) + begin, scale, out + begin, end - begin);
    }
  };
  if (array.out_type == FloatType::kBFloat16) {
    into(static_cast<uint16_t*>(array.out));
  } else {
    into(static_cast<float*>(array.out));
  }
}

void reduce(const LinearMarginalLossParams& params, const float* partials, int64_t stride, int parts,
            int64_t begin, int64_t end) {
  const bool pairs = in_pairs(params), narrow = params.d_hidden_type == FloatType::kBFloat16;
  for (int64_t h = 0; h < params.width; h += kLanes) {
    const int64_t n = smaller(kLanes, params.width - h);
    for (int64_t r = begin; r < end; ++r) {
      const float* at = partials + (h / kLanes * params.rows + r) * kLanes;
      float sums[kLanes], in_order[kLanes];
      for (int64_t half = 0; half < kLanes; half += kWidth) {
        Vec sum = load<Vec>(at + half);
        for (int part = 1; part < parts; ++part) {
          sum += load<Vec>(at + part * stride + half);
        }
        store(sums + half, sum);
      }
      for (int64_t i = 0; i < kLanes; ++i) {
        in_order[column_of(i, pairs)] = sums[i];
      }
      const int64_t first = place_of(params, r) * params.width + h;
      if (narrow) {
        scale_elements(in_order, 1.0f, static_cast<uint16_t*>(params.d_hidden) + first, n);
      } else {
        __builtin_memcpy(static_cast<float*>(params.d_hidden) + first, in_order,
                         static_cast<size_t>(n) * sizeof(float));
      }
    }
  }
}

}  // namespace
}  // namespace realm_kernels
