// score_spans, forward and backward, against the formulas written out.
#include "cpu/score_spans.h"

#include "cases.h"

namespace sanitize {
namespace {

using realm_kernels::ScoreSpansParams;

struct Shape {
  int64_t rows, length, width, max_width;
  int64_t gap;  // between rows
};
constexpr Shape kShapes[] = {
    {0, 3, 16, 2, 0}, {1, 1, 16, 1, 0}, {3, 7, 48, 7, 0}, {5, 9, 16, 4, 5}, {2, 13, 80, 10, 16}};
constexpr double kEps = 1e-3;

int64_t spans_of(const Shape& shape) {
  int64_t count = 0;
  for (int64_t w = 0; w < shape.max_width; ++w) count += shape.length - w;
  return count;
}

struct Problem {
  Problem(const Shape& shape, bool has_nan, uint64_t seed)
      : shape(shape),
        start(floats(size())),
        end(floats(size())),
        weight(floats(shape.width)),
        d_scores(floats(shape.rows * spans_of(shape))) {
    Random random(seed);
    for (int64_t i = 0; i < shape.rows * shape.length; ++i) {
      for (int64_t s = 0; s < shape.width; ++s) {
        start.set(i * stride() + s, random.uniform(-1, 1));
        end.set(i * stride() + s, random.uniform(-1, 1));
      }
    }
    // Of sum 0.
    for (int64_t s = 0; s < shape.width; s += 2) {
      weight.set(s, random.uniform(-1, 1));
      weight.set(s + 1, -weight.get(s));
    }
    // A gradient of zero stops what is behind it, NaN too.
    for (int64_t i = 0; i < d_scores.count(); ++i) {
      d_scores.set(i, random.below(4) == 0 ? 0.0 : random.uniform(-1, 1));
    }
    if (has_nan && shape.rows > 0) {
      start.set(random.below(shape.rows * shape.length) * stride() + random.below(shape.width), kNan);
    }
  }

  static Elements floats(int64_t count) { return Elements(FloatType::kFloat32, count); }
  int64_t stride() const { return shape.width + shape.gap; }
  int64_t size() const {
    return shape.rows == 0 ? 0 : (shape.rows * shape.length - 1) * stride() + shape.width;
  }

  Shape shape;
  Elements start, end, weight, d_scores;
};

struct Expected {
  std::vector<double> scores, d_start, d_end, d_weight;  // [N, C], [N, T, S], [N, T, S], [S]
};

Expected expected(const Problem& problem) {
  const auto [rows, length, width, max_width, gap] = problem.shape;
  const auto size = static_cast<double>(width);
  Expected result;
  result.d_start.assign(rows * length * width, 0.0);
  result.d_end.assign(rows * length * width, 0.0);
  result.d_weight.assign(width, 0.0);
  std::vector<double> x(width);
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t w = 0; w < max_width; ++w) {
      for (int64_t t = 0; t + w < length; ++t) {
        const int64_t first = n * length + t, last = first + w;
        double mean = 0.0, variance = 0.0, score = 0.0;
        for (int64_t s = 0; s < width; ++s) {
          const double sum =
              problem.start.get(first * problem.stride() + s) + problem.end.get(last * problem.stride() + s);
          x[s] = sum < 0.0 ? 0.0 : sum;
          mean += x[s] / size;
        }
        for (int64_t s = 0; s < width; ++s) variance += (x[s] - mean) * (x[s] - mean) / size;
        const double rstd = 1.0 / std::sqrt(variance + kEps);
        for (int64_t s = 0; s < width; ++s) score += problem.weight.get(s) * (x[s] - mean) * rstd;
        const double g = problem.d_scores.get(static_cast<int64_t>(result.scores.size()));
        result.scores.push_back(score);
        for (int64_t s = 0; s < width && g != 0.0; ++s) {
          const double normal = (x[s] - mean) * rstd;
          const double d = g * rstd * (problem.weight.get(s) - normal * score / size);
          result.d_start[first * width + s] += x[s] == 0.0 ? 0.0 : d;
          result.d_end[last * width + s] += x[s] == 0.0 ? 0.0 : d;
          result.d_weight[s] += g * normal;
        }
      }
    }
  }
  return result;
}

void expect_all(const std::string& where, const Elements& got, const std::vector<double>& wanted) {
  for (int64_t i = 0; i < got.count(); ++i) {
    expect_within(where, i, got.get(i), wanted[i], 1e-3);
  }
}

void run(const Problem& problem, const Expected& wanted, int num_threads, const std::string& isa) {
  const auto [rows, length, width, max_width, gap] = problem.shape;
  const std::string where = "score_spans " + isa + " N=" + std::to_string(rows) +
                            " T=" + std::to_string(length) + " S=" + std::to_string(width) +
                            " threads=" + std::to_string(num_threads);
  const int64_t spans = spans_of(problem.shape);
  const auto floats = [](const Elements& elements) { return static_cast<const float*>(elements.data()); };
  const auto output = [](Elements& elements) { return static_cast<float*>(elements.data()); };
  Elements scores = Problem::floats(rows * spans), mean = Problem::floats(rows * spans);
  Elements rstd = Problem::floats(rows * spans), d_weight = Problem::floats(width);
  Elements d_start = Problem::floats(rows * length * width), d_end = Problem::floats(rows * length * width);
  ScoreSpansParams params{};
  params.start = floats(problem.start);
  params.end = floats(problem.end);
  params.weight = floats(problem.weight);
  params.start_stride = params.end_stride = problem.stride();
  params.rows = rows;
  params.length = length;
  params.width = width;
  params.max_width = max_width;
  params.spans = spans;
  params.eps = static_cast<float>(kEps);
  params.scores = output(scores);
  params.mean = output(mean);
  params.rstd = output(rstd);
  params.num_threads = num_threads;
  params.isa = realm_kernels::choose_isa(isa);
  launch_score_spans_fwd(params);
  params.d_scores = floats(problem.d_scores);
  params.d_start = output(d_start);
  params.d_end = output(d_end);
  params.d_weight = output(d_weight);
  launch_score_spans_bwd(params);

  expect_all(where + " scores", scores, wanted.scores);
  expect_all(where + " d_start", d_start, wanted.d_start);
  expect_all(where + " d_end", d_end, wanted.d_end);
  expect_all(where + " d_weight", d_weight, wanted.d_weight);

  // One kind of gradient alone.
  Elements weight_alone = Problem::floats(width), start_alone = Problem::floats(d_start.count());
  Elements end_alone = Problem::floats(d_end.count());
  params.d_start = params.d_end = nullptr;
  params.d_weight = output(weight_alone);
  launch_score_spans_bwd(params);
  params.d_start = output(start_alone);
  params.d_end = output(end_alone);
  params.d_weight = nullptr;
  launch_score_spans_bwd(params);
  expect_all(where + " d_weight alone", weight_alone, wanted.d_weight);
  expect_all(where + " d_start alone", start_alone, wanted.d_start);
  expect_all(where + " d_end alone", end_alone, wanted.d_end);
}

}  // namespace

int64_t run_score_spans() {
  int64_t calls = 0;
  for (const Shape& shape : kShapes) {
    for (const bool has_nan : {false, true}) {
      const Problem problem(shape, has_nan, static_cast<uint64_t>(calls));
      const Expected wanted = expected(problem);
      for (const std::string& isa : realm_kernels::instruction_sets()) {
        for (const int num_threads : {1, 2}) {
          run(problem, wanted, num_threads, isa);
          ++calls;
        }
      }
    }
  }
  return calls;
}

}  // namespace sanitize
