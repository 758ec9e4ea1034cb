// The kernels of the native forward on memory of exactly its size, for sanitizers to watch, against
// plain loops. One call a line:
//
//   gemm <seed> <rows> <columns> <depth> <epilogue>
//   int8 <seed> <rows> <columns> <depth> <extremes>
//   attention <seed> <samples> <tokens> <heads> <head_dim> <parts>
//   norm | dots <seed> <rows> <columns> <depth> <beyond>
//
// `extremes` makes every weight and activation the largest there is; `beyond` reads a row too many.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/isa/forward_attention.cpp"
#include "cpu/isa/forward_rows.cpp"
#include "cpu/isa/gemm.cpp"
#include "cpu/isa/gemm_int8.cpp"

namespace isa = fastdit::FASTDIT_ISA;
using namespace fastdit;

namespace fastdit {
Isa current_isa() { return Isa::baseline; }
}  // namespace fastdit

namespace {

std::vector<std::unique_ptr<char[]>> memory;

template <class T>
T* array(int64_t count) {
  memory.emplace_back(new char[count * sizeof(T)]);
  return reinterpret_cast<T*>(memory.back().get());
}

float number() { return std::rand() / float(RAND_MAX) * 2 - 1; }

float* floats(int64_t count) {
  float* data = array<float>(count);
  for (int64_t i = 0; i < count; ++i) data[i] = number();
  return data;
}

// Rows that end where their memory ends.
int64_t extent(int64_t rows, int64_t stride, int64_t width) { return (rows - 1) * stride + width; }

bool close(double got, double want, double size) {
  if (std::fabs(got - want) <= 1e-5 * size) return true;
  std::printf("%.9g instead of %.9g\n", got, want);
  return false;
}

double gelu(double v) {
  return v / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
}

// A product's arguments but for A and B: three tokens a sample.
Gemm outside(int64_t rows, int64_t columns, int64_t depth, Epilogue epilogue) {
  Gemm g;
  g.rows = rows, g.columns = columns, g.depth = depth, g.epilogue = epilogue, g.tokens = 3;
  g.c_stride = row_stride(columns);
  g.c = floats(extent(rows, g.c_stride, padded(columns)));
  g.bias = floats(padded(columns)), g.row_step = padded(columns) + 16;
  g.row = floats(extent(rows < 3 ? 3 : rows, g.row_step, padded(columns)));
  return g;
}

double finished(const Gemm& g, int64_t r, int64_t c, double sum, float before) {
  const double v = sum + g.bias[c];
  switch (g.epilogue) {
    case Epilogue::plain: return v;
    case Epilogue::gelu: return gelu(v);
    case Epilogue::gate: return before + g.row[r / 3 * g.row_step + c] * v;
    case Epilogue::add: return v + g.row[r % 3 * g.row_step + c];
  }
  return 0;
}

Dots few_rows(int64_t rows, int64_t columns, int64_t depth) {
  return {floats(rows * depth), floats(columns * depth), floats(columns), floats(rows * columns),
          columns, rows, depth, false};
}

bool right(const Dots& d) {
  for (int64_t r = 0; r < d.rows; ++r)
    for (int64_t c = 0; c < d.out_stride; ++c) {
      double sum = d.bias[c];
      for (int64_t k = 0; k < d.depth; ++k)
        sum += double(d.a[r * d.depth + k]) * d.w[c * d.depth + k];
      if (!close(d.out[r * d.out_stride + c], sum, 1 + std::sqrt(d.depth))) return false;
    }
  return true;
}

// Runs block(row, row_end, panel, panel_end, beside) over C in up to four parts, and a product of few
// rows at the same time. Whether that is right.
template <class Block>
bool in_parts(int64_t rows, int64_t columns, Block block) {
  const int64_t panels = (columns + isa::kPanel - 1) / isa::kPanel;
  const Dots dots = few_rows(2, columns, 9);
  const DotsPart all{&dots, 0, columns};
  const int64_t parts = std::min<int64_t>(2, rows);  // none of them empty
  for (int64_t i = 0; i < parts; ++i)
    for (int64_t j = 0; j < 2; ++j)
      block(rows * i / parts, rows * (i + 1) / parts, panels * j / 2, panels * (j + 1) / 2,
            all.part(2 * i + j, 2 * i + j + 1, 2 * parts));
  return right(dots);
}

int gemm(const long long* n) {
  const int64_t rows = n[1], columns = n[2], depth = n[3];
  Gemm g = outside(rows, columns, depth, Epilogue(n[4]));
  const float* weight = floats(columns * depth);
  float* packed = array<float>(padded(columns) * depth);
  isa::pack_panels({weight, columns, depth, packed}, 0, padded(columns) / isa::kPanel);
  g.a_stride = row_stride(depth), g.b = packed;
  g.a = floats(extent(rows, g.a_stride, depth));
  const std::vector<float> before(g.c, g.c + extent(rows, g.c_stride, padded(columns)));
  int64_t scratch;
  isa::gemm_scratch(g, scratch);
  float* sums = array<float>(scratch);
  if (!in_parts(rows, columns, [&](auto... part) { isa::gemm_block(g, part..., sums); })) return 1;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      double sum = 0, size = 1;
      for (int64_t k = 0; k < depth; ++k)
        sum += double(g.a[r * g.a_stride + k]) * weight[c * depth + k];
      const int64_t at = r * g.c_stride + c;
      if (!close(g.c[at], finished(g, r, c, sum, before[at]), size + std::sqrt(depth))) return 1;
    }
  return 0;
}

int int8(const long long* n) {
  const int64_t rows = n[1], columns = n[2], depth = n[3];
  GemmInt8 g{outside(rows, columns, depth, Epilogue::plain)};
  int64_t group;
  isa::int8_group(group);
  const int64_t groups = (depth + group - 1) / group;
  float* weight = floats(columns * depth);
  float* x = floats(rows * depth);
  if (n[4])
    for (int64_t i = 0; i < columns * depth; ++i) weight[i] = i / depth % 2 ? 1 : -1;
  if (n[4])
    for (int64_t i = 0; i < rows * depth; ++i) x[i] = 1;
  auto* words = array<int32_t>(padded(columns) * groups);
  auto *scale = array<float>(padded(columns)), *a_scale = array<float>(rows);
  auto *sums = array<int32_t>(padded(columns)), *zero = array<int32_t>(rows);
  isa::pack_int8_panels({weight, columns, depth, words, scale, sums}, 0,
                        padded(columns) / isa::kPanel);
  g.a = {x, depth, depth, array<uint32_t>(rows * groups), groups, a_scale, zero};
  isa::quantize_rows(g.a, 0, rows);
  g.b = words, g.b_scale = scale, g.b_sums = sums;
  if (!in_parts(rows, columns, [&](auto... part) { isa::gemm_int8_block(g, part...); })) return 1;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      double sum = 0, either = 0;  // of what the rounded numbers stand for; of halves, one step
      for (int64_t k = 0; k < depth; ++k) {
        const double w = std::rint(weight[c * depth + k] * (1 / scale[c])) * scale[c];
        const double exact = double(x[r * depth + k]) * (1 / a_scale[r]) + zero[r];
        const double level = std::fmin(std::fmax(std::rint(exact), 0), 255);
        sum += (level - zero[r]) * a_scale[r] * w;
        if (std::fabs(exact - std::floor(exact) - 0.5) < 1e-4) either += a_scale[r] * std::fabs(w);
      }
      if (!close(g.g.c[r * g.g.c_stride + c], sum + g.g.bias[c], 1 + depth + 1e5 * either))
        return 1;
    }
  return 0;
}

int attention(const long long* n) {
  const int64_t samples = n[1], width = n[3] * n[4];
  Attention a;
  a.tokens = n[2], a.heads = n[3], a.head_dim = n[4], a.parts = n[5];
  a.query = n[0] % 2 * a.tokens / 3, a.queries = a.tokens - a.query;
  a.qkv_stride = 3 * width + 5, a.out_stride = width + 3;
  a.qkv = floats(extent(samples * a.tokens, a.qkv_stride, 3 * width));
  a.out = floats(extent(samples * a.queries, a.out_stride, width));
  int64_t count;
  isa::attention_scratch(a, count);
  float* scratch = array<float>(count);
  const int64_t items = samples * a.heads * a.parts;
  isa::attention_items(a, 0, items / 2, scratch);
  isa::attention_items(a, items / 2, items, scratch);
  std::vector<double> weights(a.tokens);
  for (int64_t row = 0; row < samples * a.queries; ++row)
    for (int64_t h = 0; h < a.heads; ++h) {
      const float* sample = a.qkv + row / a.queries * a.tokens * a.qkv_stride + h * a.head_dim;
      const float* q = sample + (a.query + row % a.queries) * a.qkv_stride;
      const float* k = sample + width;
      double total = 0;
      for (int64_t m = 0; m < a.tokens; ++m) {
        double score = 0;
        for (int64_t d = 0; d < a.head_dim; ++d) score += double(q[d]) * k[m * a.qkv_stride + d];
        total += weights[m] = std::exp(score / std::sqrt(double(a.head_dim)));
      }
      for (int64_t d = 0; d < a.head_dim; ++d) {
        double sum = 0;
        for (int64_t m = 0; m < a.tokens; ++m)
          sum += weights[m] / total * k[m * a.qkv_stride + width + d];
        if (!close(a.out[row * a.out_stride + h * a.head_dim + d], sum, 1)) return 1;
      }
    }
  return 0;
}

int norm(const long long* n) {
  const int64_t rows = n[1], width = n[2];
  Norm a;
  a.width = width, a.stride = width + 3, a.tokens = 2, a.eps = 1e-6f, a.mul_step = width;
  a.x = floats(extent(rows, a.stride, width)), a.out = floats(extent(rows, a.stride, width));
  a.mul = floats((rows + 1) / 2 * width), a.add = floats((rows + 1) / 2 * width);
  isa::norm_rows(a, 0, rows + n[4]);
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = a.x + r * a.stride;
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < width; ++i) mean += double(x[i]) / width;
    for (int64_t i = 0; i < width; ++i) variance += (x[i] - mean) * (x[i] - mean) / width;
    for (int64_t i = 0; i < width; ++i) {
      const int64_t m = r / 2 * width + i;
      const double want = (x[i] - mean) / std::sqrt(variance + 1e-6) * a.mul[m] + a.add[m];
      if (!close(a.out[r * a.stride + i], want, 3)) return 1;
    }
  }
  return 0;
}

int dots(const long long* n) {
  const int64_t rows = n[1], columns = n[2], depth = n[3];
  const Dots d = few_rows(rows, columns, depth);
  isa::dots_columns(d, 0, columns / 2);
  isa::dots_columns(d, columns / 2, columns + n[4]);
  if (!right(d)) return 1;
  isa::silu_floats(d.out, rows * columns);
  return 0;
}

int run(const std::string& name, const long long* n) {
  if (name == "gemm") return gemm(n);
  if (name == "int8") return int8(n);
  if (name == "attention") return attention(n);
  if (name == "norm") return norm(n);
  if (name == "dots") return dots(n);
  return 2;
}

}  // namespace

int main() {
  char line[256], name[32];
  while (std::fgets(line, sizeof line, stdin)) {
    long long n[6] = {};
    if (std::sscanf(line, "%31s %lld %lld %lld %lld %lld %lld", name, n, n + 1, n + 2, n + 3, n + 4,
                    n + 5) < 6)
      return 2;
    std::srand(n[0]);
    const int failed = run(name, n);
    memory.clear();
    if (failed) return std::printf("%s: wrong\n", name), 1;
  }
  std::printf("0 failures\n");
  return 0;
}
