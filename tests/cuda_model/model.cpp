// The kernels of csrc/cuda on the model of a GPU, for tests/test_mips_topk_cuda_model.py through ctypes.
#include "cuda/sm90/scan.h"

namespace {

using namespace realm_kernels::cuda::sm90;
using realm_kernels::cuda_model::machine;

template <class Element, Shape kShape>
void run_scan(const ScanArguments& a, const TensorMap& rows, const TensorMap& queries, int blocks, uint64_t seed) {
  machine().launch(static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(a.plan.bytes()), seed,
                   [&] { scan<Element, kShape, true>(a, &rows, &queries); });
}

template <class Element>
void run_scan(Shape shape, const ScanArguments& a, const TensorMap& rows, const TensorMap& queries, int blocks,
              uint64_t seed) {
  shape == Shape::kWide   ? run_scan<Element, Shape::kWide>(a, rows, queries, blocks, seed)
  : shape == Shape::kDeep ? run_scan<Element, Shape::kDeep>(a, rows, queries, blocks, seed)
                          : run_scan<Element, Shape::kNarrow>(a, rows, queries, blocks, seed);
}

}  // namespace

extern "C" {

// Returns null, or what went wrong.
const char* model_scan(int element, int shape, const void* queries, const void* rows, int batch, int num_rows,
                       int dim, int64_t row_stride, const bool* row_mask, int group, int blocks_of_queries,
                       int workers, void* group_max, int64_t pitch, float* group_norm, uint64_t seed) {
  static std::string error;
  const int bytes = element == 2 ? 1 : 2;
  const int panels = ceil_div(dim * bytes, kPanelBytes);
  const auto kind = static_cast<Shape>(shape);
  ScanArguments a{};
  a.group_max = group_max;
  a.group_norm = group_norm;
  a.row_mask = row_mask;
  a.pitch = pitch;
  a.num_queries = batch;
  a.num_rows = num_rows;
  a.num_groups = ceil_div(num_rows, group);
  a.group = group;
  a.plan = shared_plan(kind, blocks_of_queries, panels);
  a.query_blocks = ceil_div(batch, blocks_of_queries * kBlockQueries);
  a.dim = dim;
  a.norm_scale = 1.0f;
  a.norm_hidden = 0.0f;
  if (!fits(kind, a.plan)) {
    return "the shape does not fit shared memory";
  }
  const TensorMap row_map{static_cast<const unsigned char*>(rows), row_stride * bytes, num_rows, dim * bytes,
                          kTileRows, bytes};
  const TensorMap query_map{static_cast<const unsigned char*>(queries), int64_t{dim} * bytes, batch, dim * bytes,
                            kBlockQueries, bytes};
  try {
    const int blocks = workers * a.query_blocks;
    element == 0   ? run_scan<BFloat16>(kind, a, row_map, query_map, blocks, seed)
    : element == 1 ? run_scan<Float16>(kind, a, row_map, query_map, blocks, seed)
                   : run_scan<Int8>(kind, a, row_map, query_map, blocks, seed);
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
  return nullptr;
}
}
