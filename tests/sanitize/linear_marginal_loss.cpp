// linear_marginal_loss, a chunk's forward and backward, against the formulas written out: blocks of the
// vocabulary and panels of rows that end early, rows further apart than they are long, outputs not asked for.
#include "cpu/linear_marginal_loss.h"

#include <algorithm>

#include "cases.h"

namespace sanitize {
namespace {

using realm_kernels::LinearMarginalLossParams;

struct Shape {
  int64_t rows, width, vocabulary;
  int64_t gap;  // between rows
};
// A block is 192 words, a panel 8 to 32 rows. Pairs of bfloat16 are read in place where width and stride are
// even.
constexpr Shape kShapes[] = {{1, 1, 1, 0},     {1, 123, 385, 0}, {33, 123, 193, 0}, {64, 40, 100, 3},
                             {7, 34, 192, 10}, {5, 31, 577, 1},  {40, 64, 391, 0}};
constexpr FloatType kTypes[] = {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16};

enum class Kind { kBare, kBiased, kNan };  // the last with a bias, and NaN in a hidden state

struct Problem {
  Problem(const Shape& shape, FloatType type, Kind kind, uint64_t seed)
      : shape(shape),
        has_bias(kind != Kind::kBare),
        hidden(type, (shape.rows - 1) * stride() + shape.width),
        weight(type, (shape.vocabulary - 1) * stride() + shape.width),
        bias(FloatType::kFloat32, shape.vocabulary),
        factor(FloatType::kFloat64, shape.rows),
        targets(shape.rows) {
    Random random(seed);
    const auto fill = [&](Elements& matrix, int64_t rows) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t h = 0; h < shape.width; ++h) matrix.set(r * stride() + h, random.uniform(-1, 1));
      }
    };
    fill(hidden, shape.rows);
    fill(weight, shape.vocabulary);
    for (int64_t v = 0; v < shape.vocabulary; ++v) bias.set(v, has_bias ? random.uniform(-1, 1) : 0.0);
    for (int64_t r = 0; r < shape.rows; ++r) {
      factor.set(r, random.uniform(-1, 1));
      targets[r] = random.below(shape.vocabulary);
    }
    targets[shape.rows - 1] = shape.vocabulary - 1;
    if (kind == Kind::kNan) {
      hidden.set(random.below(shape.rows) * stride() + shape.width - 1, kNan);
    }
  }

  int64_t stride() const { return shape.width + shape.gap; }

  Shape shape;
  bool has_bias;
  Elements hidden, weight, bias, factor;
  std::vector<int64_t> targets;
};

// A sum, and the sum of the magnitudes of its terms: what its rounding errors are relative to.
struct Sum {
  double value = 0.0, magnitude = 0.0;
  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
  }
};

struct Expected {
  std::vector<double> log_p, log_sum;           // [R]
  std::vector<Sum> d_hidden, d_weight, d_bias;  // [R, H], [V, H], [V]
};

Expected expected(const Problem& problem) {
  const auto [rows, width, vocabulary, gap] = problem.shape;
  const int64_t stride = problem.stride();
  Expected result{std::vector<double>(rows), std::vector<double>(rows), std::vector<Sum>(rows * width),
                  std::vector<Sum>(vocabulary * width), std::vector<Sum>(vocabulary)};
  std::vector<double> hidden(width), weight(vocabulary * width), logits(vocabulary);
  for (int64_t v = 0; v < vocabulary; ++v) {
    for (int64_t h = 0; h < width; ++h) weight[v * width + h] = problem.weight.get(v * stride + h);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t h = 0; h < width; ++h) hidden[h] = problem.hidden.get(r * stride + h);
    double total = 0.0;  // the logits are within a hundred of 0
    for (int64_t v = 0; v < vocabulary; ++v) {
      logits[v] = problem.bias.get(v);
      for (int64_t h = 0; h < width; ++h) logits[v] += hidden[h] * weight[v * width + h];
      total += std::exp(logits[v]);
    }
    result.log_sum[r] = std::log(total);
    result.log_p[r] = logits[problem.targets[r]] - result.log_sum[r];
    for (int64_t v = 0; v < vocabulary; ++v) {
      const double p = std::exp(logits[v] - result.log_sum[r]);
      const double d = problem.factor.get(r) * (p - (v == problem.targets[r] ? 1.0 : 0.0));
      result.d_bias[v].add(d);
      for (int64_t h = 0; h < width; ++h) {
        result.d_hidden[r * width + h].add(d * weight[v * width + h]);
        result.d_weight[v * width + h].add(d * hidden[h]);
      }
    }
  }
  return result;
}

// Gradients of logits are rounded to the type of the operands where that is bfloat16.
void expect_sums(const std::string& where, const Elements& got, const std::vector<Sum>& wanted, double times,
                 FloatType type) {
  const double unit = type == FloatType::kBFloat16 ? 0x1p-7 : 0x1p-14;
  for (int64_t i = 0; i < got.count(); ++i) {
    expect_within(where, i, got.get(i), times * wanted[i].value, unit * (times * wanted[i].magnitude + 1e-3));
  }
}

void run(const Problem& problem, const Expected& wanted, int num_threads, const std::string& isa) {
  const auto [rows, width, vocabulary, gap] = problem.shape;
  const FloatType type = problem.hidden.type();
  const std::string where = "linear_marginal_loss " + isa + " " + name_of(type) +
                            " R=" + std::to_string(rows) + " H=" + std::to_string(width) +
                            " V=" + std::to_string(vocabulary) + (problem.has_bias ? " bias" : "") +
                            " threads=" + std::to_string(num_threads);
  const auto floats = [](int64_t count) { return Elements(FloatType::kFloat32, count); };
  const auto start = [](Elements& elements) { return static_cast<float*>(elements.data()); };
  Elements log_p(FloatType::kFloat64, rows), log_sum(FloatType::kFloat64, rows);
  LinearMarginalLossParams params{};
  params.hidden = problem.hidden.data();
  params.weight = problem.weight.data();
  params.type = type;
  params.hidden_stride = params.weight_stride = problem.stride();
  params.bias = problem.has_bias ? static_cast<const float*>(problem.bias.data()) : nullptr;
  params.targets = problem.targets.data();
  params.rows = rows;
  params.width = width;
  params.vocabulary = vocabulary;
  params.log_p = static_cast<double*>(log_p.data());
  params.log_sum = static_cast<double*>(log_sum.data());
  params.num_threads = num_threads;
  params.isa = realm_kernels::choose_isa(isa);
  Elements scratch = floats(linear_marginal_loss_scratch(params));
  params.scratch = start(scratch);
  Elements workspace = floats(realm_kernels::linear_marginal_loss_workspace(params));
  // First without a backward to come.
  for (float* const kept : {static_cast<float*>(nullptr), start(workspace)}) {
    params.workspace = kept;
    for (int64_t r = 0; r < rows; ++r) {
      log_p.set(r, kInfinity);
      log_sum.set(r, kInfinity);
    }
    launch_linear_marginal_loss_fwd(params);
    for (int64_t r = 0; r < rows; ++r) {
      expect_within(where + " log_p", r, log_p.get(r), wanted.log_p[r], 1e-4);
      expect_within(where + " log_sum", r, log_sum.get(r), wanted.log_sum[r], 1e-4);
    }
  }

  Elements d_hidden = floats(rows * width), d_weight = floats(vocabulary * width),
           d_bias = floats(vocabulary);
  for (int64_t v = 0; v < vocabulary; ++v) d_bias.set(v, 0.0);
  params.factor = static_cast<const double*>(problem.factor.data());
  params.d_weight = start(d_weight);
  params.d_bias = problem.has_bias ? start(d_bias) : nullptr;
  params.first = true;
  launch_linear_marginal_loss_bwd(params);
  params.first = false;
  params.d_hidden = start(d_hidden);
  launch_linear_marginal_loss_bwd(params);  // as if the same chunk came again
  expect_sums(where + " d_hidden", d_hidden, wanted.d_hidden, 1.0, type);
  expect_sums(where + " d_weight", d_weight, wanted.d_weight, 2.0, type);
  if (problem.has_bias) {
    expect_sums(where + " d_bias", d_bias, wanted.d_bias, 2.0, type);
  }
  for (int64_t i = 0; i < rows * width; ++i) d_hidden.set(i, kInfinity);
  params.d_weight = params.d_bias = nullptr;
  launch_linear_marginal_loss_bwd(params);
  expect_sums(where + " d_hidden alone", d_hidden, wanted.d_hidden, 1.0, type);
}

// The rows as examples of one document and one token, in two chunks: what a call adds is which rows are
// taken, and what stands where the others are.
void run_call(const Problem& problem, const Expected& wanted, int num_threads, const std::string& isa) {
  const auto [rows, width, vocabulary, gap] = problem.shape;
  const FloatType type = problem.hidden.type();
  const bool narrow = type == FloatType::kBFloat16;
  const std::string where = "linear_marginal_loss call " + isa + " " + name_of(type) +
                            " R=" + std::to_string(rows) + " threads=" + std::to_string(num_threads);
  Elements scores(FloatType::kFloat32, rows), log_likelihood(FloatType::kFloat64, rows),
      loss(FloatType::kFloat64, rows), factor(FloatType::kFloat64, rows),
      d_hidden(narrow ? type : FloatType::kFloat32, rows * width),
      d_weight(FloatType::kFloat32, vocabulary * width);
  std::vector<int64_t> count(static_cast<size_t>(rows)), targets = problem.targets;
  for (int64_t r = 0; r < rows; ++r) {
    scores.set(r, 0.0);
  }
  realm_kernels::LinearMarginalLossCall call{};
  LinearMarginalLossParams& chunk = call.chunk;
  chunk.hidden = problem.hidden.data();
  chunk.weight = problem.weight.data();
  chunk.type = type;
  chunk.hidden_stride = chunk.weight_stride = problem.stride();
  chunk.rows = (rows + 1) / 2;
  chunk.width = width;
  chunk.vocabulary = vocabulary;
  chunk.num_threads = num_threads;
  chunk.isa = realm_kernels::choose_isa(isa);
  Elements scratch(FloatType::kFloat32, linear_marginal_loss_scratch(chunk)),
      workspace(FloatType::kFloat32, linear_marginal_loss_workspace(chunk));
  chunk.scratch = static_cast<float*>(scratch.data());
  chunk.workspace = static_cast<float*>(workspace.data());
  chunk.d_hidden = d_hidden.data();
  chunk.d_hidden_type = d_hidden.type();
  chunk.d_weight = static_cast<float*>(d_weight.data());
  call.documents.scores = {scores.data(), FloatType::kFloat32};
  call.documents.wide = true;
  call.documents.reduction = realm_kernels::Reduction::kNone;
  call.documents.loss = loss.data();
  call.documents.count = count.data();
  call.documents.batch = rows;
  call.documents.documents = call.documents.tokens = 1;
  call.documents.num_threads = num_threads;
  call.documents.isa = chunk.isa;
  call.bias = {problem.has_bias ? problem.bias.data() : nullptr, FloatType::kFloat32};
  call.targets = targets.data();
  call.ignore_index = -100;
  call.whole_examples = true;
  call.log_likelihood = static_cast<double*>(log_likelihood.data());
  call.factor = static_cast<double*>(factor.data());
  const auto found = launch_linear_marginal_loss(call);
  expect_within(where + " counted", 0, static_cast<double>(found.counted), static_cast<double>(rows), 0.0);
  for (int64_t r = 0; r < rows; ++r) {
    expect_within(where + " log_likelihood", r, log_likelihood.get(r), wanted.log_p[r], 1e-4);
    expect_within(where + " loss", r, loss.get(r), -wanted.log_p[r], 1e-4);
    expect_within(where + " posterior", r, factor.get(r), std::isnan(wanted.log_p[r]) ? kNan : 1.0, 1e-6);
    factor.set(r, problem.factor.get(r));
  }
  call.has_factor = true;
  launch_linear_marginal_loss(call);
  expect_sums(where + " d_hidden", d_hidden, wanted.d_hidden, 1.0, type);
  expect_sums(where + " d_weight", d_weight, wanted.d_weight, 1.0, type);
  targets[rows - 1] = call.ignore_index;
  d_hidden.set(rows * width - 1, 0.5);
  launch_linear_marginal_loss(call);
  expect_within(where + " a row without a part", rows - 1, d_hidden.get(rows * width - 1), 0.0, 0.0);

  Elements narrowed(FloatType::kBFloat16, d_weight.count());
  realm_kernels::launch_scale(
      {{{d_weight.data(), FloatType::kFloat32}, narrowed.data(), FloatType::kBFloat16, d_weight.count()}},
      -2.0f, num_threads, chunk.isa);
  for (int64_t i = 0; i < d_weight.count(); ++i) {
    const double scaled = -2.0 * d_weight.get(i);
    expect_within(where + " scaled", i, narrowed.get(i), scaled, 0x1p-8 * std::fabs(scaled));
  }
}

}  // namespace

int64_t run_linear_marginal_loss() {
  int64_t calls = 0;
  for (const Shape& shape : kShapes) {
    for (const FloatType type : kTypes) {
      for (const Kind kind : {Kind::kBare, Kind::kBiased, Kind::kNan}) {
        if (kThreadsOnly && (type != FloatType::kFloat32 || kind != Kind::kBiased)) {
          continue;
        }
        const Problem problem(shape, type, kind, static_cast<uint64_t>(calls));
        const Expected wanted = expected(problem);
        for (const std::string& isa : realm_kernels::instruction_sets()) {
          for (const int num_threads : {1, 2}) {
            run(problem, wanted, num_threads, isa);
            run_call(problem, wanted, num_threads, isa);
            calls += 2;
          }
        }
      }
    }
  }
  return calls;
}

}  // namespace sanitize
