// realm_kernels._cpu: raw addresses and sizes in, nothing of torch. Python has validated every argument.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "cpu/fma_ceiling.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/linear_marginal_loss.h"
#include "cpu/marginal_loss.h"
#include "cpu/mips_topk.h"
#include "cpu/score_spans.h"
#include "cpu/span_evidence.h"

namespace py = pybind11;
using namespace realm_kernels;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

std::string threading() {
#ifdef _OPENMP
  return "OpenMP";
#else
  return "none (built without OpenMP: one thread)";
#endif
}

using Rows = std::tuple<uintptr_t, int64_t, int64_t>;  // address, rows, row stride
using Codes = std::pair<uintptr_t, uintptr_t>;         // addresses of codes and bounds

ScalarType scalar_type(const std::string& dtype) {
  return dtype == "bfloat16"  ? ScalarType::kBFloat16
         : dtype == "float16" ? ScalarType::kFloat16
                              : ScalarType::kFloat32;
}

// A null address is an absent argument; codes are of every shard or, with no mean, of none.
int64_t mips_topk(uintptr_t queries, const std::vector<Rows>& shards, const std::vector<Codes>& codes,
                  uintptr_t mean, const std::string& table_type, int64_t batch, int64_t dim, int64_t k,
                  uintptr_t exclude, int64_t num_exclude, uintptr_t row_mask, uintptr_t scores,
                  uintptr_t indices, int num_threads, const std::string& isa) {
  std::vector<TableShard> table;
  for (size_t s = 0; s < shards.size(); ++s) {
    const auto& [address, num_rows, row_stride] = shards[s];
    const auto [shard_codes, bounds] = mean != 0 ? codes.at(s) : Codes{0, 0};
    table.push_back({reinterpret_cast<const void*>(address), num_rows, row_stride,
                     reinterpret_cast<const uint8_t*>(shard_codes),
                     reinterpret_cast<const CodeBounds*>(bounds)});
  }
  return launch_mips_topk(
      {reinterpret_cast<const float*>(queries), table.data(), static_cast<int64_t>(table.size()),
       reinterpret_cast<const float*>(mean), scalar_type(table_type), batch, dim, k,
       reinterpret_cast<const int64_t*>(exclude), num_exclude, reinterpret_cast<const bool*>(row_mask),
       reinterpret_cast<float*>(scores), reinterpret_cast<int64_t*>(indices), num_threads, choose_isa(isa)});
}

void encode_rows(const Rows& rows, const std::string& table_type, int64_t dim, uintptr_t mean,
                 const Codes& codes, int num_threads, const std::string& isa) {
  const auto& [address, num_rows, row_stride] = rows;
  launch_encode({reinterpret_cast<const void*>(address), num_rows, row_stride,
                 reinterpret_cast<const float*>(mean), scalar_type(table_type), dim,
                 reinterpret_cast<uint8_t*>(codes.first), reinterpret_cast<CodeBounds*>(codes.second),
                 num_threads, choose_isa(isa)});
}

using Array = std::tuple<uintptr_t, std::string>;  // address and dtype; a null address is an absent argument

FloatArray float_array(const Array& array) {
  const auto& [address, dtype] = array;
  const FloatType type = dtype == "float64"    ? FloatType::kFloat64
                         : dtype == "bfloat16" ? FloatType::kBFloat16
                         : dtype == "float16"  ? FloatType::kFloat16
                                               : FloatType::kFloat32;
  return {reinterpret_cast<const void*>(address), type};
}

Reduction reduction_of(const std::string& name) {
  return name == "mean" ? Reduction::kMean : name == "sum" ? Reduction::kSum : Reduction::kNone;
}

using Extents = std::tuple<int64_t, int64_t, int64_t>;  // of B, K and M

MarginalLossParams marginal_loss_inputs(const Array& scores, const Array& log_likelihood,
                                        const Array& log_weight, uintptr_t token_mask, uintptr_t doc_mask,
                                        const Extents& shape, const Extents& strides, bool per_token,
                                        const std::string& reduction, int num_threads,
                                        const std::string& isa) {
  MarginalLossParams params{};
  params.scores = float_array(scores);
  params.log_likelihood = float_array(log_likelihood);
  params.log_weight = float_array(log_weight);
  params.token_mask = reinterpret_cast<const bool*>(token_mask);
  params.doc_mask = reinterpret_cast<const bool*>(doc_mask);
  std::tie(params.batch, params.documents, params.tokens) = shape;
  std::tie(params.stride_b, params.stride_k, params.stride_m) = strides;
  params.per_token = per_token;
  params.reduction = reduction_of(reduction);
  params.divisor = 1.0;
  params.num_threads = num_threads;
  params.isa = choose_isa(isa);
  return params;
}

// Of the calls below: numbers only, which pybind11 reads fastest.
MarginalLossParams marginal_loss_arguments(uintptr_t scores, int scores_type, uintptr_t log_likelihood,
                                           int log_likelihood_type, uintptr_t log_weight, int log_weight_type,
                                           uintptr_t token_mask, uintptr_t doc_mask, const Extents& shape,
                                           const Extents& strides, bool per_token, bool wide,
                                           const std::optional<std::vector<uintptr_t>>& kept, int num_threads,
                                           const std::string& isa) {
  MarginalLossParams params{};
  const auto array = [](uintptr_t address, int type) {
    return FloatArray{reinterpret_cast<const void*>(address), static_cast<FloatType>(type)};
  };
  params.scores = array(scores, scores_type);
  params.log_likelihood = array(log_likelihood, log_likelihood_type);
  params.log_weight = array(log_weight, log_weight_type);
  params.token_mask = reinterpret_cast<const bool*>(token_mask);
  params.doc_mask = reinterpret_cast<const bool*>(doc_mask);
  std::tie(params.batch, params.documents, params.tokens) = shape;
  std::tie(params.stride_b, params.stride_k, params.stride_m) = strides;
  params.per_token = per_token;
  params.wide = wide;
  params.divisor = 1.0;
  if (kept.has_value()) {  // addresses of residual, posterior and columns
    params.kept_residual = reinterpret_cast<void*>(kept->at(0));
    params.kept_posterior = reinterpret_cast<void*>(kept->at(1));
    params.kept_columns = reinterpret_cast<double*>(kept->at(2));
  }
  params.num_threads = num_threads;
  params.isa = choose_isa(isa);
  return params;
}

using KeptAddresses = std::optional<std::vector<uintptr_t>>;

// Returns what was counted of all examples; a null count is one that nobody asked for per example.
int64_t marginal_loss_fwd(uintptr_t scores, int scores_type, uintptr_t log_likelihood,
                          int log_likelihood_type, uintptr_t log_weight, int log_weight_type,
                          uintptr_t token_mask, uintptr_t doc_mask, int64_t batch, int64_t documents,
                          int64_t tokens, int64_t stride_b, int64_t stride_k, int64_t stride_m,
                          bool per_token, int reduction, uintptr_t loss, bool wide, uintptr_t count,
                          const KeptAddresses& kept, int num_threads, const std::string& isa) {
  MarginalLossParams params =
      marginal_loss_arguments(scores, scores_type, log_likelihood, log_likelihood_type, log_weight,
                              log_weight_type, token_mask, doc_mask, {batch, documents, tokens},
                              {stride_b, stride_k, stride_m}, per_token, wide, kept, num_threads, isa);
  params.reduction = static_cast<Reduction>(reduction);
  params.loss = reinterpret_cast<void*>(loss);
  params.count = reinterpret_cast<int64_t*>(count);
  return launch_marginal_loss_fwd(params);
}

void marginal_loss_bwd(uintptr_t scores, int scores_type, uintptr_t log_likelihood, int log_likelihood_type,
                       uintptr_t log_weight, int log_weight_type, uintptr_t token_mask, uintptr_t doc_mask,
                       int64_t batch, int64_t documents, int64_t tokens, int64_t stride_b, int64_t stride_k,
                       int64_t stride_m, bool per_token, bool per_example, uintptr_t d_loss, bool wide,
                       int64_t count, uintptr_t d_scores, uintptr_t d_log_likelihood,
                       const KeptAddresses& kept, int num_threads, const std::string& isa) {
  MarginalLossParams params =
      marginal_loss_arguments(scores, scores_type, log_likelihood, log_likelihood_type, log_weight,
                              log_weight_type, token_mask, doc_mask, {batch, documents, tokens},
                              {stride_b, stride_k, stride_m}, per_token, wide, kept, num_threads, isa);
  params.reduction = per_example ? Reduction::kNone : Reduction::kMean;
  params.d_loss = reinterpret_cast<const void*>(d_loss);
  params.divisor = static_cast<double>(std::max<int64_t>(1, count));
  params.d_scores = reinterpret_cast<void*>(d_scores);
  params.d_log_likelihood = reinterpret_cast<void*>(d_log_likelihood);
  launch_marginal_loss_bwd(params);
}

using Matrix = std::tuple<uintptr_t, int64_t>;           // address, row stride
using Memory = std::tuple<uintptr_t, uintptr_t>;         // addresses of workspace and scratch
using Scored = std::tuple<uintptr_t, Array, uintptr_t>;  // log_likelihood, loss and count

// Floats of workspace and of scratch for chunks of so many rows, or fewer; shape: R, H, V.
std::pair<int64_t, int64_t> linear_marginal_loss_memory(const Extents& shape, int64_t weight_stride,
                                                        const std::string& dtype, int num_threads,
                                                        const std::string& isa) {
  LinearMarginalLossParams params{};
  std::tie(params.rows, params.width, params.vocabulary) = shape;
  params.weight_stride = weight_stride;
  params.type = float_array({0, dtype}).type;
  params.num_threads = num_threads;
  params.isa = choose_isa(isa);
  return {linear_marginal_loss_workspace(params), linear_marginal_loss_scratch(params)};
}

// Returns what was counted of all examples, and how many rows had a part. words: the targets and
// ignore_index; shape: B, K, M; chunk_shape: the most R, H, V; gradients: d_hidden, d_weight, d_bias.
std::pair<int64_t, int64_t> linear_marginal_loss(
    const Matrix& hidden, const Matrix& weight, const std::string& dtype, uintptr_t bias, const Array& scores,
    const Array& log_weight, uintptr_t doc_mask, const std::pair<uintptr_t, int64_t>& words,
    const Extents& shape, bool per_token, const Extents& chunk_shape, bool whole_examples,
    const Memory& memory, const std::string& reduction, const Scored& scored, uintptr_t factor,
    bool has_factor, const std::tuple<Array, uintptr_t, uintptr_t>& gradients, int num_threads,
    const std::string& isa) {
  LinearMarginalLossCall call{};
  call.documents = marginal_loss_inputs(scores, {0, "float64"}, log_weight, 0, doc_mask, shape, shape,
                                        per_token, reduction, num_threads, isa);
  call.documents.wide = float_array(std::get<1>(scored)).type == FloatType::kFloat64;
  call.documents.loss = reinterpret_cast<void*>(std::get<0>(std::get<1>(scored)));
  call.documents.count = reinterpret_cast<int64_t*>(std::get<2>(scored));
  call.bias = float_array({bias, dtype});
  call.targets = reinterpret_cast<const int64_t*>(words.first);
  call.ignore_index = words.second;
  call.whole_examples = whole_examples;
  call.log_likelihood = reinterpret_cast<double*>(std::get<0>(scored));
  call.factor = reinterpret_cast<double*>(factor);
  call.has_factor = has_factor;
  LinearMarginalLossParams& chunk = call.chunk;
  chunk.hidden = reinterpret_cast<const void*>(std::get<0>(hidden));
  chunk.hidden_stride = std::get<1>(hidden);
  chunk.weight = reinterpret_cast<const void*>(std::get<0>(weight));
  chunk.weight_stride = std::get<1>(weight);
  chunk.type = float_array({0, dtype}).type;
  std::tie(chunk.rows, chunk.width, chunk.vocabulary) = chunk_shape;
  chunk.workspace = reinterpret_cast<float*>(std::get<0>(memory));
  chunk.scratch = reinterpret_cast<float*>(std::get<1>(memory));
  chunk.d_hidden = reinterpret_cast<void*>(std::get<0>(std::get<0>(gradients)));
  chunk.d_hidden_type = float_array(std::get<0>(gradients)).type;
  chunk.d_weight = reinterpret_cast<float*>(std::get<1>(gradients));
  chunk.d_bias = reinterpret_cast<float*>(std::get<2>(gradients));
  chunk.num_threads = num_threads;
  chunk.isa = choose_isa(isa);
  const auto [counted, rows_with_part] = launch_linear_marginal_loss(call);
  return {counted, rows_with_part};
}

// arrays: values, what they become, and how many they are.
void scale(const std::vector<std::tuple<Array, Array, int64_t>>& arrays, float scale, int num_threads,
           const std::string& isa) {
  std::vector<ScaledArray> scaled;
  for (const auto& [values, out, count] : arrays) {
    scaled.push_back(
        {float_array(values), reinterpret_cast<void*>(std::get<0>(out)), float_array(out).type, count});
  }
  launch_scale(scaled, scale, num_threads, choose_isa(isa));
}

using SpanExtents = std::tuple<int64_t, int64_t, int64_t>;  // of B, K and C

// kept: [4, B, K] of right, wrong, posterior and residual.
SpanEvidenceParams span_inputs(const Array& scores, const Array& log_weight, uintptr_t doc_mask,
                               const Array& span_scores, uintptr_t correct, uintptr_t valid,
                               const SpanExtents& shape, bool is_global, const std::string& reduction,
                               uintptr_t kept, int num_threads, const std::string& isa) {
  const auto [batch, documents, spans] = shape;
  SpanEvidenceParams params{};
  params.scores = float_array(scores);
  params.log_weight = float_array(log_weight);
  params.doc_mask = reinterpret_cast<const bool*>(doc_mask);
  params.span_scores = float_array(span_scores);
  params.correct = reinterpret_cast<const bool*>(correct);
  params.valid = reinterpret_cast<const bool*>(valid);
  params.documents = documents;
  params.rows = batch * documents;
  params.spans = spans;
  params.is_global = is_global;
  params.reduction = reduction_of(reduction);
  params.right = reinterpret_cast<double*>(kept);
  params.wrong = params.right + params.rows;
  params.posterior = params.wrong + params.rows;
  params.residual = params.posterior + params.rows;
  params.divisor = 1.0;
  params.num_threads = num_threads;
  params.isa = choose_isa(isa);
  return params;
}

int64_t span_marginal_loss_fwd(const Array& scores, const Array& log_weight, uintptr_t doc_mask,
                               const Array& span_scores, uintptr_t correct, uintptr_t valid,
                               const SpanExtents& shape, bool is_global, const std::string& reduction,
                               uintptr_t kept, const Array& loss, uintptr_t count, int num_threads,
                               const std::string& isa) {
  SpanEvidenceParams params = span_inputs(scores, log_weight, doc_mask, span_scores, correct, valid, shape,
                                          is_global, reduction, kept, num_threads, isa);
  params.wide = float_array(loss).type == FloatType::kFloat64;
  params.loss = reinterpret_cast<void*>(std::get<0>(loss));
  params.count = reinterpret_cast<int64_t*>(count);
  return launch_span_marginal_loss_fwd(params);
}

void span_marginal_loss_bwd(const Array& scores, const Array& log_weight, uintptr_t doc_mask,
                            const Array& span_scores, uintptr_t correct, uintptr_t valid,
                            const SpanExtents& shape, bool is_global, const std::string& reduction,
                            uintptr_t kept, const Array& d_loss, int64_t count, uintptr_t d_scores,
                            uintptr_t d_span_scores, int num_threads, const std::string& isa) {
  SpanEvidenceParams params = span_inputs(scores, log_weight, doc_mask, span_scores, correct, valid, shape,
                                          is_global, reduction, kept, num_threads, isa);
  params.wide = float_array(d_loss).type == FloatType::kFloat64;
  params.d_loss = float_array(d_loss).data;
  params.divisor = static_cast<double>(std::max<int64_t>(1, count));
  params.d_scores = reinterpret_cast<void*>(d_scores);
  params.d_span_scores = reinterpret_cast<void*>(d_span_scores);
  launch_span_marginal_loss_bwd(params);
}

using SpanSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;  // N, T, S, max_width, C
using HalfRows = std::tuple<uintptr_t, int64_t>;                            // address, row stride
using SpanResults = std::pair<uintptr_t, uintptr_t>;                        // addresses

// Of the results: scores [N, C]; mean and rstd [2, N, C].
ScoreSpansParams score_spans_inputs(const HalfRows& start, const HalfRows& end, uintptr_t weight,
                                    const SpanSizes& sizes, double eps, const SpanResults& results,
                                    int num_threads, const std::string& isa) {
  ScoreSpansParams params{};
  params.start = reinterpret_cast<const float*>(std::get<0>(start));
  params.end = reinterpret_cast<const float*>(std::get<0>(end));
  params.start_stride = std::get<1>(start);
  params.end_stride = std::get<1>(end);
  params.weight = reinterpret_cast<const float*>(weight);
  std::tie(params.rows, params.length, params.width, params.max_width, params.spans) = sizes;
  params.eps = static_cast<float>(eps);
  params.scores = reinterpret_cast<float*>(results.first);
  params.mean = reinterpret_cast<float*>(results.second);
  params.rstd = params.mean + params.rows * params.spans;
  params.num_threads = num_threads;
  params.isa = choose_isa(isa);
  return params;
}

void score_spans_fwd(const HalfRows& start, const HalfRows& end, uintptr_t weight, const SpanSizes& sizes,
                     double eps, const SpanResults& results, int num_threads, const std::string& isa) {
  launch_score_spans_fwd(score_spans_inputs(start, end, weight, sizes, eps, results, num_threads, isa));
}

void score_spans_bwd(const HalfRows& start, const HalfRows& end, uintptr_t weight, const SpanSizes& sizes,
                     double eps, const SpanResults& results, uintptr_t d_scores, uintptr_t d_start,
                     uintptr_t d_end, uintptr_t d_weight, int num_threads, const std::string& isa) {
  ScoreSpansParams params = score_spans_inputs(start, end, weight, sizes, eps, results, num_threads, isa);
  params.d_scores = reinterpret_cast<const float*>(d_scores);
  params.d_start = reinterpret_cast<float*>(d_start);
  params.d_end = reinterpret_cast<float*>(d_end);
  params.d_weight = reinterpret_cast<float*>(d_weight);
  launch_score_spans_bwd(params);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of realm_kernels";
  m.def("instruction_sets", &instruction_sets);
  m.def("compiler", &compiler);
  m.def("threading", &threading);
  m.def("fma_ceiling", &fma_ceiling, py::call_guard<py::gil_scoped_release>());
  // The GIL is released: two Python threads may search at once.
  m.def("mips_topk", &mips_topk, py::call_guard<py::gil_scoped_release>());
  m.def("encode_rows", &encode_rows, py::call_guard<py::gil_scoped_release>());
  m.def("marginal_loss_fwd", &marginal_loss_fwd, py::call_guard<py::gil_scoped_release>());
  m.def("marginal_loss_bwd", &marginal_loss_bwd, py::call_guard<py::gil_scoped_release>());
  m.def("advise_huge_pages", &advise_huge_pages);
  m.def("linear_marginal_loss_memory", &linear_marginal_loss_memory);
  m.def("linear_marginal_loss", &linear_marginal_loss, py::call_guard<py::gil_scoped_release>());
  m.def("scale", &scale, py::call_guard<py::gil_scoped_release>());
  m.def("score_spans_fwd", &score_spans_fwd, py::call_guard<py::gil_scoped_release>());
  m.def("score_spans_bwd", &score_spans_bwd, py::call_guard<py::gil_scoped_release>());
  m.def("span_marginal_loss_fwd", &span_marginal_loss_fwd, py::call_guard<py::gil_scoped_release>());
  m.def("span_marginal_loss_bwd", &span_marginal_loss_bwd, py::call_guard<py::gil_scoped_release>());
}
