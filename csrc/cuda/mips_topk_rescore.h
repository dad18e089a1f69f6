// Rescore and repair of mips_topk: canonical scores of the rows of chosen groups, the certificate, and what
// is done where it fails.
#pragma once

#include "cuda/mips_topk_search.h"

namespace realm_kernels {
namespace cuda {

constexpr int kRefined = 8;  // rows a thread whose codes a block looks at, so that enough of them are left
RK_BOTH constexpr int rows_of_block(int threads, bool codes) { return codes ? kRefined * threads : threads; }

// Blocks for a query: as many groups are chosen as tiles are kept, nearly always. Where more are, blocks take
// several shares of them.
RK_BOTH constexpr int parts_of_rescore(int kept, int selected, int threads, bool codes) {
  return ceil_div((kept < selected ? kept : selected) * kGroupRows, rows_of_block(threads, codes));
}

// Shared memory of rescore and repair: the query in float64 behind the keys, four numbers, then the groups
// that a repair found, or the positions that codes left and the codes of the query.
RK_BOTH constexpr int64_t scoring_bytes(int threads, int dim, int64_t code_pitch = 0) {
  const int64_t rows = rows_of_block(threads, code_pitch > 0);
  return top_keys_bytes(threads, kRowKeys) + 8 * int64_t{dim} + 4 * (rows + 4) + 16 + code_pitch;
}

struct RefineMemory {
  int* found;
  int* listed;            // [rows]
  Vector16* query_codes;  // [code_pitch / 16]

  // memory: what scoring_bytes() has behind the four numbers, of which the last counts.
  RK_DEVICE RefineMemory(int* memory, int rows)
      : found(memory - 1),
        listed(memory),
        query_codes(
            reinterpret_cast<Vector16*>((reinterpret_cast<uintptr_t>(memory + rows) + 15) / 16 * 16)) {}
};

RK_DEVICE void load_query(const SearchArguments& a, int b, double* query) {
  for (int d = static_cast<int>(threadIdx.x); d < a.dim; d += static_cast<int>(blockDim.x)) {
    query[d] = load_number(a.queries, a.query_type, b * a.query_stride + d * a.query_stride_d);
  }
  __syncthreads();
}

// The key of a row, kNothing where it may not be returned.
RK_DEVICE int64_t row_key(const SearchArguments& a, const double* query, int b, int row) {
  if (row < 0 || row >= a.num_rows || (a.row_mask != nullptr && !a.row_mask[row])) {
    return kNothing;
  }
  for (int e = 0; e < a.num_excluded; ++e) {
    if (a.exclude[b * a.exclude_stride + e * a.exclude_stride_e] == a.first_row + row) {
      return kNothing;
    }
  }
  const float score =
      a.row_type == Number::kFloat32
          ? canonical_score<Number::kFloat32>(query, a.rows, row, a.row_stride, a.dim, a.aligned)
      : a.row_type == Number::kBFloat16
          ? canonical_score<Number::kBFloat16>(query, a.rows, row, a.row_stride, a.dim, a.aligned)
          : canonical_score<Number::kFloat16>(query, a.rows, row, a.row_stride, a.dim, a.aligned);
  return score == score ? key_of(score, row) : kNothing;
}

// Whether this block is the last of `blocks` to be done with a query: then what the others wrote is visible.
RK_DEVICE bool is_last_block(const SearchArguments& a, int b, int blocks, int* told) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *told = atomicAdd(a.arrived + b, 1) == blocks - 1;
    if (*told) {
      a.arrived[b] = 0;  // for the repair, and the next search
    }
  }
  __syncthreads();
  __threadfence();
  return *told != 0;
}

// The k first of `count` keys that blocks wrote, in order, as the query's result; returns the k-th key.
RK_DEVICE int64_t write_first(const SearchArguments& a, TopKeys<kRowKeys>& top, int b, const int64_t* keys,
                              int64_t count) {
  top.clear();
  const auto threads = static_cast<int64_t>(blockDim.x);
  for (int64_t first = 0; first < count; first += kOffersPerRound * threads) {
#pragma unroll
    for (int i = 0; i < kOffersPerRound; ++i) {
      const int64_t place = first + i * threads + static_cast<int64_t>(threadIdx.x);
      top.offer(place < count ? load_from_others(keys + place) : kNothing);
    }
    top.end_round();
  }
  const int found = top.finish();
  top.sort(found);
  for (int i = static_cast<int>(threadIdx.x); i < a.k; i += static_cast<int>(blockDim.x)) {
    const int64_t key = i < found ? top.keys()[i] : kNothing;
    a.scores[static_cast<int64_t>(b) * a.k + i] = value_of(key);
    a.indices[static_cast<int64_t>(b) * a.k + i] = key == kNothing ? -1 : a.first_row + index_of(key);
  }
  return found == a.k ? top.keys()[a.k - 1] : kNothing;
}

// Where the rows of a query's chosen groups lie: the row at a position of their list, -1 for none.
RK_DEVICE int row_at(const SearchArguments& a, int b, int position) {
  const int group = a.chosen[static_cast<int64_t>(b) * a.selected + position / kGroupRows];
  const int64_t row = static_cast<int64_t>(group) * kGroupRows + position % kGroupRows;
  return row >= a.num_rows ? -1 : static_cast<int>(row);
}

// Of `count` rows from `first` on the keys that their codes leave possible. A warp takes 32 rows, four at a
// time with eight lanes each: lane l ends with the product of row 4 (l % 8) + l / 8, exact in any order. What
// may reach the floor is listed, and then scored from its rows, a row a thread.
RK_DEVICE void refine(const SearchArguments& a, int b, int first, int count, const double* query,
                      const RefineMemory& memory, int64_t* keys) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int vectors = static_cast<int>(a.code_pitch) / 16, lane = thread % 32;
  const auto* scanned = static_cast<const Vector16*>(a.scanned) + b * (a.scanned_pitch / 16);
  for (int i = thread; i < vectors; i += threads) {
    memory.query_codes[i] = scanned[i];
  }
  if (thread == 0) {
    *memory.found = 0;
  }
  __syncthreads();
  const QuadBound coarse = a.coarse[b];
  const float floor = a.floor[b];
  for (int start = thread - lane; start < count; start += threads) {
    int mine = 0;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      int rows[4], products[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int position = start + 16 * half + 4 * i + lane / 8;
        rows[i] = position < count ? row_at(a, b, first + position) : -1;
      }
      for (int v = lane % 8; v < vectors; v += 8) {
        Vector16 codes[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto* of_row = reinterpret_cast<const Vector16*>(a.codes + rows[i] * a.code_pitch);
          codes[i] = rows[i] >= 0 ? of_row[v] : Vector16{};
        }
        const Vector16 of_query = memory.query_codes[v];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            const auto x = static_cast<int>(codes[i].words[w]), y = static_cast<int>(of_query.words[w]);
            products[i] = __dp4a(x, y, products[i]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int product = products[i];
        product += __shfl_xor_sync(0xFFFFFFFFu, product, 1);
        product += __shfl_xor_sync(0xFFFFFFFFu, product, 2);
        product += __shfl_xor_sync(0xFFFFFFFFu, product, 4);
        mine = lane % 8 == 4 * half + i ? product : mine;
      }
    }
    const int position = start + 4 * (lane % 8) + lane / 8;
    if (position < count) {
      const int row = row_at(a, b, first + position);
      bool may_be_first = false;
      if (row >= 0) {
        const float* bounds = bounds_of_codes(a, row);
        const CodeQuad of_row{bounds[0], bounds[0], bounds[2], bounds[1]};
        may_be_first = !(coarse.of_codes(to_float_up(mine), of_row) < floor);
      }
      if (may_be_first) {
        memory.listed[atomicAdd(memory.found, 1)] = position;
      } else {
        keys[first + position] = kNothing;
      }
    }
  }
  __syncthreads();
  const int found = *memory.found;
  for (int i = thread; i < found; i += threads) {
    const int position = first + memory.listed[i];
    keys[position] = row_key(a, query, b, row_at(a, b, position));
  }
}

// Blocks score the rows of a query's chosen groups, a row a thread, or over codes those that may be among the
// first; the last of them orders the keys, and certifies that no group left out can change the result, and no
// row, or flags the query. Reads 32 B D row bytes a chosen group, with codes 32 B D and few rows: the gather
// bounds it. Blocks that no chosen group needs leave at once.
template <bool kCodes>
RK_DEVICE void rescore(const SearchArguments& a) {
  const auto threads = static_cast<int>(blockDim.x);
  const int rows = rows_of_block(threads, kCodes);
  const int parts = parts_of_rescore(a.kept, a.selected, threads, kCodes);
  const int b = static_cast<int>(blockIdx.x) / parts, part = static_cast<int>(blockIdx.x) % parts;
  const int width = a.num_chosen[b] * kGroupRows;
  const int shares = width > rows ? ceil_div(width, rows) : 1;
  const int blocks = shares < parts ? shares : parts;
  if (part >= blocks) {
    return;
  }
  unsigned char* memory = dynamic_shared_memory();
  TopKeys<kRowKeys> top(memory, a.k);
  auto* query = reinterpret_cast<double*>(memory + top_keys_bytes(threads, kRowKeys));
  auto* told = reinterpret_cast<int*>(query + a.dim);
  load_query(a, b, query);
  int64_t* keys = a.candidates + static_cast<int64_t>(b) * a.selected * kGroupRows;
  for (int first = part * rows; first < width; first += blocks * rows) {
    if constexpr (kCodes) {
      __syncthreads();  // the list of the share before is no longer read
      const int left = width - first;
      refine(a, b, first, left < rows ? left : rows, query, RefineMemory(told + 4, rows), keys);
    } else if (const int position = first + static_cast<int>(threadIdx.x); position < width) {
      keys[position] = row_key(a, query, b, row_at(a, b, position));
    }
  }
  if (!is_last_block(a, b, blocks, told)) {
    return;
  }
  const int64_t last = write_first(a, top, b, keys, width);
  if (threadIdx.x == 0) {
    const int64_t left = a.left_out[b];
    // A group cannot matter if U < tau, or if U = tau and all its ids are larger. The high half of kNothing
    // is below every value: too few rows were found, and any group left out may hold one.
    const bool above = high_of(left) > high_of(last);
    const bool before =
        high_of(left) == high_of(last) && static_cast<int64_t>(index_of(left)) * kGroupRows < index_of(last);
    a.kth[b] = last;
    // Rows that cannot reach the floor were not scored: that was right if k rows did reach it.
    const bool unread = value_of(last) < a.floor[b];
    if ((left != kNothing && (above || before)) || unread) {
      a.flagged[atomicAdd(a.arrived + a.batch, 1)] = b;
      atomicAdd(a.repairs, 1ull);
    }
  }
}

// Every group whose U reaches the k-th score so far, for the queries that were flagged; without one a block
// reads four bytes and leaves. Blocks take (query, run of groups) in turn; the last one done with a query
// writes it anew.
RK_DEVICE void repair(const SearchArguments& a) {
  const int tasks = a.arrived[a.batch] * a.parts;
  const auto threads = static_cast<int>(blockDim.x);
  unsigned char* memory = dynamic_shared_memory();
  TopKeys<kRowKeys> top(memory, a.k);
  auto* query = reinterpret_cast<double*>(memory + top_keys_bytes(threads, kRowKeys));
  auto* told = reinterpret_cast<int*>(query + a.dim);
  int* found = told + 1;
  int* groups = told + 4;  // [threads]
  for (int task = static_cast<int>(blockIdx.x); task < tasks; task += static_cast<int>(gridDim.x)) {
    const int b = a.flagged[task / a.parts], part = task % a.parts;
    __syncthreads();  // the query of the task before is no longer read
    load_query(a, b, query);
    top.clear();
    const QueryBound q = a.bounds[b];
    const int64_t last = a.kth[b];
    const float tau = value_of(last);
    const int run = ceil_div(a.num_groups, a.parts);
    const int end = (part + 1) * run < a.num_groups ? (part + 1) * run : a.num_groups;
    for (int first = part * run; first < end; first += threads) {
      __syncthreads();
      if (threadIdx.x == 0) {
        *found = 0;
      }
      __syncthreads();
      const int group = first + static_cast<int>(threadIdx.x);
      const float bound =
          group < end ? group_bound(a, q, word_of(a, b, group / kTileGroups), group) : -infinity();
      if (bound >= tau && bound > -infinity()) {
        groups[atomicAdd(found, 1)] = group;
      }
      __syncthreads();
      const int64_t rows = static_cast<int64_t>(*found) * kGroupRows;
      for (int64_t start = 0; start < rows; start += threads) {
        const int64_t place = start + static_cast<int64_t>(threadIdx.x);
        int64_t key = kNothing;
        if (place < rows) {
          const int64_t row =
              static_cast<int64_t>(groups[place / kGroupRows]) * kGroupRows + place % kGroupRows;
          key = row < a.num_rows ? row_key(a, query, b, static_cast<int>(row)) : kNothing;
        }
        top.offer(key >= last ? key : kNothing);  // behind the k-th so far nothing can come in
        top.end_round();
      }
    }
    const int count = top.finish();
    int64_t* keys = a.repaired + static_cast<int64_t>(b) * a.parts * a.k;
    for (int i = static_cast<int>(threadIdx.x); i < a.k; i += threads) {
      keys[static_cast<int64_t>(part) * a.k + i] = i < count ? top.keys()[i] : kNothing;
    }
    if (is_last_block(a, b, a.parts, told)) {
      write_first(a, top, b, keys, static_cast<int64_t>(a.parts) * a.k);
    }
  }
}

}  // namespace cuda
}  // namespace realm_kernels
