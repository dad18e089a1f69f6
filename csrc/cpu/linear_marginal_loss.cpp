// The driver of linear_marginal_loss: which instruction set, which thread takes which part, and what is left
// of a row once its vocabulary is summed.
#include "cpu/linear_marginal_loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/linear_marginal_loss_kernels.h"
#include "cpu/parallel.h"

namespace realm_kernels {
namespace {

const LinearMarginalLossKernels& kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512Bf16) {
    return linear_marginal_loss_kernels_avx512_bf16();
  }
  if (isa >= Isa::kAvx512) {
    return linear_marginal_loss_kernels_avx512();
  }
  if (isa == Isa::kAvx2) {
    return linear_marginal_loss_kernels_avx2();
  }
#endif
  (void)isa;
  return linear_marginal_loss_kernels_portable();
}

// Hands out memory in whole cache lines, so that threads share none; over a null pointer it only counts.
class Arena {
 public:
  explicit Arena(float* memory) : memory_(memory) {}
  float* take(int64_t floats) {
    float* taken = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(floats, kLineFloats);
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kLineFloats = 16;
  float* memory_;
  int64_t used_ = 0;
};

// What each thread has for itself.
struct PerThread {
  float* memory;
  int64_t size;
  PerThread(Arena& arena, int64_t floats, int threads) : size(round_up(floats, 16)) {
    memory = arena.take(size * threads);
  }
  float* of(int thread) const { return memory + size * thread; }
};

struct ForwardMemory {
  float* packed;
  RowStatistics statistics;
  float* block_largest;
  PerThread scratch;
  ForwardMemory(const LinearMarginalLossParams& params, const LinearMarginalLossKernels& kernels,
                const ChunkLayout& layout, Arena arena)
      : packed(arena.take(kernels.packed_rows_size(params))),
        statistics{arena.take(layout.padded_rows), arena.take(layout.blocks * layout.padded_rows),
                   arena.take(layout.padded_rows),
                   reinterpret_cast<double*>(arena.take(2 * layout.padded_rows))},
        block_largest(arena.take(layout.blocks * layout.padded_rows)),
        scratch(arena, kernels.forward_scratch(params), params.num_threads),
        used(arena.used()) {}
  int64_t used;
};

struct BackwardMemory {
  float* packed;
  float* at_target;
  PerThread scratch, partials;
  BackwardMemory(const LinearMarginalLossParams& params, const LinearMarginalLossKernels& kernels,
                 Arena arena)
      : packed(arena.take(kernels.packed_columns_size(params))),
        at_target(arena.take(params.rows)),
        scratch(arena, kernels.backward_scratch(params), params.num_threads),
        partials(arena, kernels.partial_size(params), params.num_threads),
        used(arena.used()) {}
  int64_t used;
};

ChunkLayout layout_of(const LinearMarginalLossParams& params) {
  ChunkLayout layout{};
  layout.padded_rows = round_up(params.rows, kRowMultiple);
  layout.vocabulary = params.vocabulary;
  layout.blocks = (params.vocabulary + kBlock - 1) / kBlock;
  layout.largest = params.workspace;
  if (params.workspace != nullptr) {
    layout.exponentials = params.workspace + layout.blocks * layout.padded_rows;
  }
  return layout;
}

// Float64: a handful of numbers on which all hangs. log p = -log1p(rest / e) keeps its digits near 0.
void finish_rows(const LinearMarginalLossParams& params, const RowStatistics& statistics, int64_t first,
                 int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    const double target = statistics.target_logits[r], largest = statistics.largest[r];
    const double top = target > largest ? target : largest;
    const double e = std::exp(target - top), rest = statistics.totals[r] * std::exp(largest - top);
    const double log_total = std::log(e + rest);
    params.log_p[r] = rest < e ? -std::log1p(rest / e) : target - top - log_total;
    params.log_sum[r] = top + log_total;
  }
}

}  // namespace

int64_t linear_marginal_loss_workspace(const LinearMarginalLossParams& params) {
  const ChunkLayout layout = layout_of(params);
  return layout.blocks * layout.padded_rows + kernels_for(params.isa).exponentials_size(params);
}

int64_t linear_marginal_loss_scratch(const LinearMarginalLossParams& params) {
  const LinearMarginalLossKernels& kernels = kernels_for(params.isa);
  const int64_t forward = ForwardMemory(params, kernels, layout_of(params), Arena(nullptr)).used;
  const int64_t backward = BackwardMemory(params, kernels, Arena(nullptr)).used;
  return forward > backward ? forward : backward;
}

void launch_linear_marginal_loss_fwd(const LinearMarginalLossParams& params) {
  const LinearMarginalLossKernels& kernels = kernels_for(params.isa);
  const int num_threads = params.num_threads;
  ChunkLayout layout = layout_of(params);
  const ForwardMemory memory(params, kernels, layout, Arena(params.scratch));
  if (params.workspace == nullptr) {
    layout.largest = memory.block_largest;
  }
  const RowStatistics& statistics = memory.statistics;
  parallel_for(
      (params.rows + kernels.lanes - 1) / kernels.lanes, num_threads,
      [&](int64_t begin, int64_t end, int) { kernels.pack_rows(params, begin, end, memory.packed); });
  parallel_for(layout.blocks, num_threads, [&](int64_t begin, int64_t end, int thread) {
    kernels.forward(params, layout, memory.packed, statistics, begin, end, memory.scratch.of(thread));
  });
  parallel_for(layout.padded_rows / kRowMultiple, num_threads, [&](int64_t begin, int64_t end, int) {
    const int64_t first = begin * kRowMultiple, last = std::min(end * kRowMultiple, params.rows);
    kernels.merge(layout, statistics, first, last);
    finish_rows(params, statistics, first, last);
  });
}

void launch_linear_marginal_loss_bwd(const LinearMarginalLossParams& params) {
  const LinearMarginalLossKernels& kernels = kernels_for(params.isa);
  const int num_threads = params.num_threads;
  const ChunkLayout layout = layout_of(params);
  const BackwardMemory memory(params, kernels, Arena(params.scratch));
  parallel_for(params.rows, num_threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      memory.at_target[r] = static_cast<float>(params.factor[r] * std::expm1(params.log_p[r]));
    }
  });
  if (params.d_weight != nullptr) {
    parallel_for(
        (params.width + kernels.lanes - 1) / kernels.lanes, num_threads,
        [&](int64_t begin, int64_t end, int) { kernels.pack_columns(params, begin, end, memory.packed); });
  }
  const int parts = static_cast<int>(layout.blocks < num_threads ? layout.blocks : num_threads);
  parallel_for(layout.blocks, parts, [&](int64_t begin, int64_t end, int thread) {
    float* partial = memory.partials.of(thread);
    if (params.d_hidden != nullptr) {
      std::memset(partial, 0, static_cast<std::size_t>(memory.partials.size) * sizeof(float));
    }
    kernels.backward(params, layout, memory.packed, memory.at_target, begin, end, memory.scratch.of(thread),
                     partial);
  });
  if (params.d_hidden != nullptr) {
    parallel_for(params.rows, num_threads, [&](int64_t begin, int64_t end, int) {
      kernels.reduce(params, memory.partials.memory, memory.partials.size, parts, begin, end);
    });
  }
}

void launch_scale(const std::vector<ScaledArray>& arrays, float scale, int num_threads, Isa isa) {
  const LinearMarginalLossKernels& kernels = kernels_for(isa);
  // Every thread takes its share of each, so that all of them end together.
  parallel_for(num_threads, num_threads, [&](int64_t begin, int64_t end, int) {
    for (const ScaledArray& array : arrays) {
      kernels.scale(array, scale, array.count * begin / num_threads, array.count * end / num_threads);
    }
  });
}

}  // namespace realm_kernels
