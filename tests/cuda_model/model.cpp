// The kernels of csrc/cuda on the model of a GPU, for tests/test_mips_topk_cuda_model.py through ctypes.
#include "cuda/mips_topk_plan.h"
#include "cuda/sm90/scan.h"

#include <array>
#include <numeric>

namespace {

using namespace realm_kernels::cuda;
using realm_kernels::cuda_model::machine;
using sm90::Shape;
using sm90::TensorMap;

std::string error;

template <class Element, Shape kShape>
void run_scan(const sm90::ScanArguments& a, const TensorMap& rows, const TensorMap& queries, int blocks,
              uint64_t seed) {
  machine().launch(
      static_cast<unsigned>(blocks), sm90::kThreads, static_cast<size_t>(a.plan.bytes()), seed,
      [&] { sm90::scan<Element, kShape, true>(a, &rows, &queries); }, static_cast<unsigned>(a.cluster));
}

template <class Element>
void run_scan(Shape shape, const sm90::ScanArguments& a, const TensorMap& rows, const TensorMap& queries,
              int blocks, uint64_t seed) {
  shape == Shape::kWide   ? run_scan<Element, Shape::kWide>(a, rows, queries, blocks, seed)
  : shape == Shape::kDeep ? run_scan<Element, Shape::kDeep>(a, rows, queries, blocks, seed)
                          : run_scan<Element, Shape::kNarrow>(a, rows, queries, blocks, seed);
}

void run_scan(Scanned scanned, Shape shape, const sm90::ScanArguments& a, const TensorMap& rows,
              const TensorMap& queries, int blocks, uint64_t seed) {
  scanned == Scanned::kBFloat16  ? run_scan<sm90::BFloat16>(shape, a, rows, queries, blocks, seed)
  : scanned == Scanned::kFloat16 ? run_scan<sm90::Float16>(shape, a, rows, queries, blocks, seed)
                                 : run_scan<sm90::Int8>(shape, a, rows, queries, blocks, seed);
}

TensorMap tensor_map(const Matrix& m, int bytes) {
  return {static_cast<const unsigned char*>(m.base),
          m.pitch * bytes,
          m.rows,
          m.columns * bytes,
          m.box_rows,
          bytes};
}

template <class Run>
const char* caught(const Run& run) {
  try {
    run();
  } catch (const std::exception& raised) {
    error = raised.what();
    return error.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" {

// Each returns null, or what went wrong.
const char* model_scan(int scanned, int shape, const void* queries, const void* rows, int batch, int num_rows,
                       int dim, int64_t row_stride, const bool* row_mask, int blocks_of_queries, int workers,
                       int cluster, uint32_t* words, int64_t pitch, float* quad_norm, uint64_t seed) {
  const auto kind = static_cast<Shape>(shape);
  const int bytes = bytes_of(static_cast<Scanned>(scanned));
  sm90::ScanArguments a{};
  a.words = words;
  a.quad_norm = quad_norm;
  a.row_mask = row_mask;
  a.pitch = pitch;
  a.num_queries = batch;
  a.num_rows = num_rows;
  a.plan = sm90::shared_plan(kind, blocks_of_queries, ceil_div(dim * bytes, sm90::kPanelBytes));
  a.query_blocks = ceil_div(batch, blocks_of_queries * sm90::kBlockQueries);
  a.cluster = cluster;
  a.norm_scale = 1.0f;
  const TensorMap row_map = tensor_map({rows, num_rows, dim, row_stride, kTileRows}, bytes);
  const TensorMap query_map = tensor_map({queries, batch, dim, dim, sm90::kBlockQueries}, bytes);
  return caught([&] {
    if (!sm90::fits(kind, a.plan)) {
      throw std::runtime_error("the shape does not fit shared memory");
    }
    run_scan(static_cast<Scanned>(scanned), kind, a, row_map, query_map, workers * cluster * a.query_blocks,
             seed);
  });
}

// Words of maxima [count, 4], and what is read of them.
void model_words(int count, const float* maxima, uint32_t* words) {
  for (int tile = 0; tile < count; ++tile, maxima += kTileGroups) {
    const float largest = *std::max_element(maxima, maxima + kTileGroups);
    words[tile] = rounded_up(largest);
    for (int group = 0; group < kTileGroups; ++group) {
      words[tile] |= gap_of(rounded_up(largest), largest, maxima[group], group);
    }
  }
}
void model_maxima(int count, const uint32_t* words, double* maxima, float* least) {
  for (int tile = 0; tile < count; ++tile) {
    least[tile] = least_maximum_of(words[tile]);
    for (int group = 0; group < kTileGroups; ++group) {
      maxima[tile * kTileGroups + group] = maximum_of(words[tile], group);
    }
  }
}

// A whole search of one piece by blocks of `threads`. pointers: queries, rows, row mask, exclude, codes,
// mean, bounds of the codes, scores, indices, repairs. numbers: see their names. told: what the plan was.
const char* model_search(const void* const* pointers, const int64_t* numbers, uint64_t seed, int64_t* told) {
  const auto [batch, num_rows, dim, k, num_excluded, scanned, query_type, row_type, row_stride, first_row,
              code_group, code_pitch, threads, kept, selected, forced] =
      *reinterpret_cast<const std::array<int64_t, 16>*>(numbers);
  SearchShape shape{batch,
                    num_rows,
                    dim,
                    k,
                    num_excluded,
                    static_cast<Scanned>(scanned),
                    false,
                    static_cast<int>(code_group),
                    2,
                    0,
                    int64_t{1} << 26};
  MipsTopkParams call{};
  call.queries = pointers[0];
  call.query_type = static_cast<Number>(query_type);
  call.query_stride = dim;
  call.query_stride_d = 1;
  call.rows = pointers[1];
  call.row_type = static_cast<Number>(row_type);
  call.row_stride = row_stride;
  call.aligned = row_stride % 8 == 0;
  call.batch = static_cast<int>(batch);
  call.num_rows = static_cast<int>(num_rows);
  call.dim = static_cast<int>(dim);
  call.k = static_cast<int>(k);
  call.first_row = first_row;
  call.row_mask = static_cast<const bool*>(pointers[2]);
  call.exclude = static_cast<const int64_t*>(pointers[3]);
  call.num_excluded = static_cast<int>(num_excluded);
  call.exclude_stride = num_excluded;
  call.exclude_stride_e = 1;
  call.codes = static_cast<const int8_t*>(pointers[4]);
  call.code_pitch = code_pitch;
  call.mean = static_cast<const float*>(pointers[5]);
  call.code_bounds = static_cast<const float*>(pointers[6]);
  call.code_group = static_cast<int>(code_group);
  call.scores = static_cast<float*>(const_cast<void*>(pointers[7]));
  call.indices = static_cast<int64_t*>(const_cast<void*>(pointers[8]));
  call.repairs = static_cast<unsigned long long*>(const_cast<void*>(pointers[9]));
  return caught([&] {
    SearchPlan p = search_plan(shape);
    const auto block = static_cast<int>(threads);
    const auto forced_to = [block](int64_t wanted, int planned, int there) {
      const int most = std::min(there, most_kept(block, kGroupKeys) - 1);
      return static_cast<int>(std::min<int64_t>(wanted > 0 ? wanted : planned, most));
    };
    p.kept = forced_to(kept, p.kept, p.num_tiles);
    p.selected = forced_to(selected, p.selected, p.num_groups);
    p.parts = p.parts < 3 ? p.parts : 3;
    p.parts = p.parts < p.num_groups ? p.parts : p.num_groups;
    const int panels = static_cast<int>(p.scanned_pitch * bytes_of(shape.scanned) / sm90::kPanelBytes);
    if (forced > 0) {
      p.shape = static_cast<Shape>(forced - 1);
      p.query_blocks = 1;
      const int blocks = static_cast<int>(ceil_div<int64_t>(shape.batch, 64));
      p.shared = sm90::shared_plan(p.shape, p.shape == Shape::kNarrow || blocks > 1 ? blocks : 2, panels);
      p.cluster = p.shape == Shape::kDeep ? sm90::kSmallCluster : 1;
      p.scan_blocks = 2;
    }
    p.visit_step = scattered_step(ceil_div(p.num_tiles, kQuad * block));
    p.at = lay_out(p, shape, batch);
    told[0] = static_cast<int64_t>(p.shape);
    told[1] = p.kept;
    told[2] = p.selected;
    std::vector<unsigned char> workspace(static_cast<size_t>(p.at.bytes), 0xFF);  // NaN
    const SearchArguments a = search_arguments(p, call, workspace.data());
    const auto launch = [&](int blocks, int64_t shared, const std::function<void()>& kernel) {
      machine().launch(static_cast<unsigned>(blocks), static_cast<unsigned>(block),
                       static_cast<size_t>(shared), seed, kernel);
    };
    launch(prepare_blocks(a, 2), 8 * 64, [&] { prepare(a, shape.scanned == Scanned::kFloat16); });
    const TensorMap rows = tensor_map(scanned_rows(a), bytes_of(shape.scanned));
    const TensorMap queries = tensor_map(scanned_queries(a), bytes_of(shape.scanned));
    run_scan(shape.scanned, p.shape, scan_arguments(p, a), rows, queries, p.scan_blocks, seed);
    launch(a.batch, top_keys_bytes(block, kGroupKeys),
           [&] { a.codes != nullptr ? select<true>(a) : select<false>(a); });
    launch(rescore_blocks(a, block), scoring_bytes(block, a.dim, a.codes != nullptr ? a.code_pitch : 0),
           [&] { a.codes != nullptr ? rescore<true>(a) : rescore<false>(a); });
    launch(3, scoring_bytes(block, a.dim), [&] { repair(a); });
    told[3] = std::accumulate(a.num_chosen, a.num_chosen + a.batch, int64_t{0});
  });
}
}
