// The body of linear_marginal_loss's CPU kernels, included once by each linear_marginal_loss_<isa>.cpp, which
// sets kWidth, floats in a vector, and kGroup, rows of a register tile.
//
// A thread owns blocks of kBlock words of the vocabulary and goes over them twice. Forward: a block's logits,
// tile by tile of one panel of rows, which their exponentials and statistics leave while they are in the
// first-level cache. Backward: exponentials times one number a row and block are the gradients of logits;
// kept in the second-level cache, they serve both products that are left. So beside weight and d_weight, read
// or written once each, a chunk moves V R numbers out and in again, and no pass stands between the products.
// d_weight needs no reduction over threads; of d_hidden each makes a part.
//
// Bytes of a chunk: 4 V R twice (2 V R in bfloat16), the weight twice, d_weight (float32) twice; 6 V R H
// flops. At R = 160, H = 768, V = 30522 that is 0.42 GB beside 22.5 GFLOP in float32: 15 ms at 28 GB/s,
// fetched during 100 to 200 ms of multiply-adds.
//
// Written in GCC's vector extension. Nothing here may instantiate a template or inline function of another
// header: the linker could keep a copy built for AVX-512.
#include <cstdint>

#include "cpu/linear_marginal_loss_backward.inl"

namespace realm_kernels {
namespace {

int64_t exponentials_size(const LinearMarginalLossParams& params) {
  return params.vocabulary * round_up(params.rows, kRowMultiple) / (in_pairs(params) ? 2 : 1);
}

int64_t packed_rows_size(const LinearMarginalLossParams& params) {
  return panels_of(params.rows) * kLanes * units_of(params.width, in_pairs(params));
}

int64_t packed_columns_size(const LinearMarginalLossParams& params) {
  return panels_of(params.width) * kLanes * units_of(params.rows, in_pairs(params));
}

int64_t forward_scratch(const LinearMarginalLossParams& params) {
  return kBlock * kLanes + staged_weight_size(params);
}

int64_t backward_scratch(const LinearMarginalLossParams& params) {
  return round_up(params.rows, kRowMultiple) + kBlock * kLanes + gradients_size(params) +
         staged_weight_size(params);
}

int64_t partial_size(const LinearMarginalLossParams& params) {
  return panels_of(params.width) * kLanes * params.rows;
}

void forward(const LinearMarginalLossParams& params, const ChunkLayout& layout, const float* packed,
             const RowStatistics& statistics, int64_t begin, int64_t end, float* scratch) {
#if defined(__AVX512BF16__)
  if (in_pairs(params)) {
    return forward_blocks<Pairs>(params, layout, packed, statistics, begin, end, scratch);
  }
#endif
  forward_blocks<Singles>(params, layout, packed, statistics, begin, end, scratch);
}

void backward(const LinearMarginalLossParams& params, const ChunkLayout& layout, const float* packed,
              const float* at_target, int64_t begin, int64_t end, float* scratch, float* partial) {
#if defined(__AVX512BF16__)
  if (in_pairs(params)) {
    return backward_blocks<Pairs>(params, layout, packed, at_target, begin, end, scratch, partial);
  }
#endif
  backward_blocks<Singles>(params, layout, packed, at_target, begin, end, scratch, partial);
}

constexpr LinearMarginalLossKernels kKernels = {kLanes,
                                                exponentials_size,
                                                packed_rows_size,
                                                packed_columns_size,
                                                forward_scratch,
                                                backward_scratch,
                                                partial_size,
                                                pack_rows,
                                                pack_columns,
                                                forward,
                                                merge,
                                                backward,
                                                reduce,
                                                scale};

}  // namespace
}  // namespace realm_kernels
