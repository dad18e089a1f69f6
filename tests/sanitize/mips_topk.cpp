// mips_topk against loops: awkward sizes, gaps between rows, lists and masks, ties, infinities and NaN; two
// searches at once.
#include "cpu/mips_topk.h"

#include <algorithm>
#include <thread>

#include "cases.h"

namespace sanitize {
namespace {

using realm_kernels::code_panel_bytes;
using realm_kernels::CodeBounds;
using realm_kernels::EncodeParams;
using realm_kernels::kCodeRows;
using realm_kernels::MipsTopkParams;
using realm_kernels::ScalarType;
using realm_kernels::TableShard;

struct Shape {
  int64_t batch, rows, dim, k;
};

// No query and one; odd sizes; both sides of a panel, a group of queries, a block of rows, a block of
// queries; k = N.
constexpr Shape kShapes[] = {{0, 5, 3, 2},      {1, 1, 1, 1},      {1, 33, 7, 33},   {1, 1500, 17, 9},
                             {2, 31, 8, 5},     {3, 17, 1031, 17}, {7, 65, 9, 64},   {7, 129, 16, 10},
                             {8, 1025, 13, 99}, {13, 2100, 5, 3},  {512, 70, 3, 7},  {512, 259, 33, 100},
                             {601, 47, 12, 47}, {31, 640, 24, 1},  {65, 513, 31, 20}};
constexpr FloatType kTypes[] = {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16};
enum class Values { kSmooth, kTies, kSpecial };
constexpr Values kValues[] = {Values::kSmooth, Values::kTies, Values::kSpecial};

double draw(Random& random, Values values) {
  constexpr double kSpecial[] = {kInfinity, -kInfinity, kNan, 0.0, -0.0, 1e-45, 6e-8, 3e38, -3e38, 65504.0};
  if (values == Values::kTies) {
    return static_cast<double>(random.below(5) - 2);
  }
  if (values == Values::kSpecial && random.below(40) == 0) {
    return kSpecial[random.below(static_cast<int64_t>(std::size(kSpecial)))];
  }
  return random.uniform(-1, 1);
}

struct Problem {
  Problem(const Shape& shape, FloatType type, Values values, bool filtered, uint64_t seed)
      : shape(shape),
        filtered(filtered),
        queries(FloatType::kFloat32, shape.batch * shape.dim),
        table(type, shape.rows * shape.dim),
        row_mask(shape.rows, true) {
    Random random(seed);
    for (int64_t i = 0; i < queries.count(); ++i) {
      queries.set(i, draw(random, values));
    }
    for (int64_t i = 0; i < table.count(); ++i) {
      table.set(i, draw(random, values));
    }
    if (filtered) {
      row_mask = draw_mask(random, shape.rows, 0.6);
      std::fill_n(row_mask.data(), std::min<int64_t>(shape.rows, 64), false);  // whole panels of them
      num_exclude = 5;
      for (int64_t i = 0; i < shape.batch * num_exclude; ++i) {
        exclude.push_back(random.below(shape.rows + 1) - 1);
      }
      for (int64_t b = 0; b < shape.batch; ++b) {
        std::sort(exclude.begin() + b * num_exclude, exclude.begin() + (b + 1) * num_exclude);
      }
    }
    exclude.shrink_to_fit();
  }

  Shape shape;
  bool filtered;
  Elements queries, table;
  Mask row_mask;
  std::vector<int64_t> exclude;
  int64_t num_exclude = 0;
};

struct Result {
  explicit Result(const Shape& shape)
      : scores(FloatType::kFloat32, shape.batch * shape.k), indices(shape.batch * shape.k, -7) {}
  Elements scores;
  std::vector<int64_t> indices;
};

// The canonical score (docs/design.md, section 4) and the total order, by loops.
Result expected(const Problem& problem) {
  const auto [batch, rows, dim, k] = problem.shape;
  std::vector<double> queries, table;
  for (int64_t i = 0; i < problem.queries.count(); ++i) {
    queries.push_back(problem.queries.get(i));
  }
  for (int64_t i = 0; i < problem.table.count(); ++i) {
    table.push_back(problem.table.get(i));
  }
  Result result(problem.shape);
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<std::pair<float, int64_t>> found;  // score negated, id: ascending is the total order
    const auto first = problem.exclude.begin() + b * problem.num_exclude;
    for (int64_t row = 0; row < rows; ++row) {
      double p[8] = {};
      for (int64_t d = 0; d < dim; ++d) {
        p[d % 8] += queries[b * dim + d] * table[row * dim + d];
      }
      const float score =
          static_cast<float>(((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]))) + 0.0f;
      const bool excluded = std::find(first, first + problem.num_exclude, row) != first + problem.num_exclude;
      if (!std::isnan(score) && problem.row_mask[row] && !excluded) {
        found.emplace_back(-score, row);
      }
    }
    std::sort(found.begin(), found.end());
    for (int64_t j = 0; j < k; ++j) {
      const bool there = j < static_cast<int64_t>(found.size());
      result.scores.set(b * k + j, there ? -found[j].first + 0.0 : -kInfinity);
      result.indices[b * k + j] = there ? found[j].second : -1;
    }
  }
  return result;
}

// The rows of a problem in one shard or in three, one of them empty, with `gap` elements between rows.
struct Layout {
  Layout(const Problem& problem, bool split, int64_t gap) {
    const auto [batch, rows, dim, k] = problem.shape;
    const std::vector<int64_t> ends =
        split ? std::vector<int64_t>{rows / 3, rows / 3, rows} : std::vector<int64_t>{rows};
    int64_t first = 0;
    for (const int64_t end : ends) {
      const int64_t n = end - first, stride = dim + gap;
      Elements& shard = memory.emplace_back(problem.table.type(), n > 0 ? (n - 1) * stride + dim : 0);
      for (int64_t i = 0; i < n * dim; ++i) {
        shard.set(i / dim * stride + i % dim, problem.table.get(first * dim + i));
      }
      TableShard& described = shards.emplace_back();
      described.rows = shard.data();
      described.num_rows = n;
      described.row_stride = stride;
      first = end;
    }
  }

  std::vector<Elements> memory;
  std::vector<TableShard> shards;
};

struct How {
  int num_threads;
  Isa isa;
};

ScalarType scalar_type(FloatType type) {
  return type == FloatType::kBFloat16  ? ScalarType::kBFloat16
         : type == FloatType::kFloat16 ? ScalarType::kFloat16
                                       : ScalarType::kFloat32;
}

Result search(const Problem& problem, const std::vector<TableShard>& shards, const float* mean, How how) {
  Result result(problem.shape);
  MipsTopkParams params{};
  params.queries = static_cast<const float*>(problem.queries.data());
  params.shards = shards.data();
  params.num_shards = static_cast<int64_t>(shards.size());
  params.mean = mean;
  params.table_type = scalar_type(problem.table.type());
  params.batch = problem.shape.batch;
  params.dim = problem.shape.dim;
  params.k = problem.shape.k;
  params.exclude = problem.filtered ? problem.exclude.data() : nullptr;
  params.num_exclude = problem.num_exclude;
  params.row_mask = problem.filtered ? problem.row_mask.data() : nullptr;
  params.scores = static_cast<float*>(result.scores.data());
  params.indices = result.indices.data();
  params.num_threads = how.num_threads;
  params.isa = how.isa;
  launch_mips_topk(params);
  return result;
}

Result search_rows(const Problem& problem, const Layout& layout, How how) {
  return search(problem, layout.shards, nullptr, how);
}

// Encodes the shards, then searches by their codes. Any vector serves as the mean.
Result search_codes(const Problem& problem, const Layout& layout, How how) {
  const int64_t dim = problem.shape.dim;
  const std::vector<float> mean(dim, 0.25f);
  std::vector<TableShard> shards = layout.shards;
  std::vector<std::unique_ptr<uint8_t[]>> codes;
  std::vector<std::unique_ptr<CodeBounds[]>> bounds;
  for (TableShard& shard : shards) {
    const int64_t panels = (shard.num_rows + kCodeRows - 1) / kCodeRows;
    EncodeParams params{};
    params.rows = shard.rows;
    params.num_rows = shard.num_rows;
    params.row_stride = shard.row_stride;
    params.mean = mean.data();
    params.table_type = scalar_type(problem.table.type());
    params.dim = dim;
    params.codes = codes.emplace_back(new uint8_t[panels * code_panel_bytes(dim)]).get();
    params.bounds = bounds.emplace_back(new CodeBounds[panels]).get();
    params.num_threads = how.num_threads;
    params.isa = how.isa;
    launch_encode(params);
    shard.codes = params.codes;
    shard.bounds = params.bounds;
  }
  return search(problem, shards, mean.data(), how);
}

// Every road to a top-k: each must give the same ids and bits. A new launcher gets a line here.
struct Launcher {
  const char* name;
  Result (*search)(const Problem&, const Layout&, How);
};
constexpr Launcher kLaunchers[] = {{"mips_topk rows", &search_rows}, {"mips_topk codes", &search_codes}};

std::string describe(const Launcher& launcher, const Problem& problem, const std::string& isa) {
  const auto [batch, rows, dim, k] = problem.shape;
  return std::string(launcher.name) + " " + isa + " " + name_of(problem.table.type()) +
         " B=" + std::to_string(batch) + " N=" + std::to_string(rows) + " D=" + std::to_string(dim) +
         " k=" + std::to_string(k) + (problem.filtered ? " filtered" : "");
}

void expect_same(const std::string& where, const Result& got, const Result& wanted) {
  for (int64_t i = 0; i < wanted.scores.count(); ++i) {
    if (got.indices[i] != wanted.indices[i]) {
      fail(where + " ids", i, static_cast<double>(got.indices[i]), static_cast<double>(wanted.indices[i]));
    }
    const double a = got.scores.get(i), b = wanted.scores.get(i);
    if (a != b || std::signbit(a) != std::signbit(b)) {
      fail(where + " scores", i, a, b);
    }
  }
}

int64_t run_problem(const Problem& problem) {
  const Result wanted = expected(problem);
  int64_t calls = 0;
  for (const bool split : {false, true}) {
    const Layout layout(problem, split, split ? 3 : 0);
    for (const Launcher& launcher : kLaunchers) {
      for (const std::string& isa : realm_kernels::instruction_sets()) {
        // An even share of the threads: one where rows lie close, three where they are split.
        const How how{split ? 3 : 1, realm_kernels::choose_isa(isa)};
        expect_same(describe(launcher, problem, isa), launcher.search(problem, layout, how), wanted);
        ++calls;
      }
    }
  }
  return calls;
}

// Two searches of several threads each over one table: what ThreadSanitizer is here for.
int64_t run_two_at_once() {
  const Problem problem({40, 3000, 24, 10}, FloatType::kFloat32, Values::kTies, true, 99);
  const Layout layout(problem, true, 3);
  const Result wanted = expected(problem);
  int64_t calls = 0;
  for (const Launcher& launcher : kLaunchers) {
    for (const std::string& isa : realm_kernels::instruction_sets()) {
      const auto one = [&] {
        expect_same(describe(launcher, problem, isa) + " two at once",
                    launcher.search(problem, layout, {3, realm_kernels::choose_isa(isa)}), wanted);
      };
      std::thread other(one);
      one();
      other.join();
      calls += 2;
    }
  }
  return calls;
}

}  // namespace

int64_t run_mips_topk() {
  int64_t calls = 0;
  uint64_t seed = 0;
  for (const Shape& shape : kShapes) {
    for (const FloatType type : kTypes) {
      for (const Values values : kValues) {
        if (kThreadsOnly && (type != FloatType::kFloat32 || values != Values::kTies)) {
          continue;
        }
        for (const bool filtered : {false, true}) {
          calls += run_problem(Problem(shape, type, values, filtered, ++seed));
        }
      }
    }
  }
  return calls + run_two_at_once();
}

}  // namespace sanitize
