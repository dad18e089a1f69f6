// Hidden states and weight as the tiles take them. Part of linear_marginal_loss_body.inl.
#pragma once

#include <cstdint>

#include "cpu/linear_marginal_loss_tile.inl"

namespace realm_kernels {
namespace {

inline bool in_pairs(const LinearMarginalLossParams& params) {
  return kBFloat16Pairs && params.type == FloatType::kBFloat16;
}
inline int64_t units_of(int64_t elements, bool pairs) { return pairs ? (elements + 1) / 2 : elements; }
inline int64_t panels_of(int64_t n) { return (n + kLanes - 1) / kLanes; }
inline int64_t place_of(const LinearMarginalLossParams& params, int64_t row) {
  return params.place ? params.place[row] : row;
}

// The one switch over the dtype.
template <class Function>
inline auto with_rows(const void* rows, FloatType type, Function&& function) {
  switch (type) {
    case FloatType::kBFloat16:
      return function(static_cast<const BFloat16*>(rows));
    case FloatType::kFloat16:
      return function(static_cast<const Float16*>(rows));
    default:
      return function(static_cast<const float*>(rows));
  }
}

// Elements [from, from + 16) of a row as eight pairs, zeros beyond `end`.
inline Vec8 load_pairs(const BFloat16* row, int64_t from, int64_t end) {
  if (from + 16 <= end) {
    return load<Vec8>(row + from);
  }
  BFloat16 tail[16];
  __builtin_memset(tail, 0, sizeof tail);
  __builtin_memcpy(tail, row + from, static_cast<size_t>(end - from) * sizeof(BFloat16));
  return load<Vec8>(tail);
}

// kLanes elements of a row from `from` on, as float32, zeros beyond `end`.
template <class T>
inline void widen(const T* row, int64_t from, int64_t end, float* out) {
  for (int64_t i = 0; i < kLanes; i += 8) {
    store(out + i, from + i < end ? load_any(row, from + i, end) : Vec8{});
  }
}

// Panels of rows, [units of H][kLanes]: the operand of the first product. `eight(row, unit)` gives eight
// units.
template <class Eight>
inline void pack_row_panel(int64_t n, int64_t units, float* panel, Eight&& eight) {
  for (int64_t first = 0; first < kLanes; first += 8) {
    for (int64_t u = 0; u < units; u += 8) {
      Vec8 v[8];
      for (int64_t r = 0; r < 8; ++r) {
        v[r] = first + r < n ? eight(first + r, u) : Vec8{};
      }
      transpose8(v);
      for (int64_t j = 0; j < smaller(8, units - u); ++j) {
        store(panel + (u + j) * kLanes + first, v[j]);
      }
    }
  }
}

void pack_rows(const LinearMarginalLossParams& params, int64_t begin, int64_t end, float* packed) {
  const bool pairs = in_pairs(params);
  const int64_t units = units_of(params.width, pairs), stride = params.hidden_stride, width = params.width;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t first = p * kLanes, n = smaller(kLanes, params.rows - first);
    float* panel = packed + p * units * kLanes;
    int64_t starts[kLanes];
    for (int64_t r = 0; r < n; ++r) {
      starts[r] = place_of(params, first + r) * stride;
    }
    if (pairs) {
      const auto* rows = static_cast<const BFloat16*>(params.hidden);
      pack_row_panel(n, units, panel,
                     [&](int64_t r, int64_t u) { return load_pairs(rows + starts[r], 2 * u, width); });
    } else {
      with_rows(params.hidden, params.type, [&](auto* rows) {
        pack_row_panel(n, units, panel,
                       [&](int64_t r, int64_t u) { return load_any(rows + starts[r], u, width); });
      });
    }
  }
}

// Two rows of bfloat16, kLanes elements from `from` on, as kLanes units in the order of the columns.
inline void interleave(const BFloat16* even, const BFloat16* odd, int64_t from, int64_t end, float* out) {
  uint32_t units[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    const bool inside = from + i < end;
    const uint32_t low = inside ? even[from + i].bits : 0u, high = inside && odd ? odd[from + i].bits : 0u;
    units[i] = low | high << 16;
  }
  __builtin_memcpy(out, units, sizeof units);
}

// Panels of columns, [units of R][kLanes]: the operand of the third product.
void pack_columns(const LinearMarginalLossParams& params, int64_t begin, int64_t end, float* packed) {
  const bool pairs = in_pairs(params);
  const int64_t units = units_of(params.rows, pairs), stride = params.hidden_stride;
  for (int64_t p = begin; p < end; ++p) {
    float* panel = packed + p * units * kLanes;
    for (int64_t u = 0; u < units; ++u) {
      if (pairs) {
        const auto* rows = static_cast<const BFloat16*>(params.hidden);
        const auto* odd = 2 * u + 1 < params.rows ? rows + place_of(params, 2 * u + 1) * stride : nullptr;
        interleave(rows + place_of(params, 2 * u) * stride, odd, p * kLanes, params.width,
                   panel + u * kLanes);
      } else {
        with_rows(params.hidden, params.type, [&](auto* rows) {
          widen(rows + place_of(params, u) * stride, p * kLanes, params.width, panel + u * kLanes);
        });
      }
    }
  }
}

// Rows of the weight as units that a tile broadcasts: where they lie if they can be read there.
struct WeightRows {
  const float* units;
  int64_t pitch;  // in units
  bool in_place;
};

inline bool weight_in_place(const LinearMarginalLossParams& params) {
  return params.type == FloatType::kFloat32 ||
         (in_pairs(params) && params.width % 2 == 0 && params.weight_stride % 2 == 0);
}

inline int64_t staged_weight_size(const LinearMarginalLossParams& params) {
  return weight_in_place(params) ? 0 : kBlock * panels_of(params.width) * kLanes;
}

inline WeightRows weight_rows(const LinearMarginalLossParams& params, int64_t first, int64_t n,
                              float* stage) {
  const bool pairs = in_pairs(params);
  const int64_t stride = params.weight_stride, width = params.width;
  if (weight_in_place(params)) {
    const int64_t bytes = params.type == FloatType::kFloat32 ? 4 : 2;
    const char* rows = static_cast<const char*>(params.weight) + first * stride * bytes;
    return {reinterpret_cast<const float*>(rows), pairs ? stride / 2 : stride, true};
  }
  const int64_t pitch = panels_of(width) * kLanes;
  for (int64_t i = 0; i < n; ++i) {
    float* out = stage + i * pitch;
    if (pairs) {
      const auto* row = static_cast<const BFloat16*>(params.weight) + (first + i) * stride;
      for (int64_t u = 0; 2 * u < width; u += 8) {
        store(out + u, load_pairs(row, 2 * u, width));
      }
    } else {
      with_rows(params.weight, params.type, [&](auto* rows) {
        for (int64_t h = 0; h < width; h += kLanes) {
          widen(rows + (first + i) * stride, h, width, out + h);
        }
      });
    }
  }
  return {stage, pitch, false};
}

// Columns [from, from + kLanes) of n such rows as a panel, [units of n][kLanes]: the operand of the second
// product. Pairs stand with the even columns first, which saves their interleaving: see reduce().
inline void pack_weight_panel(const WeightRows& rows, int64_t n, bool pairs, int64_t from, int64_t width,
                              float* panel) {
  const auto columns = [&](int64_t i, float (&lanes)[kLanes]) {
    if (pairs) {
      BFloat16 elements[kLanes] = {};
      if (i < n) {
        const auto* row = reinterpret_cast<const BFloat16*>(rows.units + i * rows.pitch);
        __builtin_memcpy(elements, row + from, static_cast<size_t>(smaller(kLanes, width - from)) * 2);
      }
      __builtin_memcpy(lanes, elements, sizeof elements);
    } else {
      __builtin_memset(lanes, 0, sizeof lanes);
      __builtin_memcpy(lanes, rows.units + i * rows.pitch + from,
                       static_cast<size_t>(smaller(kLanes, width - from)) * 4);
    }
  };
  const bool whole = from + kLanes <= width;
  for (int64_t u = 0; u < units_of(n, pairs); ++u) {
    float* out = panel + u * kLanes;
    float first[kLanes], second[kLanes];
    if (!pairs) {
      if (whole) {
        const float* row = rows.units + u * rows.pitch + from;
        store(out, load<Vec>(row));
        store(out + kWidth, load<Vec>(row + kWidth));
      } else {
        columns(u, first);
        __builtin_memcpy(out, first, sizeof first);
      }
      continue;
    }
    UIntVec even, odd;
    if (whole && 2 * u + 1 < n) {
      even = load<UIntVec>(rows.units + 2 * u * rows.pitch + from / 2);
      odd = load<UIntVec>(rows.units + (2 * u + 1) * rows.pitch + from / 2);
    } else {
      columns(2 * u, first);
      columns(2 * u + 1, second);
      even = load<UIntVec>(first);
      odd = load<UIntVec>(second);
    }
    store(out, (even & 0xffffu) | odd << 16);
    store(out + kWidth, even >> 16 | (odd & 0xffff0000u));
  }
}

}  // namespace
}  // namespace realm_kernels
